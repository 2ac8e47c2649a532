"""Distil teachers into a student: `python launch/distill.py --config configs/distill.yaml [key.sub=value ...]`.

Starts like launch/pretrain.py: with plain python, `deepspeed`, `accelerate launch` or `torchrun`. What comes before the
first step (temperature, samples, cache) is made by one process: by this command where it is the only rank, else by
`mixwright distill prepare CONFIG`. The same command goes on where it was interrupted.

Exit codes: 0 done, 1 training failed, 2 bad input or the run is in use, 3 a required service is unavailable, 75
interrupted and resumable (run the same command again).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mixwright.data_mixing.errors import ConfigError, MixingError
from mixwright.launch.console import RunConsole
from mixwright.launch.distill_commands import STUDENT, prepare_from
from mixwright.launch.ending import rank_failed
from mixwright.pretrain.config import PretrainConfig, load_pretrain_config
from mixwright.pretrain.distill.config import load_distill_config
from mixwright.pretrain.ranks import launched_rank


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a distillation, e.g. configs/distill.yaml")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # appended by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change single settings")
    return parser.parse_args(arguments)


def student_run(path: Path, overrides: Sequence[str], console: RunConsole) -> PretrainConfig:
    """The student's run, prepared here or, for several ranks, before. Raises ConfigError when it is not."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return prepare_from(path, overrides, console)
    config, _ = load_distill_config(path, overrides)
    student = config.folder / STUDENT
    if not student.is_file():
        raise ConfigError(f"{student}: no such file: run `mixwright distill prepare {path}` before several ranks")
    return load_pretrain_config(student)


def main() -> int:
    """Run the student of this rank; every expected failure is one line on standard error."""
    arguments = parse_arguments()
    rank = launched_rank()
    console = RunConsole(quiet=rank != 0)
    try:
        config = student_run(arguments.config, arguments.overrides, console)
        from mixwright.pretrain.job import run_job

        return run_job(config, console)
    except MixingError as error:
        console.close()
        return rank_failed(error, rank)


if __name__ == "__main__":
    sys.exit(main())
