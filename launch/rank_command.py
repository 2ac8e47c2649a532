"""What the scripts that launchers start on every rank have in common: arguments, the run, how a rank ends."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from mixwright.data_mixing.errors import MixingError
from mixwright.launch.cluster_rank import CRASHED
from mixwright.launch.console import RunConsole
from mixwright.pretrain.config import PretrainConfig
from mixwright.pretrain.ranks import launched_rank

LEADER_SPEAKS_S = 2.0
"""Launchers end all ranks once one has ended: the others give the leader so long to say why."""

OFTEN_SAME_ON_ALL_RANKS = (2, 3)
"""Exit codes of errors in configuration and data: most are met by every rank, some by those of one node."""

Config = TypeVar("Config")

RunOf = Callable[[Path, Sequence[str], RunConsole], Config]
"""The run to train, from the path and overrides of the command line."""

Job = Callable[[Config, RunConsole], int]
"""Runs this rank's part of it; returns the exit code."""


def pretrain_job(config: PretrainConfig, console: RunConsole) -> int:
    """A pretraining run, students among them. Imported late: torch and deepspeed take seconds, a misspelt key not."""
    from mixwright.pretrain.job import run_job

    return run_job(config, console)


def parse_arguments(description: str, example: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """`--config FILE [key.sub=value ...]`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help=f"e.g. {example}")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # appended by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change single settings")
    return parser.parse_args(arguments)


def run_rank(description: str, example: str, run_of: RunOf[Config], job: Job[Config]) -> int:
    """Run the job of this rank; every expected failure is one line on standard error. Returns the exit code."""
    arguments = parse_arguments(description, example)
    console = RunConsole(quiet=launched_rank() != 0)
    return ended(console, lambda: job(run_of(arguments.config, arguments.overrides, console), console))


def ended(console: RunConsole, job: Callable[[], int]) -> int:
    """The exit code of this rank's job; every expected failure is one line on standard error.

    An exception that nobody expected is CRASHED: Python's own code for it is 1, which here means a known reason.
    """
    rank = launched_rank()
    try:
        return job()
    except MixingError as error:
        console.close()
        if rank and error.exit_code in OFTEN_SAME_ON_ALL_RANKS:
            time.sleep(LEADER_SPEAKS_S)  # who is still there after that has met it alone
        print(f"error: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)
        return error.exit_code
    except Exception:
        console.close()
        traceback.print_exc()
        return CRASHED
