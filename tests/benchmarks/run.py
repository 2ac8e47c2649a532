"""Every benchmark beside its peers, one after the other: `python -m tests.benchmarks.run` (`make bench-all`).

What each prints goes into docs/benchmarks.md, between its two comments, with commit, date and load; the text around
stays. Peers that are no dependency of ours run with the interpreter in MIXWRIGHT_PEERS_PYTHON. `--only NAME ...`
repeats some. Exit code 1 when one failed: its old figures stay then, and the others are measured.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.figures import ROOT, commit_of, machine, write_figures

PAGE = ROOT / "docs" / "benchmarks.md"
PACKAGES = ("torch", "deepspeed", "transformers", "trl", "ray", "datasets", "numpy", "pyarrow")
QUIET = {
    "COLUMNS": "140", "NO_COLOR": "1", "TERM": "dumb", "OMP_NUM_THREADS": "1",
    **({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}),  # or DeepSpeed tells that it looked for one
}  # fmt: skip
ON_CPU = () if torch.cuda.is_available() else ("--shapes", "2048,256,8192", "--rounds", "10")
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Benchmark:
    """A module that prints tables. `about_s`: how long it took on two cores, for the time that is left."""

    name: str
    module: str
    about_s: float
    arguments: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        return " ".join(("python -m", self.module, *self.arguments))


BENCHMARKS = (
    Benchmark("training", "tests.benchmarks.bench_training", 200),
    Benchmark("weighting", "tests.benchmarks.bench_weighting", 200),
    Benchmark("row_log", "tests.benchmarks.bench_row_log", 30),
    Benchmark("loaders", "tests.benchmarks.bench_loaders", 150),
    Benchmark("gather", "tests.benchmarks.bench_gather", 60),
    Benchmark("plan", "tests.benchmarks.bench_plan", 60),
    Benchmark("apportion", "tests.benchmarks.bench_apportion", 60),
    Benchmark("controller", "tests.benchmarks.bench_controller", 40),
    Benchmark("kernels", "mixwright.kernels.bench", 120, ON_CPU),
    Benchmark("distillation", "mixwright.kernels.bench_distillation", 150, ON_CPU),
    Benchmark("head", "tests.benchmarks.bench_head", 120),
    Benchmark("rpo", "tests.benchmarks.bench_rpo", 400),
    Benchmark("scale", "tests.benchmarks.bench_scale", 60),
    Benchmark("dashboard", "tests.benchmarks.bench_dashboard", 300),
    Benchmark("quickstart", "tests.benchmarks.bench_quickstart", 270),
)


def measure(benchmark: Benchmark, commit: str) -> str | None:
    """The figures as the page shows them; None when the benchmark failed."""
    load, began = os.getloadavg()[0], time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", benchmark.module, *benchmark.arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, **QUIET}, check=False,
    )  # fmt: skip
    printed = as_text(done.stdout)
    print(printed, flush=True)
    if done.returncode or not printed:
        return None
    spent = datetime.timedelta(seconds=round(time.monotonic() - began))
    return block(benchmark, printed, f"commit {commit}, {today()}, {spent}, load before {load:.1f}")


def as_text(printed: str) -> str:
    """Without colours, and of a line that was overwritten what stood last."""
    lines = (line.rpartition("\r")[2].rstrip() for line in ESCAPES.sub("", printed).split("\n"))
    return "\n".join(lines).strip("\n")


def block(benchmark: Benchmark, printed: str, circumstances: str) -> str:
    return f"`{benchmark.command}` ({circumstances}):\n\n```text\n{printed}\n```"


def today() -> str:
    return datetime.datetime.now(tz=datetime.UTC).date().isoformat()


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--page", type=Path, default=PAGE, help="where the figures go")
    parsed = parser.parse_args(arguments)
    if not parsed.page.is_file():
        parser.error(f"--page: no such file {parsed.page}")
    return parsed


def main() -> int:
    arguments = parse_arguments()
    chosen = [benchmark for benchmark in BENCHMARKS if benchmark.name in arguments.only]
    commit = commit_of(ROOT)
    write_figures(arguments.page, "machine", f"{machine(PACKAGES)}, {accelerator()}.")
    failed = []
    for number, benchmark in enumerate(chosen, 1):
        left = sum(other.about_s for other in chosen[number - 1 :]) / 60
        print(f"== {number} of {len(chosen)}, about {left:.0f} min left: {benchmark.command}", flush=True)
        figures = measure(benchmark, commit)
        if figures is None:
            failed.append(benchmark.name)
        else:
            write_figures(arguments.page, benchmark.name, figures)
    if failed:
        print(f"error: {', '.join(failed)} failed; their old figures stay in {arguments.page}", file=sys.stderr)
    return int(bool(failed))


def accelerator() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


if __name__ == "__main__":
    sys.exit(main())
