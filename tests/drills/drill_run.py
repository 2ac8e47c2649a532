"""A run that faults happen to: the real job in processes of its own, and the policies that it is to read by."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.journal import Journal
from tests.pretrain.jobs import TIMEOUT_S, finish, history_of, metrics, start_job, wait_for_step, write_config
from tests.pretrain.tiny import tiny_tree

ALTERED_JOB = "../tests/drills/altered_job.py"
NAME = "tiny"


@dataclass(frozen=True)
class Job:
    """One attempt at a run: the launcher's process, and what was found out when it ended."""

    run_dir: Path
    process: subprocess.Popen[str]

    def ranks(self) -> list[psutil.Process]:
        """Processes of the ranks in order, waiting for all of them to be there."""
        deadline = time.monotonic() + TIMEOUT_S
        launcher = psutil.Process(self.process.pid)
        while time.monotonic() < deadline:
            by_rank = {}
            for process in [launcher, *launcher.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    environment = process.environ()
                    if "DRILL_RANKS" in environment and _is_rank(process, environment):
                        by_rank[int(environment.get("RANK", 0))] = process
            if by_rank and len(by_rank) == int(next(iter(by_rank.values())).environ()["DRILL_RANKS"]):
                return [by_rank[rank] for rank in sorted(by_rank)]
            time.sleep(0.05)
        raise AssertionError("the ranks did not start")

    def wait_for_step(self, step: int) -> None:
        """Return once `step` optimizer steps are done."""
        wait_for_step(self.run_dir, step, self.process)

    def kill(self) -> None:
        """kill -9 of launcher and ranks at once, as a power failure would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def finish(self) -> tuple[int, str]:
        """Exit code and output, once it has ended."""
        return finish(self.process)

    def succeed(self) -> str:
        """Output of a job that must succeed."""
        code, output = self.finish()
        assert code == 0, f"exit code {code}:\n{output[-4000:]}"
        return output


def _is_rank(process: psutil.Process, environment: dict[str, str]) -> bool:
    """Whether this is a rank, rather than one of the launchers above it or the mixing service below it."""
    command = " ".join(process.cmdline())
    script = "pretrain.py" in command or "altered_job.py" in command
    return script and (environment["DRILL_RANKS"] == "1" or "RANK" in environment)


@dataclass(frozen=True)
class DrillRun:
    """Folder, configuration and planned policies of a run. `start` begins it and goes on with it alike.

    `policies` are documents with `at_step`: `plan` journals them as the controller would, so that they take effect at
    the same steps whatever happens in between.
    """

    folder: Path
    config: Path
    policies: tuple[dict[str, Any], ...] = ()
    jobs: list[Job] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        return self.folder / NAME

    @property
    def num_steps(self) -> int:
        return int(self.tree["training"]["num_steps"])

    @property
    def tree(self) -> dict[str, Any]:
        """The configuration as it stands in the file."""
        tree: dict[str, Any] = yaml.safe_load(self.config.read_text())
        return tree

    @property
    def _full_speed(self) -> Path:
        return self.folder / "full-speed"

    def speed_up(self) -> None:
        """Let a run that was slowed down (`step_s`) go on at full speed."""
        self._full_speed.touch()

    def history(self) -> RunHistory:
        return history_of(self.run_dir)

    def last_step(self) -> int:
        """Optimizer steps done by the newest attempt, by the metrics; 0 before the first."""
        return max((record["step"] for record in metrics(self.run_dir, "step")[-1:]), default=0)

    def start(self, num_ranks: int = 1, *, step_s: float = 0.0, die: str = "", **environment: str) -> Job:
        """Begin the run, or go on with it. `step_s` (until `speed_up`) and `die` alter the job."""
        alterations = {"DRILL_STEP_S": str(step_s), "DRILL_FULL_SPEED": str(self._full_speed), "DRILL_DIE": die}
        alterations |= {"DRILL_RANKS": str(num_ranks), **environment}
        script = ALTERED_JOB if step_s or die or "DRILL_TIMES" in environment else "pretrain.py"
        with _environment(alterations):
            self.jobs.append(Job(self.run_dir, start_job(self.config, num_ranks=num_ranks, script=script)))
        return self.jobs[-1]

    def kill_all(self) -> None:
        """End what a drill that failed has left."""
        for job in self.jobs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.process.pid, signal.SIGKILL)

    def begin(self, num_ranks: int = 1, *, step_s: float = 0.0, die: str = "", **environment: str) -> Job:
        """Start a new run and journal its planned policies as soon as it exists."""
        job = self.start(num_ranks, step_s=step_s, die=die, **environment)
        self.wait_until_begun(job)
        self.plan()
        return job

    def wait_until_begun(self, job: Job) -> None:
        """Return once the run's first policy is committed."""
        deadline = time.monotonic() + TIMEOUT_S
        while not self.history().commits:
            assert time.monotonic() < deadline, "the run did not begin"
            if job.process.poll() is not None:
                raise AssertionError(f"the job ended early:\n{job.finish()[1][-3000:]}")
            time.sleep(0.05)

    def plan(self) -> None:
        """Journal the planned policies, as a controller does with policies that it accepted."""
        journal = Journal(self.run_dir / "journal", writer="controller")
        genesis = self.history().genesis
        for document in self.policies:
            journal.append(accept(document, genesis))


def new_run(folder: Path, store: Path, policies: Sequence[dict[str, Any]] = (), **changes: Any) -> DrillRun:
    """A run of quickstart's kind in `folder`: small model, 120 quick steps, a checkpoint every 10.

    `changes` are `section__key=value` of the configuration (tests/pretrain/tiny.py).
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"training__num_steps": 120, "training__micro_batch_rows": 2, "checkpoint__every": 10}
    schedule = {"evaluation__every": 40, "mixing__report_every": 10}
    tree = tiny_tree(folder, store, **{**sizes, **schedule, **changes})
    return DrillRun(folder, write_config(folder, tree), tuple(policies))


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Settings that processes started meanwhile inherit."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
