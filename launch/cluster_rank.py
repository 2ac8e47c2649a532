"""One rank of a cluster job: `python -m mixwright.launch.cluster_rank PHASE`, started by `cluster_job` on every rank.

A process of its own, because training ranks are not Ray drivers (contract 2), and as everywhere its exit code says how
it ended: the codes of launch/pretrain.py, and 70 for what nobody expected.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

from mixwright.launch.parent import end_with_parent

FAILED, CRASHED, INTERRUPTED = 1, 70, 75
"""Exit codes of a rank beside 0, 2 and 3. Python's own for an exception is 1, which here means a known reason
(NonFiniteLoss), so an exception that nobody expected ends a rank with 70 (EX_SOFTWARE)."""
JOB_FAILED = 76
"""What FAILED is for a whole job: its 1 is Python's and Ray's own."""
PARENT = "MIXWRIGHT_PARENT"


def main() -> int:
    """Perform a phase of the stage that the manifest names; returns the exit code."""
    end_with_parent()
    if os.environ.get(PARENT) != str(os.getppid()):
        return CRASHED  # the parent was gone before Linux knew that we depend on it
    try:
        return _perform(sys.argv[1])
    except Exception:
        traceback.print_exc()
        return CRASHED


def _perform(phase: str) -> int:
    from mixwright.data_mixing.config_file import validate
    from mixwright.launch.console import RunConsole
    from mixwright.launch.job_manifest import VARIABLE, JobManifest, read_manifest
    from mixwright.launch.job_stages import STAGES
    from mixwright.launch.rank_command import ended
    from mixwright.launch.training_runs import await_release
    from mixwright.pretrain.ranks import launched_rank

    console = RunConsole(quiet=launched_rank() != 0)

    def job() -> int:
        manifest: JobManifest = read_manifest(os.environ)
        stage = STAGES[manifest.stage]
        config: Any = validate(stage.model, manifest.config, VARIABLE)
        if launched_rank() == 0:
            # The ranks of the attempt before may be ending still.
            await_release(manifest.run_dir)
        return stage.phase(phase).perform(config, console)

    return ended(console, job)


if __name__ == "__main__":
    sys.exit(main())
