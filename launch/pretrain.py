"""Pretrain a language model: `deepspeed launch/pretrain.py --config configs/quickstart.yaml [key.sub=value ...]`.

Also starts with plain `python` (one process) and `torchrun`. The same command resumes a run that was interrupted.

Exit codes: 0 done, 1 training failed, 2 bad input or the run is in use, 3 a required service is unavailable, 75
interrupted and resumable (run the same command again).
"""

from __future__ import annotations

import sys

from mixwright.launch.rank_command import run_rank
from mixwright.pretrain.config import load_pretrain_config


def main() -> int:
    """Run the job of this rank; returns the exit code."""
    return run_rank(
        str(__doc__), "configs/quickstart.yaml", lambda path, overrides, _: load_pretrain_config(path, overrides)
    )


if __name__ == "__main__":
    sys.exit(main())
