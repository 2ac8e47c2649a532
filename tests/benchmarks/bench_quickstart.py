"""The README's first command as a newcomer gives it: `python -m tests.benchmarks.bench_quickstart`.

Clones the newest commit into a temporary folder, makes a virtual environment there and trains; then the same command on
the finished run. Needs the package registry; packages that pip has kept from before are not fetched again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.figures import ROOT

STAGES = {
    "virtual environment, packages (make install)": "install",
    "corpora, training, policy, report (make quickstart)": "quickstart",
    "the same command on the finished run": "quickstart",
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "mixwright"
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", str(clone)], check=True)
        seconds = {stage: timed(clone, target) for stage, target in STAGES.items()}
    for stage, spent in seconds.items():
        print(f"{stage:<54}{_minutes(spent):>14}")
    install, quickstart, _ = seconds.values()
    print(f"{'from the clone to the report':<54}{_minutes(install + quickstart):>14}")


def timed(clone: Path, target: str) -> float:
    """Seconds of a make target in an environment that knows nothing of ours; ends the program when it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VIRTUAL_ENV", "PYTHON"))}
    began = time.perf_counter()
    done = subprocess.run(["make", target], cwd=clone, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"make {target} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")
    return time.perf_counter() - began


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


if __name__ == "__main__":
    main()
