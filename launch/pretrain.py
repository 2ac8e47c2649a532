"""Pretrain a language model: `deepspeed launch/pretrain.py --config configs/quickstart.yaml [key.sub=value ...]`.

Also starts with plain `python` (one process) and `torchrun`. The same command resumes a run that was interrupted.

Exit codes: 0 done, 1 training failed, 2 bad input or the run is in use, 3 a required service is unavailable, 70 a
traceback (a fault, or the ranks lost each other), 75 interrupted and resumable (run the same command again).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mixwright.launch.console import RunConsole
from mixwright.launch.rank_command import pretrain_job, run_rank
from mixwright.pretrain.config import PretrainConfig, load_pretrain_config


def configured_run(path: Path, overrides: Sequence[str], console: RunConsole) -> PretrainConfig:
    """The run of a configuration file. Raises ConfigError."""
    return load_pretrain_config(path, overrides)


def main() -> int:
    """Run the job of this rank; returns the exit code."""
    return run_rank(str(__doc__), "configs/quickstart.yaml", configured_run, pretrain_job)


if __name__ == "__main__":
    sys.exit(main())
