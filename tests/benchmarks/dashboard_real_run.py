"""A small real run with several changes of policy, for screenshots: `python -m tests.benchmarks.dashboard_real_run`.

Everything is what a user would type: the quickstart's text and settings with a smaller model, its training job, and
policies submitted to it while it trains: a new mixture, a mistake, a shadow, instance weights, an online policy, a
rollback. About five minutes on two cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from mixwright.launch.quickstart import BIN, CONFIG, POLICY, quiet_environment, run_shown
from mixwright.pretrain.rundir import read_history

NUM_STEPS = 600
SMALLER = (
    "model.config.hidden_size=96", "model.config.intermediate_size=256", "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=4", "model.config.num_key_value_heads=4", f"training.num_steps={NUM_STEPS}",
    "mixing.report_every=5", "metrics.row_log=true", "evaluation.every=50", "evaluation.rows_per_domain=4",
    "evaluation.test_rows_per_domain=8", "checkpoint.every=200", "mixing.service=required",
)  # fmt: skip


@dataclass(frozen=True)
class Submission:
    """Typed once `step` steps are reported: `mixwright mix ARGUMENTS --run RUN`; `document` is the policy, if any."""

    step: int
    arguments: tuple[str, ...]
    document: str = ""


SUBMISSIONS = (
    Submission(70, ("submit", str(POLICY), "--author", "ann")),
    Submission(
        120,
        ("submit", "POLICY"),
        "kind: static\nmixture: {pyhton: 2, cpp: 1}\nauthor: ben\nwhy: half the code, I thought\n",
    ),
    Submission(
        125, ("submit", "POLICY", "--shadow"),
        "kind: odm\nround_steps: 25\nauthor: ben\nwhy: what would a bandit do?\n",
    ),
    Submission(
        150, ("submit", "POLICY"),
        "kind: keep\nloss_weighting: {strategy: linupper, r: 0.4}\nauthor: ann\nwhy: easy rows count less from here\n",
    ),
    Submission(
        220, ("submit", "POLICY"),
        "kind: aioli\nvariant: paper\nsweeps: 1\nsweep_steps: 3\nround_steps: 40\nauthor: ann\n"
        "caps: {licences: {max_epochs: 6}}\nwhy: let the losses decide for a while\n",
    ),
    Submission(480, ("rollback", "FIRST", "--author", "cem", "--why", "the sweep has told enough; back to the first")),
    Submission(
        520, ("submit", "POLICY"),
        "kind: keep\ncaps:\n  licences: {max_epochs: 1.4}\n  readmes: {max_epochs: 1.2}\n  python: {max_epochs: 4}\n"
        "author: ann\nwhy: nothing more than 1.4 times\n",
    ),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="dashboard-demo", help="name of the run; its folder is runs/NAME")
    return make_run(parser.parse_args().run)


def make_run(name: str) -> int:
    """Prepare the corpora, train, submit; returns the job's exit code. A run that is complete is left as it is."""
    run_dir = Path("runs") / name
    done = run_shown(["mixwright", "data", "prepare", "configs/quickstart_corpora.yaml"])
    if done != 0:
        return done
    command = [sys.executable, "launch/pretrain.py", "--config", str(CONFIG), f"run.name={name}", *SMALLER]
    job = subprocess.Popen(command, env=quiet_environment())
    for submission in SUBMISSIONS:
        if not wait_for(run_dir, submission.step, job):
            break
        submit(run_dir, submission)
    return job.wait()


def wait_for(run_dir: Path, step: int, job: subprocess.Popen[bytes]) -> bool:
    """Whether the run reports `step` before its job ends."""
    while job.poll() is None:
        history = read_history(run_dir)
        if history.has_genesis and history.last_step >= step:
            return True
        time.sleep(0.5)
    return False


def submit(run_dir: Path, submission: Submission) -> None:
    """Type one submission."""
    document = run_dir / "submitted.yaml"
    document.write_text(submission.document, encoding="utf-8")
    first = str(min(read_history(run_dir).policies))
    names = {"POLICY": str(document), "FIRST": first}
    arguments = [names.get(argument, argument) for argument in submission.arguments]
    subprocess.run([str(BIN / "mixwright"), "mix", *arguments, "--run", str(run_dir)], env=quiet_environment(),
                   check=False)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
