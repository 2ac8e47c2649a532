"""`make quickstart`: corpora, a real pretraining run, and a policy submitted to it while it trains.

Everything here is what a user would type: `mixwright data prepare`, `deepspeed launch/pretrain.py`, `mixwright mix
submit`. Started again, it goes on with an interrupted run or shows the results of a complete one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from mixwright.data_mixing.errors import MixingError
from mixwright.data_mixing.history import RunHistory
from mixwright.pretrain.config import PretrainConfig, load_pretrain_config
from mixwright.pretrain.rundir import read_history

BIN = Path(sys.executable).parent
CONFIG = Path("configs/quickstart.yaml")
POLICY = Path("configs/policies/quickstart_shift.yaml")
SUBMIT_AFTER = 0.3
"""Share of the steps after which the policy is submitted."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="quickstart", help="name of the run; its folder is runs/NAME")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    arguments = parser.parse_args()
    overrides = [f"run.name={arguments.run}", *arguments.overrides]
    try:
        config = load_pretrain_config(CONFIG, overrides)
    except MixingError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    show("1/3 corpora")
    done = run_shown(["mixwright", "data", "prepare", str(config.data.prepare)])
    if done != 0:
        return done
    show("2/3 training, evaluation, report")
    return train(config, overrides)


def train(config: PretrainConfig, overrides: list[str]) -> int:
    """Run the training job and submit the policy once it is far enough; returns the job's exit code."""
    command = ["deepspeed", "--log_level", "warning", "launch/pretrain.py", "--config", str(CONFIG), *overrides]
    show("$ " + " ".join(command))
    job = subprocess.Popen([str(BIN / command[0]), *command[1:]], env=quiet_environment())
    try:
        submit_when_due(config, job)
        return job.wait()
    except KeyboardInterrupt:
        # The terminal has sent the signal to the job as well: it writes a checkpoint and ends.
        return job.wait()


def submit_when_due(config: PretrainConfig, job: subprocess.Popen[bytes]) -> None:
    """Wait until the run is far enough, then submit the policy; a run that has it already is left alone."""
    due = int(SUBMIT_AFTER * config.training.num_steps)
    while job.poll() is None:
        history = read_history(config.run_dir)
        if history.has_genesis and (len(history.policies) > 1 or history.end is not None):
            return
        if last_reported_step(history) >= due and (config.run_dir / "service.json").exists():
            command = ["mixwright", "mix", "submit", str(POLICY), "--run", str(config.run_dir), "--wait"]
            show("3/3 a policy for the running job\n$ " + " ".join(command))
            run_shown(command)
            return
        time.sleep(1.0)


def last_reported_step(history: RunHistory) -> int:
    return history.reports[-1].last_step if history.reports else -1


def run_shown(command: list[str]) -> int:
    return subprocess.run([str(BIN / command[0]), *command[1:]], env=quiet_environment(), check=False).returncode


def quiet_environment() -> dict[str, str]:
    """This environment with the virtual environment's commands on PATH and no chatter from libraries."""
    path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, "TRANSFORMERS_VERBOSITY": "error", "DS_ACCELERATOR": accelerator()}


def accelerator() -> str:
    """`cuda` where a GPU is present, else `cpu`; DeepSpeed asks the same question at length."""
    return os.environ.get("DS_ACCELERATOR") or ("cuda" if Path("/dev/nvidia0").exists() else "cpu")


def show(text: str) -> None:
    print(f"== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
