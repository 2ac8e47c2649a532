"""Commands of Slurm as far as configs/cluster/pretrain.sbatch uses them, with groups of processes here for nodes.

`srun` starts the tasks of a step with the variables that Slurm sets, forwards SIGTERM and ends with the highest exit
code; `scontrol` answers `show hostnames` and notes `requeue`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WAIT_S = 60.0
"""`srun --wait` of the script: what is left of a step after the first task has ended is killed then."""


def options_and_command(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Options are all of the form --name or --name=value; the command begins with the first word that is none."""
    first = next(i for i, argument in enumerate(arguments) if not argument.startswith("--"))
    pairs = [argument[2:].partition("=") for argument in arguments[:first]]
    return {name: value for name, _, value in pairs}, arguments[first:]


def srun(arguments: list[str]) -> int:
    options, command = options_and_command(arguments)
    unknown = set(options) - {
        "overlap", "nodes", "ntasks", "ntasks-per-node", "nodelist", "exclude", "kill-on-bad-exit", "wait",
    }  # fmt: skip
    assert not unknown, f"the stub of srun does not know {unknown}"
    num_tasks = int(options.get("ntasks", os.environ["SLURM_NTASKS"]))
    per_node = int(options.get("ntasks-per-node", os.environ["SLURM_NTASKS_PER_NODE"]))
    tasks = [subprocess.Popen(command, env=os.environ | place(task, num_tasks, per_node)) for task in range(num_tasks)]

    def forward(number: int, frame: Any) -> None:
        for task in tasks:
            task.send_signal(number)

    signal.signal(signal.SIGTERM, forward)
    return highest_code(tasks)


def place(task: int, num_tasks: int, per_node: int) -> dict[str, str]:
    return {
        "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task % per_node), "SLURM_NODEID": str(task // per_node),
        "SLURM_NTASKS": str(num_tasks), "SLURM_NTASKS_PER_NODE": str(per_node),
    }  # fmt: skip


def highest_code(tasks: list[subprocess.Popen[bytes]]) -> int:
    deadline: float | None = None
    while any(task.poll() is None for task in tasks):
        if deadline is None and any(task.poll() is not None for task in tasks):
            deadline = time.monotonic() + WAIT_S
        if deadline is not None and time.monotonic() > deadline:
            for task in tasks:
                task.kill()
        time.sleep(0.05)
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks)


def scontrol(arguments: list[str]) -> int:
    if arguments[:2] == ["show", "hostnames"]:
        print("\n".join(arguments[2].split(",")))
    elif arguments[0] == "requeue":
        with Path(os.environ["REQUEUED"]).open("a") as file:
            file.write(arguments[1] + "\n")
    else:
        raise AssertionError(f"the stub of scontrol does not know {arguments}")
    return 0


if __name__ == "__main__":
    # The name of the link by which it was started says what it is.
    sys.exit({"srun": srun, "scontrol": scontrol}[Path(sys.argv[1]).name](sys.argv[2:]))
