"""Ranks that are killed, one or all of them, at any moment and at the worst ones; resumes on other numbers of ranks."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from tests.drills.drill_run import DrillRun
from tests.drills.undisturbed import References, assert_as_undisturbed

pytestmark = pytest.mark.drill

MakeRun = Callable[..., DrillRun]
DOMAINS = ("letters", "numbers", "colours")


def test_the_only_rank_is_killed_at_a_random_step(
    make_run: MakeRun, references: References, record_property: Callable[[str, Any], None]
) -> None:
    """kill -9 of the one rank at a step between 15 and 100; the same command goes on from the last checkpoint.

    Promised: rows, order and final loss of the run that was never killed, bit for bit.
    """
    run = make_run()
    job = run.begin()
    job.wait_for_step(random.Random(0).randint(15, 100))
    job.kill()
    killed, last = time.monotonic(), run.last_step()
    job = run.start()
    job.wait_for_step(last + 1)
    record_property("recovery_s", time.monotonic() - killed)
    assert "resuming after step" in job.succeed()
    assert_as_undisturbed(run, references.of(run))


@pytest.mark.parametrize("moment", [pytest.param("commit-due", marks=pytest.mark.long), "commit-written"])
def test_the_leader_dies_around_a_commit(make_run: MakeRun, references: References, moment: str) -> None:
    """The leader ends by SIGKILL just before, or just after, a COMMIT is in the journal; no rank has heard of it.

    Promised: it takes effect once, at its step.
    """
    run = make_run()
    job = run.begin(die=moment)
    assert job.finish()[0] == -9
    assert len(run.history().commits) == (2 if moment == "commit-written" else 1)
    run.start().succeed()
    assert_as_undisturbed(run, references.of(run))
    assert [commit.effective_step for commit in run.history().commits] == [0, 41, 85]


def test_the_leader_dies_when_a_checkpoint_is_complete(make_run: MakeRun, references: References) -> None:
    """SIGKILL with a checkpoint on disk that the journal does not know, while the leader's thread sleeps.

    Promised: the steps before it are not done again, and the losses of each are in the journal.
    """
    run = make_run(mixing__service="none")
    job = run.begin(die="checkpoint")
    assert job.finish()[0] == -9
    assert run.history().checkpoints[-1].step == 10
    assert run.history().last_step == 19, "the losses of the steps up to the checkpoint"
    assert "resuming after step 20" in run.start().succeed()
    assert_as_undisturbed(run, references.of(run))


@pytest.mark.long
@pytest.mark.parametrize("moment", ["commit-due", "commit-written"])
def test_the_leader_of_two_ranks_dies_around_a_commit(make_run: MakeRun, references: References, moment: str) -> None:
    """As above, with a second rank that waits in a collective for the leader.

    Promised: the other rank ends too, without help; the commit takes effect once, at its step, on both.
    """
    run = make_run()
    job = run.begin(2, die=moment)
    assert job.finish()[0] != 0
    run.start(2).succeed()
    assert_as_undisturbed(run, references.of(run, 2))
    assert [commit.effective_step for commit in run.history().commits] == [0, 41, 85]


@pytest.mark.long
def test_one_of_two_ranks_is_killed(
    make_run: MakeRun, references: References, record_property: Callable[[str, Any], None]
) -> None:
    """kill -9 of rank 1 of 2 while both train; the leader is in a collective with it.

    Promised: no rank goes on alone, all processes end within 30 s, and the run goes on with the same rows, on one rank.
    """
    run = make_run()
    job = run.begin(2, step_s=0.02)
    job.wait_for_step(30)
    leader, other = job.ranks()
    other.kill()
    killed = time.monotonic()
    code, _ = job.finish()
    record_property("longest_wait_s", time.monotonic() - killed)
    assert code != 0
    assert time.monotonic() - killed < 30
    assert not psutil.pid_exists(leader.pid)
    run.start().succeed()
    assert_as_undisturbed(run, references.of(run), same_ranks=False)


@pytest.mark.long
def test_the_launcher_alone_is_killed(
    make_run: MakeRun, references: References, record_property: Callable[[str, Any], None]
) -> None:
    """kill -9 of both processes of the deepspeed launcher; its two ranks stay behind.

    Promised: they write a checkpoint and end by themselves, and the same command, given at once, waits for them.
    """
    run = make_run()
    job = run.begin(2, step_s=0.2)
    job.wait_for_step(15)
    ranks = job.ranks()
    for process in {process.pid: process for rank in ranks for process in rank.parents()}.values():
        if "deepspeed" in " ".join(process.cmdline()):
            process.kill()
    killed = time.monotonic()
    assert psutil.wait_procs(ranks, timeout=60)[1] == []
    record_property("longest_wait_s", time.monotonic() - killed)
    assert f"resuming after step {run.history().checkpoints[-1].step} " in run.start(2).succeed()
    assert_as_undisturbed(run, references.of(run, 2))


@pytest.mark.long
def test_a_run_moves_over_one_two_and_four_ranks(make_run: MakeRun, references: References) -> None:
    """kill -9 of everything on 1, 2, 4, 2 and 1 ranks in turn, each at a step of its own.

    Promised: order does not depend on the number of ranks; losses agree to rounding.
    """
    run = make_run()
    chance, last = random.Random(4), 0
    for num_ranks in (1, 2, 4, 2):
        job = (run.start if last else run.begin)(num_ranks)
        job.wait_for_step(last := last + chance.randint(12, 25))
        job.kill()
    run.start(1).succeed()
    assert_as_undisturbed(run, references.of(run), same_ranks=False)


@pytest.mark.long
def test_a_second_trainer_is_refused_and_changes_nothing(make_run: MakeRun, references: References) -> None:
    """The same command is started again while the run is under way.

    Promised: it ends with exit code 2 and says who works on the run; the run does not notice.
    """
    run = make_run()
    job = run.begin(step_s=0.05)
    job.wait_for_step(5)
    code, output = run.start().finish()
    assert (code, f"another trainer is working on this run (process {job.process.pid} on " in output) == (2, True)
    job.succeed()
    assert_as_undisturbed(run, references.of(run))


def test_forty_policy_changes_at_random_steps(make_run: MakeRun, references: References) -> None:
    """Forty changes of the mixture at seeded random steps of 120, and kill -9 of the one rank in the middle of them.

    Promised: each takes effect at its step; every domain keeps its fractional credit, so that no row is lost.
    """
    chance = random.Random(40)
    policies = [
        {"kind": "static", "mixture": {name: chance.randint(1, 9) for name in DOMAINS}, "at_step": step}
        for step in sorted(chance.sample(range(12, 118), 40))
    ]
    run = make_run(policies=policies)
    job = run.begin()
    job.wait_for_step(chance.randint(40, 80))
    job.kill()
    run.start().succeed()
    assert_as_undisturbed(run, references.of(run))
    assert [commit.effective_step for commit in run.history().commits] == [0, *(p["at_step"] for p in policies)]
