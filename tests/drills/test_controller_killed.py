"""The controller, its Ray and its host die, freeze or double while a run trains."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mixwright.data_mixing.control import MixingController
from mixwright.data_mixing.entries import Decision
from mixwright.data_mixing.journal import read_entries
from mixwright.data_mixing.sandbox import ALLOW_LIST
from mixwright.data_mixing.service import has_host
from tests.data_mixing.live_run import wait_until
from tests.drills.drill_run import DrillRun
from tests.drills.drill_service import STEP_S, Part, Service, Submission, end, end_with_both, longest_step_s, slow_run
from tests.drills.undisturbed import References

pytestmark = [pytest.mark.drill, pytest.mark.ray]

MakeRun = Callable[..., DrillRun]
LETTERS = {"kind": "static", "mixture": {"letters": 1, "numbers": 1}}
COLOURS = {"kind": "static", "mixture": {"colours": 1}}
HOST_GIVES_UP_S = 40.0
"""A host pings its controller every 5 s and waits 10 s for each answer, 30 s in all."""
ONLINE = {"kind": "user", "round_steps": 10, "evaluate": False, "guard": {"timeout_s": 60, "max_l1_change": 2}}
LAB = """
import os, signal, time

def turn(window):
    arms = len(window["arms"])
    return {"shares": [1.0 + 3.0 * (window["decision"] % arms == index) for index in range(arms)], "state": {}}

def kills_once(params, window, state):
    if not os.path.exists(params["marker"]):
        open(params["marker"], "w").close()
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    return turn(window)

def misbehaves(params, window, state):
    match window["decision"]:
        case 0: raise KeyError("no such thing")
        case 1: time.sleep(600)
        case 2: return {"shares": [0.0] * (1 << 28)}
        case 3: return {"shares": [float("nan")] * len(window["arms"])}
    return turn(window)
"""


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """A folder with users' policies."""
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "drill_policies.py").write_text(LAB)
    return tmp_path / "lab"


def lab_environment(lab: Path) -> dict[str, str]:
    """Settings of a service that may run the lab's policies."""
    path = os.pathsep.join(filter(None, [str(lab), os.environ.get("PYTHONPATH", "")]))
    return {ALLOW_LIST: "drill_policies:*", "PYTHONPATH": path}


def decisions(run: DrillRun) -> list[Decision]:
    return [e.body for e in read_entries(run.run_dir / "journal") if isinstance(e.body, Decision)]


def test_the_controller_is_killed_idle_and_while_it_answers(
    make_run: MakeRun, serve: Callable[..., Service], references: References
) -> None:
    """kill -9 of the controller's process twice: with nothing to do, and when a policy that was just sent is in the
    journal while its sender has no answer yet.

    Promised: Ray brings it back within seconds; each policy counts once; training does not wait.
    """
    run = slow_run(make_run)
    job = run.start(step_s=STEP_S)
    service = serve(run, job)
    began = run.last_step() + 1
    assert service.kill("controller")
    first = Submission(run.run_dir, LETTERS)
    first.wait(60)
    second = Submission(run.run_dir, COLOURS)
    wait_until(lambda: service.policies_of(second.request_id))
    assert service.kill("controller")
    second.wait(60)
    end_with_both(run, job, service, references, (first, second))
    assert longest_step_s(run, began, run.num_steps) < 5


@pytest.mark.long
def test_the_controller_is_killed_while_it_decides(
    make_run: MakeRun, serve: Callable[..., Service], references: References, lab: Path
) -> None:
    """A user's policy, asked for its first decision, ends the controller that asks with SIGKILL; ranks wait (`sync`).

    Promised: the controller that comes back decides from the same losses at the same steps, once; no PASS is needed.
    """
    run = slow_run(make_run)
    job = run.start(step_s=STEP_S)
    serve(run, job, **lab_environment(lab))
    kills_once = {"path": "drill_policies:kills_once", "params": {"marker": str(lab / "killed")}}
    Submission(run.run_dir, ONLINE | kills_once).wait(60)
    wait_until(lambda: len(decisions(run)) == 2)
    assert (lab / "killed").exists()
    end(run, job, references)
    steps = [decision.step for decision in decisions(run)]
    assert steps == sorted(set(steps))
    assert not run.history().passes
    assert {decision.action for decision in decisions(run)} == {"propose"}


@pytest.mark.long
def test_a_users_policy_raises_hangs_hoards_and_answers_nan(
    make_run: MakeRun, serve: Callable[..., Service], references: References, lab: Path
) -> None:
    """A user's policy of a run under way raises in its first decision, hangs in the second, asks for 2 GiB in the
    third, answers NaN in the fourth, and then decides in order.

    Promised: each costs one held decision with its reason, the hang also one wait of `guard.timeout_s`; the controller
    lives, and the run obeys the fifth. Both sides wait equally long for the one that hangs: either may give up first.
    """
    run = slow_run(make_run)
    job = run.start(step_s=STEP_S)
    service = serve(run, job, **lab_environment(lab))
    controller = service.part("controller")
    document = ONLINE | {"path": "drill_policies:misbehaves", "memory_mib": 512, "guard": {"timeout_s": 8}}
    Submission(run.run_dir, document).wait(60)
    wait_until(lambda: len(decisions(run)) == 5, timeout_s=120)
    assert service.part("controller") == controller
    end(run, job, references)
    made = decisions(run)[:5]
    assert [decision.action for decision in made] == ["hold"] * 4 + ["propose"]
    for decision, reason in zip(made, ("KeyError", "no answer within 8 s", "more than 512 MiB", "float"), strict=False):
        assert reason in decision.reason
    assert [step for _, step in run.history().passes] in ([], [made[1].step])


@pytest.mark.long
@pytest.mark.parametrize("frozen_s", [10, 90])
def test_the_controller_is_frozen(
    make_run: MakeRun, serve: Callable[..., Service], references: References, frozen_s: int
) -> None:
    """SIGSTOP of the controller for 10 s, and for 90 s, of which its host waits for 30 and then ends the service.

    Promised: training does not wait; a policy that is sent meanwhile counts once, taken by the controller that thaws or
    by the one of `mix up`; the frozen one writes nothing when it thaws too late.
    """
    run = slow_run(make_run)
    job = run.start(step_s=max(STEP_S, frozen_s / 80))
    service = serve(run, job)
    controller, began = service.part("controller"), run.last_step() + 1
    assert controller is not None
    controller.send_signal(signal.SIGSTOP)
    submission = Submission(run.run_dir, LETTERS)
    time.sleep(frozen_s)
    if frozen_s > HOST_GIVES_UP_S:
        assert not service.is_up()
        service.up()
        submission.wait(60)
    with contextlib.suppress(psutil.NoSuchProcess):
        controller.send_signal(signal.SIGCONT)
    submission.wait(60)
    wait_until(lambda: len(run.history().commits) == 2)
    end(run, job, references)
    assert len(service.policies_of(submission.request_id)) == 1
    assert longest_step_s(run, began, run.num_steps) < max(STEP_S, frozen_s / 80) + 3


@pytest.mark.long
@pytest.mark.parametrize("part", ["gcs", "raylet"])
def test_rays_gcs_or_raylet_is_killed(
    make_run: MakeRun, serve: Callable[..., Service], references: References, part: Part
) -> None:
    """kill -9 of the GCS, or of the raylet, of the service's private Ray, after one policy and before another.

    Promised: training goes on under what is committed; the host ends within its bounds; `mix up` is all it takes.
    """
    run = slow_run(make_run)
    job = run.start(step_s=1.0)
    service = serve(run, job)
    first = Submission(run.run_dir, LETTERS)
    first.wait(60)
    began = run.last_step() + 1
    assert service.kill(part)
    wait_until(lambda: not has_host(run.run_dir), timeout_s=HOST_GIVES_UP_S + 30)
    service.up()
    second = Submission(run.run_dir, COLOURS)
    second.wait(60)
    end_with_both(run, job, service, references, (first, second))
    assert longest_step_s(run, began, run.num_steps) < 5


@pytest.mark.long
def test_a_second_controller_takes_over(
    make_run: MakeRun, serve: Callable[..., Service], references: References
) -> None:
    """A second controller opens the journal of a run whose service is up, and both are sent policies.

    Promised: the newer lease rules; the older one writes no entry more and its service ends; training does not notice.
    """
    run = slow_run(make_run)
    job = run.start(step_s=STEP_S)
    service = serve(run, job)
    newer = MixingController(run.run_dir / "journal", "controller-newer")
    lease = run.history().last_lsn
    older = Submission(run.run_dir, LETTERS)
    newer.submit(COLOURS, "newer")
    wait_until(lambda: not has_host(run.run_dir))
    older.give_up()
    assert not older.is_accepted
    wait_until(lambda: len(run.history().commits) == 2)
    end(run, job, references)
    assert (service.policies_of(older.request_id), len(service.policies_of("newer"))) == ([], 1)
    writers = {entry.writer for entry in read_entries(run.run_dir / "journal", lease + 1)}
    assert writers == {"leader", "controller-newer"}
