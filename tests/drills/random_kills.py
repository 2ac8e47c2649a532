"""One run that is killed again and again: random victims at random moments, the same command each time.

Nothing is repaired by hand: each attempt is the same job with the same configuration, and brings the mixing service
with it. Policies are submitted meanwhile, each until a controller has taken it.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from mixwright.data_mixing.entries import Commit
from mixwright.data_mixing.journal import read_entries
from mixwright.data_mixing.service import has_host
from tests.drills.drill_run import DrillRun, Job
from tests.drills.drill_service import Part, Service, Submission

Victim = Literal["rank", "leader", "launcher", "everything", "host", "controller", "gcs", "raylet"]
VICTIMS: dict[Victim, int] = {
    "rank": 2, "leader": 6, "launcher": 1, "everything": 2, "host": 1, "controller": 3, "gcs": 1, "raylet": 1,
}  # fmt: skip
"""How often each is drawn, relatively. `everything` is launcher, ranks, service and its Ray at once."""
NEEDS_TWO_RANKS = ("rank", "launcher")
TWO_RANKS = 0.1
"""How often the others run on two ranks; the start of two costs twice as much."""
WHILE_STARTING = 0.2
MOST_STEPS = 25
STEPS_PER_CYCLE = 35
"""Enough for all cycles: a cycle trains about 15 steps on average, and repeats up to 10 after a kill."""
STEP_S = 0.3
HANG_S = 300.0
"""No step may take longer to come, on an overloaded machine too: nearly all of it is the start of processes."""
POLL_S = 0.02
PARTS: tuple[Part, ...] = ("host", "controller", "gcs", "raylet")


@dataclass(frozen=True)
class Blow:
    """Who is killed in a cycle, and when: after `steps` steps on `num_ranks` ranks.

    `again_s`: the attempt that follows is killed too, so soon after its start. `mixture`: submitted just before.
    """

    victim: Victim
    num_ranks: int
    steps: int
    again_s: float | None
    mixture: dict[str, int] | None


def blows(seed: int, count: int) -> list[Blow]:
    """The cycles of a seed."""
    chance = random.Random(seed)
    return [_blow(chance) for _ in range(count)]


def _blow(chance: random.Random) -> Blow:
    victim = chance.choices(list(VICTIMS), list(VICTIMS.values()))[0]
    return Blow(
        victim=victim,
        num_ranks=2 if victim in NEEDS_TWO_RANKS or chance.random() < TWO_RANKS else 1,
        steps=chance.randint(1, MOST_STEPS),
        again_s=chance.uniform(0.2, 8.0) if chance.random() < WHILE_STARTING else None,
        mixture={name: chance.randint(1, 9) for name in ("letters", "numbers", "colours")}
        if chance.random() < 0.6
        else None,
    )


class StepClock:
    """Follows the step records of a run as they are written, by all attempts."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._offset = 0
        self.count = self.step = 0

    def look(self) -> int:
        """Records so far; `step` is the newest one's."""
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
            self._offset += len(whole) + len(newline)
            for line in whole.split(b"\n"):
                if line.startswith(b'{"kind": "step", "step": ') and line.endswith(b"}"):
                    self.count += 1
                    self.step = int(line.split(b",", 2)[1].split(b":")[1])
        return self.count


@dataclass(frozen=True)
class Outcome:
    """A cycle as it went: who was killed when, seconds until a step was done again, the longest wait."""

    victim: Victim
    num_ranks: int
    step: int
    recovery_s: float
    longest_wait_s: float

    def __str__(self) -> str:
        victim = f"{self.victim} of {self.num_ranks} rank(s)"
        return (
            f"{victim:24} at step {self.step:5}, a step again after {self.recovery_s:4.1f} s, "
            f"longest wait {self.longest_wait_s:4.1f} s"
        )


@dataclass
class RandomKills:
    """A run between its blows: the attempt that is under way and the policies on their way."""

    run: DrillRun
    say: Callable[[str], None]
    job: Job | None = None
    num_ranks: int = 1
    submissions: list[Submission] = field(default_factory=list)
    longest_wait_s: float = 0.0

    def __post_init__(self) -> None:
        self._service, self._clock = Service(self.run.run_dir), StepClock(self.run.run_dir)

    def cycle(self, blow: Blow, next_ranks: int) -> Outcome:
        """Go on with the run, hurt it, and see it do a step again; a new attempt has `next_ranks` ranks."""
        self.longest_wait_s = 0.0
        if self.job is None:
            self._start(blow.num_ranks)
        self._train(blow.steps)
        if blow.mixture is not None and self.run.run_dir.joinpath("journal", "00000003.json").exists():
            self.submissions.append(Submission(self.run.run_dir, {"kind": "static", "mixture": blow.mixture}))
        victim = self._present(blow.victim)
        self._clock.look()
        step, num_ranks, began = self._clock.step, self.num_ranks, time.monotonic()
        self._strike(victim)
        if self.job is None:
            self._start(next_ranks)
            if blow.again_s is not None:
                time.sleep(blow.again_s)
                self.job.kill()
                self._start(next_ranks)
        self._train(1)
        return Outcome(victim, num_ranks, step, time.monotonic() - began, self.longest_wait_s)

    def finish(self) -> str:
        """Let the run come to its end; the output of its last attempt."""
        for submission in self.submissions:
            submission.wait(HANG_S)
        if self.job is None:
            self._start(1)
        assert self.job is not None
        self.run.speed_up()
        return self.job.succeed()

    def _start(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.job = self.run.start(num_ranks, step_s=STEP_S)

    def _train(self, steps: int) -> None:
        """Until so many more steps are done; fails when one takes longer than HANG_S."""
        assert self.job is not None
        count = self._clock.look()
        wanted, news = count + steps, time.monotonic()
        while count < wanted:
            time.sleep(POLL_S)
            seen, now = self._clock.look(), time.monotonic()
            self.longest_wait_s = max(self.longest_wait_s, now - news)
            if seen > count:
                count, news = seen, now
            assert now - news < HANG_S, f"no step for {HANG_S:g} s:\n{self._output_of_hung_job()}"
            if self.job.process.poll() is not None and self._clock.look() < wanted:
                raise AssertionError(f"the job ended by itself: {self.job.finish()}")

    def _present(self, victim: Victim) -> Victim:
        """`victim`, once it is there; the leader instead of a service that will not come before the next attempt."""
        if victim not in PARTS:
            return victim
        deadline = time.monotonic() + HANG_S
        while self._service.part(victim) is None and time.monotonic() < deadline:
            if not has_host(self.run.run_dir) and self._clock.look():
                return "leader"
            time.sleep(POLL_S)
        return victim

    def _output_of_hung_job(self) -> str:
        assert self.job is not None
        os.killpg(self.job.process.pid, signal.SIGKILL)
        return self.job.finish()[1][-3000:]

    def _strike(self, victim: Victim) -> None:
        """kill -9; afterwards `job` is None when the trainer is gone."""
        assert self.job is not None
        if victim in PARTS:
            assert self._service.kill(victim)
            return
        if victim == "everything":
            for part in PARTS:
                self._service.kill(part)
        if victim in ("rank", "leader"):
            self._kill_rank(self.job, -1 if victim == "rank" else 0)
        elif victim == "launcher" and self.num_ranks > 1:
            self._kill_launcher(self.job)
        else:
            self.job.kill()
        self.job = None

    def _kill_rank(self, job: Job, index: int) -> None:
        """One rank; its launcher then ends the others and itself, which is waited for."""
        job.ranks()[index].kill()
        code, _ = job.finish()
        assert code != 0

    def _kill_launcher(self, job: Job) -> None:
        """The launcher; its ranks notice, write a checkpoint and end."""
        ranks = job.ranks()
        above = {process.pid: process for rank in ranks for process in rank.parents() if process.pid != os.getpid()}
        for process in above.values():
            if "deepspeed" in " ".join(process.cmdline()):
                process.kill()
        _, alive = psutil.wait_procs(ranks, timeout=HANG_S)
        assert not alive, "ranks train on without their launcher"
        job.process.communicate()


def assert_each_policy_counts_once(run: DrillRun, submissions: list[Submission]) -> None:
    """Each policy that was taken is journaled once and committed once."""
    service = Service(run.run_dir)
    committed = [e.body.policy_lsn for e in read_entries(run.run_dir / "journal") if isinstance(e.body, Commit)]
    for submission in submissions:
        (lsn,) = service.policies_of(submission.request_id)
        assert committed.count(lsn) == 1


def record(outcomes: list[Outcome]) -> dict[str, Any]:
    """Figures of all cycles for docs/reliability.md."""
    recovery = sorted(outcome.recovery_s for outcome in outcomes)
    victims: dict[str, int] = {}
    for outcome in outcomes:
        victims[outcome.victim] = victims.get(outcome.victim, 0) + 1
    return {
        "cycles": len(outcomes),
        "victims": victims,
        "median_recovery_s": recovery[len(recovery) // 2],
        "longest_recovery_s": recovery[-1],
        "longest_wait_s": max(outcome.longest_wait_s for outcome in outcomes),
    }
