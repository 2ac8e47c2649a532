"""Align a model with preferences (DPO, RPO): `python launch/rpo.py --config configs/rpo/example.yaml [key=value ...]`.

Starts with plain python, `deepspeed`, `accelerate launch` or `torchrun`, like launch/pretrain.py. Tokenised pairs and
reference log-probabilities are made once and kept. The same command goes on where it was interrupted.

Exit codes: 0 done, 1 training failed, 2 bad input or the run is in use, 70 a traceback (a fault, or the ranks lost each
other), 75 interrupted and resumable (run the same command again).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mixwright.launch.console import RunConsole
from mixwright.launch.rank_command import run_rank
from mixwright.pretrain.rpo.config import RpoConfig, load_rpo_config


def rpo_run(path: Path, overrides: Sequence[str], console: RunConsole) -> RpoConfig:
    """The run of a configuration file. Raises ConfigError."""
    return load_rpo_config(path, overrides)


def rpo_job(config: RpoConfig, console: RunConsole) -> int:
    """Imported late: torch, transformers and deepspeed take seconds, a misspelt key should not."""
    from mixwright.pretrain.rpo.job import run_rpo

    return run_rpo(config, console)


def main() -> int:
    """Run this rank's part; returns the exit code."""
    return run_rank(str(__doc__), "configs/rpo/example.yaml", rpo_run, rpo_job)


if __name__ == "__main__":
    sys.exit(main())
