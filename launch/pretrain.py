"""Pretrain a language model: `deepspeed launch/pretrain.py --config configs/quickstart.yaml [key.sub=value ...]`.

Also starts with plain `python` (one process) and `torchrun`. The same command resumes a run that was interrupted.

Exit codes: 0 done, 1 training failed, 2 bad input or the run is in use, 3 a required service is unavailable, 75
interrupted and resumable (run the same command again).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mixwright.data_mixing.errors import MixingError
from mixwright.launch.console import RunConsole
from mixwright.launch.ending import rank_failed
from mixwright.pretrain.config import load_pretrain_config
from mixwright.pretrain.ranks import launched_rank


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a run configuration, e.g. configs/quickstart.yaml")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # appended by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change single settings")
    return parser.parse_args(arguments)


def main() -> int:
    """Run the job of this rank; every expected failure is one line on standard error."""
    arguments = parse_arguments()
    rank = launched_rank()
    console = RunConsole(quiet=rank != 0)
    try:
        config = load_pretrain_config(arguments.config, arguments.overrides)
        # Imported late: torch, transformers and deepspeed take seconds, a misspelt key should not.
        from mixwright.pretrain.job import run_job

        return run_job(config, console)
    except MixingError as error:
        console.close()
        return rank_failed(error, rank)


if __name__ == "__main__":
    sys.exit(main())
