"""Distil teachers into a student: `python launch/distill.py --config configs/ensemble/distill.yaml [key=value ...]`.

Starts like launch/pretrain.py: with plain python, `deepspeed`, `accelerate launch` or `torchrun`. What comes before the
first step (temperature, samples, cache) is made by one process: by this command where it is the only rank, else by
`mixwright distill prepare CONFIG`. The same command goes on where it was interrupted.

Exit codes: 0 done, 1 training failed, 2 bad input or the run is in use, 3 a required service is unavailable, 75
interrupted and resumable (run the same command again).
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from mixwright.launch.console import RunConsole
from mixwright.launch.distill_commands import prepare_from, prepared_student
from mixwright.launch.rank_command import pretrain_job, run_rank
from mixwright.pretrain.config import PretrainConfig
from mixwright.pretrain.distill.config import load_distill_config


def student_run(path: Path, overrides: Sequence[str], console: RunConsole) -> PretrainConfig:
    """The student's run, prepared here or, for several ranks, before, from the same settings. Raises ConfigError."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return prepare_from(path, overrides, console)
    command = shlex.join(["mixwright", "distill", "prepare", str(path), *overrides])
    return prepared_student(*load_distill_config(path, overrides), to_prepare=f"run `{command}`")


def main() -> int:
    """Run the student of this rank; returns the exit code."""
    return run_rank(str(__doc__), "configs/ensemble/distill.yaml", student_run, pretrain_job)


if __name__ == "__main__":
    sys.exit(main())
