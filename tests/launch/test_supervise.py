"""What a supervisor decides, from what it sees: worlds are sequences of sights, without Ray and without a clock."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from mixwright.launch.cluster_rank import CRASHED, INTERRUPTED, JOB_FAILED
from mixwright.launch.supervise import Action, Course, Limits, Sight, decide, postponed

LIMITS = Limits(restarts=3, first_pause_s=5, longest_pause_s=60, stall_s=600, unreachable_s=900)
RUNNING = Sight(now=0.0, status="RUNNING")


class World:
    """A course that is shown one sight after the other."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.course, self.limits, self.now = Course(), limits, 100.0

    def see(self, sight: Sight, after_s: float = 0.0) -> Action:
        self.now += after_s
        self.course, action = decide(self.course, replace(sight, now=self.now), self.limits)
        return action

    def submit(self) -> None:
        assert self.see(Sight(0.0), after_s=max(self.course.due - self.now, 0)).kind == "submit"

    def fail(self, step: int, code: int | None = CRASHED) -> Action:
        """An attempt that came to `step` and then failed."""
        self.submit()
        self.see(replace(RUNNING, step=step, moved_at=self.now))
        return self.see(Sight(0.0, status="FAILED", exit_code=code, step=step), after_s=10)


def test_a_run_that_is_done_is_submitted_once() -> None:
    world = World()
    world.submit()
    assert world.see(Sight(0.0, status="PENDING")).kind == "wait"
    assert world.see(RUNNING, after_s=50).kind == "wait"
    end = world.see(Sight(0.0, status="SUCCEEDED", exit_code=0), after_s=50)
    assert (end.kind, end.code, world.course.attempt) == ("end", 0, 1)


@pytest.mark.parametrize(("job_code", "code"), [(2, 2), (3, 3), (JOB_FAILED, 1), (127, 2), (126, 2)], ids=str)
def test_what_another_attempt_would_not_change_is_final(job_code: int, code: int) -> None:
    end = World().fail(step=5, code=job_code)
    assert (end.kind, end.code) == ("end", code)


@pytest.mark.parametrize("code", [1, CRASHED, INTERRUPTED, -9, -11, 134, None], ids=str)
def test_what_another_attempt_may_change_is_tried_again_after_a_pause(code: int | None) -> None:
    world = World()
    action = world.fail(step=5, code=code)
    assert action.kind == "wait"
    assert "the next attempt is in 5 s" in action.why
    assert world.see(Sight(0.0), after_s=4.9).kind == "wait"
    assert world.see(Sight(0.0), after_s=0.2).kind == "submit"
    assert world.course.attempt == 2


def test_pauses_double_up_to_a_limit_and_begin_anew_after_progress() -> None:
    world = World(replace(LIMITS, restarts=99))
    pauses = []
    for step in (10, 10, 7, 10, 10, 10, 10, 11, 11):
        world.fail(step)
        pauses.append(world.course.due - world.now)
    assert pauses == [5, 5, 10, 20, 40, 60, 60, 5, 5]


def test_attempts_that_bring_the_run_no_further_are_counted_in_a_row() -> None:
    world = World()
    for step in (20, 20, 18, 20):
        assert world.fail(step).kind == "wait"
    assert world.fail(21).kind == "wait"  # further by one step: the count begins anew
    for step in (21, 3, 21):
        assert world.fail(step).kind == "wait"
    end = world.fail(21)
    assert (end.kind, end.code) == ("end", 1)
    assert "4 attempts in a row brought the run no further" in end.why
    assert "the ranks were lost too often" in end.why


def test_a_job_that_never_tells_a_step_is_given_up_too() -> None:
    world = World()
    kinds = [world.fail(-1).kind for _ in range(4)]
    assert kinds == ["wait", "wait", "wait", "end"]


def test_a_user_who_stops_the_job_ends_the_supervisor() -> None:
    world = World()
    world.submit()
    world.see(replace(RUNNING, step=3, moved_at=world.now))
    end = world.see(Sight(0.0, status="STOPPED", step=3))
    assert (end.kind, end.code) == ("end", INTERRUPTED)


def test_a_stalled_job_is_stopped_once_and_sent_again() -> None:
    world = World()
    world.submit()
    moved = replace(RUNNING, step=3, moved_at=world.now)
    assert world.see(moved, after_s=600).kind == "wait"
    assert world.see(moved, after_s=1).kind == "stop"
    assert world.see(moved, after_s=100).kind == "wait"  # it is being stopped
    action = world.see(Sight(0.0, status="STOPPED", step=3, moved_at=moved.moved_at), after_s=1)
    assert action.kind == "wait"
    assert "no progress for 10 min" in action.why
    world.submit()
    end = world.see(Sight(0.0, status="STOPPED", step=3))
    assert (end.kind, end.code) == ("end", INTERRUPTED), "the second stop was a user's"


def test_jobs_that_wait_for_the_cluster_or_have_not_begun_are_no_stalls() -> None:
    world = World()
    world.submit()
    assert world.see(Sight(0.0, status="PENDING"), after_s=86_400).kind == "wait"
    assert world.see(RUNNING, after_s=86_400).kind == "wait"
    assert World(replace(LIMITS, stall_s=0)).see(replace(RUNNING, step=1, moved_at=0.0), after_s=1e6).kind != "stop"


def test_a_cluster_that_does_not_answer_is_waited_for_and_then_given_up() -> None:
    world = World()
    world.submit()
    world.see(RUNNING)
    away = Sight(0.0, is_reachable=False)
    assert world.see(away, after_s=500).kind == "wait"
    assert world.see(RUNNING, after_s=10).kind == "wait"
    assert world.see(away, after_s=890).kind == "wait"  # counted from the last answer
    end = world.see(away, after_s=20)
    assert (end.kind, end.code) == ("end", 3)
    assert "15 min" in end.why


def test_while_the_cluster_did_not_answer_nothing_could_be_seen_to_move() -> None:
    world = World()
    world.submit()
    moved = replace(RUNNING, step=3, moved_at=world.now)
    world.see(moved)
    world.see(Sight(0.0, is_reachable=False), after_s=800)
    assert world.see(moved, after_s=10).kind == "wait"
    assert world.see(moved, after_s=590).kind == "wait"
    assert world.see(moved, after_s=20).kind == "stop"


def test_a_new_head_knows_no_job_so_the_run_is_sent_again() -> None:
    world = World()
    world.submit()
    world.see(replace(RUNNING, step=30, moved_at=world.now))
    world.see(Sight(0.0, is_reachable=False), after_s=100)
    action = world.see(Sight(0.0, status=None, step=30), after_s=5)
    assert action.kind == "wait"
    assert "its head was started anew" in action.why
    assert world.see(Sight(0.0), after_s=5).kind == "submit"
    assert world.course.fruitless == 0


def test_a_submission_that_did_not_arrive_is_no_attempt() -> None:
    world = World()
    world.submit()
    world.course = postponed(world.course, world.now, LIMITS)
    assert world.see(Sight(0.0), after_s=4).kind == "wait"
    assert world.see(Sight(0.0), after_s=2).kind == "submit"
    assert (world.course.attempt, world.course.fruitless) == (1, 0)


def test_a_cluster_that_answers_but_takes_no_job_is_given_up_too() -> None:
    world = World()
    actions = []
    while not actions or actions[-1].kind != "end":
        actions.append(world.see(Sight(0.0), after_s=60))
        if actions[-1].kind == "submit":
            world.course = postponed(world.course, world.now, LIMITS)
    assert (actions[-1].code, len(actions)) == (3, 17)  # refused first at 60 s, given up after more than 15 min
    assert "has taken no job for 16 min" in actions[-1].why


def test_a_job_that_was_found_running_is_followed_and_its_steps_count() -> None:
    world = World()
    world.submit()
    world.course = replace(world.course, attempt=7)
    world.see(replace(RUNNING, step=40, moved_at=world.now))
    world.see(Sight(0.0, status="FAILED", exit_code=CRASHED, step=40))
    assert world.fail(40).kind == "wait"
    assert (world.course.attempt, world.course.fruitless) == (8, 1)


def test_whatever_is_seen_there_is_one_job_at_a_time_and_an_end() -> None:
    """Random worlds: nothing is sent while a job may be alive, nothing stopped twice, and crashes come to an end."""
    chance = random.Random(5)
    for _ in range(300):
        world, is_sent, is_stopped = World(), False, False
        for _ in range(2000):
            status = chance.choice(["PENDING", "RUNNING", "RUNNING", "FAILED", "STOPPED", None]) if is_sent else None
            code = chance.choice([1, CRASHED, INTERRUPTED, -9, None])
            away = chance.random() < 0.1
            moved = world.now - chance.choice([0, 700])
            action = world.see(
                Sight(0.0, not away, status, code, step=3, moved_at=moved), after_s=chance.uniform(1, 90)
            )
            if action.kind == "submit":
                assert not is_sent
                is_sent, is_stopped = True, False
            elif action.kind == "stop":
                assert is_sent
                assert not is_stopped
                is_stopped = True
            elif action.kind == "end":
                break
            elif is_sent and not away and status not in ("PENDING", "RUNNING"):
                is_sent = False
        else:
            raise AssertionError("no end")
