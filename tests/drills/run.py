"""All drills, then cycles of random kills: `python -m tests.drills.run --seed 1 --cycles 100` (`make drills`).

Prints a table and puts it, with machine, versions and commit, into docs/reliability.md between two comments. Arguments
after `--` go to pytest, e.g. `-- -k rank`. `--fold FILE ...` takes the junit files of earlier runs instead; of a drill
that is in several, the last counts. Exit code: pytest's; with `--fold` 1 when a drill failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.figures import ROOT, commit_of, machine, write_figures

PAGE = ROOT / "docs" / "reliability.md"
HEADER = ("drill", "outcome", "seconds", "recovery, s", "longest wait, s")
IN_COLUMNS = ("recovery_s", "longest_wait_s")


@dataclass(frozen=True)
class Result:
    """One drill as pytest tells it; `figures` are what the drill has measured."""

    name: str
    outcome: str
    seconds: float
    figures: dict[str, str]

    def row(self) -> tuple[str, ...]:
        """Its line of the table; recovery and wait are empty where they were not measured."""
        measured = [self.figures.get(name) for name in ("recovery_s", "longest_wait_s")]
        shown = [f"{float(value):.2f}" if value else "" for value in measured]
        return (self.name, self.outcome, f"{self.seconds:.0f}", *shown)

    def remarks(self) -> str:
        """Figures that have no column."""
        return "; ".join(f"{name} {value}" for name, value in self.figures.items() if name not in IN_COLUMNS)


def read_results(path: Path) -> list[Result]:
    """The drills in a junit file, in order; those that were skipped are left out."""
    cases = ElementTree.parse(path).getroot().iter("testcase")
    return [_result(case) for case in cases if case.find("skipped") is None]


def _result(case: ElementTree.Element) -> Result:
    name = case.attrib["name"].removeprefix("test_").replace("_", " ").replace("[", " (").replace("]", ")")
    has_failed = case.find("failure") is not None or case.find("error") is not None
    figures = {p.attrib["name"]: p.attrib["value"] for p in case.iter("property")}
    return Result(name, "FAILED" if has_failed else "held", float(case.attrib["time"]), figures)


def figures_block(results: Sequence[Result], seed: int, commit: str) -> str:
    """The page's figures: on what, then a line for each drill, then what else was measured."""
    lines = [
        f"`make drills SEED={seed}` on {machine()}; commit {commit}.",
        "",
        *(f"| {' | '.join(cells)} |" for cells in [HEADER, ("---",) * len(HEADER), *(r.row() for r in results)]),
        "",
        *(f"- *{result.name}*: {result.remarks()}" for result in results if result.remarks()),
    ]
    return "\n".join(lines)


def run_drills(seed: int, cycles: int, junit: Path, more: Sequence[str]) -> int:
    """pytest's exit code; the random kills come last."""
    command = [
        sys.executable, "-m", "pytest", "tests/drills", "-m", "drill", "-v", "-s", f"--junitxml={junit}",
        "-o", "junit_family=xunit1", *more,
    ]  # fmt: skip
    settings = {"DRILL_SEED": str(seed), "DRILL_CYCLES": str(cycles), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=os.environ | settings, check=False).returncode


def print_table(results: Sequence[Result]) -> None:
    rows = [HEADER, *(result.row() for result in results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cycles", type=int, default=100, help="random kills of one run")
    parser.add_argument("--fold", type=Path, nargs="+", metavar="JUNIT", help="figures of earlier runs; runs nothing")
    parser.add_argument("--commit", help="what the figures were measured on (default: the commit here)")
    parser.add_argument("pytest", nargs="*", help="further arguments for pytest, after --")
    return parser.parse_args(arguments)


def main() -> int:
    arguments = parse_arguments()
    if arguments.fold:
        results = list({result.name: result for path in arguments.fold for result in read_results(path)}.values())
        code = int(any(result.outcome != "held" for result in results))
    else:
        with tempfile.TemporaryDirectory() as folder:
            junit = Path(folder) / "drills.xml"
            code = run_drills(arguments.seed, arguments.cycles, junit, arguments.pytest)
            results = read_results(junit) if junit.exists() else []
    print_table(results)
    if not arguments.pytest and results:
        write_figures(PAGE, "drills", figures_block(results, arguments.seed, arguments.commit or commit_of(ROOT)))
    return code


if __name__ == "__main__":
    sys.exit(main())
