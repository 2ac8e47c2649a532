"""Keeps a run going on a cluster: what a supervisor decides, from what it sees. Data in, data out; no Ray, no clock.

A job runs once and dies with the head of its cluster. The supervisor sends the same manifest again, after a pause that
doubles with every attempt that brought the run no further, and gives up after too many of those. The run itself is on
storage, so an attempt is a matter of its last checkpoint, and nothing is lost by one too many.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from typing import Literal

from mixwright.launch.cluster_rank import CRASHED, INTERRUPTED, JOB_FAILED
from mixwright.launch.jobs_api import LIVE, Status

DONE, FAILED, BAD_INPUT, UNREACHABLE = 0, 1, 2, 3
"""Exit codes of `mixwright submit`, beside INTERRUPTED: stopped by a user, resumable."""
NO_SUCH_COMMAND = (126, 127)
STEP_UNKNOWN = -1

Kind = Literal["wait", "submit", "stop", "end"]


@dataclass(frozen=True)
class Limits:
    """When to do what. `restarts`: attempts in a row that brought the run no further. `stall_s` 0: never."""

    restarts: int = 5
    first_pause_s: float = 5.0
    longest_pause_s: float = 300.0
    stall_s: float = 1800.0
    unreachable_s: float = 3600.0


@dataclass(frozen=True)
class Sight:
    """What is seen at an instant. `status` None: the cluster knows no such job.

    `step` is the newest in the attempt's log, `moved_at` when its log last told progress, if it ever did.
    """

    now: float
    is_reachable: bool = True
    status: Status | None = None
    exit_code: int | None = None
    step: int = STEP_UNKNOWN
    moved_at: float | None = None


@dataclass(frozen=True)
class Course:
    """What the supervisor remembers of a run. `attempt` counts jobs; `due` is when the next one is to be sent.

    `fruitless` counts attempts in a row that did not get beyond `step_before`, the best step when they began.
    `still_from`: a lack of progress before it means nothing. `refused_since`: since when the cluster, if it answers,
    has taken no job.
    """

    attempt: int = 0
    is_submitted: bool = False
    due: float = 0.0
    best_step: int = STEP_UNKNOWN
    step_before: int = STEP_UNKNOWN
    fruitless: int = 0
    answered_at: float | None = None
    is_blind: bool = False
    still_from: float = 0.0
    refused_since: float | None = None
    stop_reason: str = ""


@dataclass(frozen=True)
class Action:
    """What to do now, and why, for people. `code` is the exit code of an `end`."""

    kind: Kind
    why: str = ""
    code: int = DONE


WAIT = Action("wait")


def decide(course: Course, sight: Sight, limits: Limits) -> tuple[Course, Action]:
    """The next action, and the course with it taken."""
    if not sight.is_reachable:
        return _out_of_sight(course, sight, limits)
    if course.is_blind:
        # Nothing could be seen to move while the cluster did not answer.
        course = replace(course, is_blind=False, still_from=sight.now)
    course = replace(course, answered_at=sight.now, best_step=max(course.best_step, sight.step))
    if not course.is_submitted:
        return _submit_when_due(course, sight, limits)
    course = replace(course, refused_since=None)
    if sight.status in LIVE:
        return _watch(course, sight, limits)
    return _after(course, sight, limits)


def postponed(course: Course, now: float, limits: Limits) -> Course:
    """The course after a submission that the cluster did not take."""
    since = now if course.refused_since is None else course.refused_since
    due = now + limits.first_pause_s
    return replace(course, attempt=course.attempt - 1, is_submitted=False, due=due, refused_since=since)


def _out_of_sight(course: Course, sight: Sight, limits: Limits) -> tuple[Course, Action]:
    since = sight.now if course.answered_at is None else course.answered_at
    course = replace(course, answered_at=since, is_blind=True)
    if sight.now - since > limits.unreachable_s:
        return course, Action("end", f"the cluster has not answered for {_minutes(sight.now - since)}", UNREACHABLE)
    return course, WAIT


def _submit_when_due(course: Course, sight: Sight, limits: Limits) -> tuple[Course, Action]:
    since = sight.now if course.refused_since is None else course.refused_since
    if sight.now - since > limits.unreachable_s:
        return course, Action("end", f"the cluster has taken no job for {_minutes(sight.now - since)}", UNREACHABLE)
    if sight.now < course.due:
        return course, WAIT
    attempt = course.attempt + 1
    sent = replace(course, attempt=attempt, is_submitted=True, step_before=course.best_step, stop_reason="")
    return sent, Action("submit", f"attempt {attempt}")


def _watch(course: Course, sight: Sight, limits: Limits) -> tuple[Course, Action]:
    """A job that waits for the cluster, or has told no progress yet, is never stopped for that."""
    if sight.moved_at is None or not limits.stall_s or course.stop_reason:
        return course, WAIT
    still = sight.now - max(sight.moved_at, course.still_from)
    if still <= limits.stall_s:
        return course, WAIT
    why = f"no progress for {_minutes(still)}"
    return replace(course, stop_reason=why), Action("stop", why)


def _after(course: Course, sight: Sight, limits: Limits) -> tuple[Course, Action]:
    """What follows a job that has ended, or is gone."""
    match sight.status:
        case None:
            return _again(course, sight, limits, "the cluster no longer knows the job: its head was started anew")
        case "SUCCEEDED":
            return course, Action("end", "done", DONE)
        case "STOPPED" if not course.stop_reason:
            return course, Action("end", "stopped; the same command goes on from its checkpoint", INTERRUPTED)
        case "STOPPED":
            return _again(course, sight, limits, course.stop_reason)
        case _:
            return _after_failure(course, sight, limits)


def _after_failure(course: Course, sight: Sight, limits: Limits) -> tuple[Course, Action]:
    match sight.exit_code:
        case 2 | 3 as code:
            return course, Action("end", "the job was refused, see its log", code)
        case code if code in NO_SUCH_COMMAND:
            return course, Action("end", "the cluster has no such interpreter: give it with --python", BAD_INPUT)
        case code if code == JOB_FAILED:
            return course, Action("end", "training failed, see the job's log", FAILED)
        case code:
            return _again(course, sight, limits, describe(code))


def _again(course: Course, sight: Sight, limits: Limits, why: str) -> tuple[Course, Action]:
    fruitless = 0 if course.best_step > course.step_before else course.fruitless + 1
    course = replace(course, is_submitted=False, fruitless=fruitless)
    if fruitless > limits.restarts:
        reason = f"{fruitless} attempts in a row brought the run no further; the last one: {why}"
        return course, Action("end", reason, FAILED)
    pause_s = min(limits.first_pause_s * 2.0 ** max(fruitless - 1, 0), limits.longest_pause_s)
    return replace(course, due=sight.now + pause_s), Action("wait", f"{why}; the next attempt is in {pause_s:g} s")


def describe(code: int | None) -> str:
    """How a job ended, from its exit code."""
    if code is None:
        return "the job's process was lost"
    if code == INTERRUPTED:
        return "the job was interrupted after a checkpoint"
    if code == CRASHED:
        return "the ranks were lost too often"
    if code < 0:
        return f"the job was ended by {signal.Signals(-code).name}"
    return f"the job ended with exit code {code}"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"
