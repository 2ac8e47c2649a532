"""The controller over a journal, without a Ray cluster: what it records, and what it never does twice."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from typing import Any

import pytest

from mixwright.data_mixing import controller
from mixwright.data_mixing.answers import failure, unpack
from mixwright.data_mixing.control import JOURNAL_S, MixingController
from mixwright.data_mixing.controller import ControllerActor
from mixwright.data_mixing.entries import Reject
from mixwright.data_mixing.errors import (
    AccessRefused,
    JournalConflict,
    JournalError,
    PlanMismatch,
    PolicyRejected,
    ServiceUnavailable,
)
from mixwright.data_mixing.journal import Journal
from mixwright.data_mixing.run_token import token_digest
from tests.data_mixing.run_cases import TrainerSide

CODE = {"kind": "static", "mixture": {"code": 1}, "why": "more code", "author": "ann"}


@pytest.fixture
def trainer(tmp_path: Path) -> TrainerSide:
    return TrainerSide(tmp_path / "exp")


def controller_of(trainer: TrainerSide, holder: str = "controller-a") -> MixingController:
    return MixingController(trainer.run_dir / "journal", holder)


def test_a_policy_is_journaled_with_its_program_author_and_reason(trainer: TrainerSide) -> None:
    lsn = controller_of(trainer).submit(CODE, "r1")["lsn"]
    policy = trainer.read().policies[lsn]
    assert (policy.author, policy.why, policy.request_id) == ("ann", "more code", "r1")
    assert trainer.history.pending() == [(lsn, policy)]


def test_the_answer_says_which_domains_get_nothing(trainer: TrainerSide) -> None:
    assert controller_of(trainer).submit(CODE)["remarks"] == ["these domains get 0: wiki, web-a, web-b"]


def test_a_refused_policy_leaves_a_reject_entry_and_the_old_policy(trainer: TrainerSide) -> None:
    document = {"kind": "static", "mixture": {"cod": 1}, "author": "ann"}
    with pytest.raises(PolicyRejected, match="did you mean 'code'"):
        controller_of(trainer).submit(document, "r1")
    entry = Journal(trainer.run_dir / "journal", "reader").poll()[-1]
    assert entry.body == Reject(
        document=document, reason="mixture.cod: no such domain; did you mean 'code'?", author="ann", request_id="r1"
    )
    assert trainer.read().pending() == []


@pytest.mark.parametrize(
    "document", [None, 3, "kind: [", "&a {b: *a}", {"kind": "static", "mixture": {"code": float("nan")}}]
)
def test_garbage_is_rejected_and_recorded(trainer: TrainerSide, document: Any) -> None:
    with pytest.raises(PolicyRejected):
        controller_of(trainer).submit(document)
    assert trainer.types()[-1] == "REJECT"


def test_the_record_of_a_refusal_shows_what_json_cannot_hold(trainer: TrainerSide) -> None:
    with pytest.raises(PolicyRejected):
        controller_of(trainer).submit({"kind": "static", "mixture": {"code": float("nan")}})
    body = Journal(trainer.run_dir / "journal", "reader").poll()[-1].body
    assert isinstance(body, Reject)
    assert body.document == "{'kind': 'static', 'mixture': {'code': nan}}"


def test_a_request_that_is_sent_twice_is_journaled_once(trainer: TrainerSide) -> None:
    controller = controller_of(trainer)
    assert controller.submit(CODE, "r1") == controller.submit(CODE, "r1")
    with pytest.raises(PolicyRejected) as first:
        controller.submit({"kind": "no"}, "r2")
    with pytest.raises(PolicyRejected) as second:
        controller.submit({"kind": "no"}, "r2")
    assert str(first.value) == str(second.value)
    lsn = controller.submit(CODE, "r3")["lsn"]
    assert controller.cancel(lsn, "r4") == controller.cancel(lsn, "r4")
    assert trainer.types()[4:] == ["LEASE", "POLICY", "REJECT", "POLICY", "CANCEL"]


def test_a_restarted_controller_knows_the_requests_of_the_killed_one(trainer: TrainerSide) -> None:
    answer = controller_of(trainer).submit(CODE, "r1")
    assert controller_of(trainer).submit(CODE, "r1") == answer
    assert trainer.types().count("POLICY") == 2  # the run's first one and this


def test_a_request_id_of_another_verb_is_refused(trainer: TrainerSide) -> None:
    controller = controller_of(trainer)
    controller.cancel(controller.submit(CODE, "r1")["lsn"], "r2")
    with pytest.raises(PolicyRejected, match="choose another id"):
        controller.submit(CODE, "r2")


def test_requests_without_an_id_are_never_taken_for_each_other(trainer: TrainerSide) -> None:
    controller = controller_of(trainer)
    assert controller.submit(CODE)["lsn"] != controller.submit(CODE)["lsn"]


def test_a_pending_policy_can_be_cancelled_and_a_committed_one_not(trainer: TrainerSide) -> None:
    controller = controller_of(trainer)
    pending, committed = controller.submit(CODE)["lsn"], controller.submit(CODE)["lsn"]
    trainer.commit(committed, 20)
    controller.cancel(pending)
    assert trainer.read().pending() == []
    with pytest.raises(PolicyRejected, match=f"policy {committed} is committed from step 20 on"):
        controller.cancel(committed)
    with pytest.raises(PolicyRejected, match="waits for nothing"):
        controller.cancel(pending)
    with pytest.raises(PolicyRejected, match="policy 99 does not exist"):
        controller.cancel(99)


def test_a_shadow_is_recorded_and_waits_for_nothing(trainer: TrainerSide) -> None:
    lsn = controller_of(trainer).submit(CODE | {"shadow": True})["lsn"]
    assert trainer.read().policies[lsn].shadow
    assert trainer.history.pending() == []


def test_status_is_what_the_journal_tells(trainer: TrainerSide) -> None:
    controller = controller_of(trainer)
    lsn = controller.submit(CODE)["lsn"]
    trainer.commit(lsn, 20)
    waiting = controller.submit(CODE | {"at_step": 500})["lsn"]
    committed = controller.submit(CODE | {"at_step": 90})["lsn"]
    trainer.commit(committed, 90)
    trainer.report(last_step=29)
    status = controller.status()
    assert (status["state"], status["next_step"]) == ("running", 30)
    assert (status["policy"]["lsn"], status["policy"]["effective_step"]) == (lsn, 20)
    assert [(policy["lsn"], policy["at_step"], policy["effective_step"]) for policy in status["pending"]] == [
        (committed, 90, 90),
        (waiting, 500, None),
    ]
    code, wiki = status["domains"][:2]
    assert (code["proportion"], wiki["proportion"], code["loss"], wiki["loss"]) == (1.0, 0.0, 2.5, None)
    assert sum(domain["num_tokens"] for domain in status["domains"]) == 30 * 8 * 64


def test_history_is_plain_data_from_an_entry_on(trainer: TrainerSide) -> None:
    controller = controller_of(trainer)
    controller.submit(CODE)
    entries = controller.history(since_lsn=3)["entries"]
    assert [(entry["lsn"], entry["type"]) for entry in entries] == [(3, "COMMIT"), (4, "LEASE"), (5, "POLICY")]


def test_a_finished_run_takes_no_policies(trainer: TrainerSide) -> None:
    controller = controller_of(trainer)
    trainer.end()
    with pytest.raises(PolicyRejected, match="the run is complete after step 1000"):
        controller.submit(CODE)
    assert controller.ping()["is_over"]


def test_before_the_run_begins_the_controller_answers_and_takes_nothing(tmp_path: Path) -> None:
    controller = MixingController(tmp_path / "exp" / "journal", "controller-a")
    assert controller.ping()["lsn"] == -1
    with pytest.raises(ServiceUnavailable, match="has not begun"):
        controller.submit(CODE)
    trainer = TrainerSide(tmp_path / "exp")
    assert controller.submit(CODE)["lsn"] == 5
    assert trainer.types() == ["GENESIS", "LEASE", "POLICY", "COMMIT", "LEASE", "POLICY"]


def test_of_two_controllers_the_older_one_refuses_every_verb(trainer: TrainerSide) -> None:
    older = controller_of(trainer, "controller-a")
    newer = controller_of(trainer, "controller-b")
    for verb in (older.ping, older.status, older.history, lambda: older.submit(CODE), lambda: older.cancel(2)):
        with pytest.raises(JournalConflict, match="'controller-b' has taken over"):
            verb()
    assert newer.submit(CODE)["lsn"] == 6


def test_a_fenced_controller_that_restarts_does_not_take_the_role_back(trainer: TrainerSide) -> None:
    controller_of(trainer, "controller-a")
    newer = controller_of(trainer, "controller-b")
    with pytest.raises(JournalConflict):
        controller_of(trainer, "controller-a")
    assert newer.submit(CODE)["lsn"] == 6
    assert trainer.types().count("LEASE") == 3  # the trainer's and one for each controller


def test_a_restarted_controller_fences_its_own_former_incarnation(trainer: TrainerSide) -> None:
    zombie = controller_of(trainer, "controller-a")
    restarted = controller_of(trainer, "controller-a")
    with pytest.raises(JournalConflict):
        zombie.submit(CODE, "r1")
    assert restarted.submit(CODE, "r1")["lsn"] == 6


def test_the_actor_answers_errors_as_data_and_reads_a_repaired_journal_anew(trainer: TrainerSide) -> None:
    actor = ControllerActor(str(trainer.run_dir / "journal"), "controller-a", token_digest("secret"))
    assert unpack(actor.ping())["lsn"] == 4
    assert actor.submit({"kind": "no"}, token="secret")["error"] == "PolicyRejected"
    torn = trainer.run_dir / "journal" / "00000006.json"
    torn.write_bytes(b"{")
    with pytest.raises(JournalError, match=r"00000006\.json: is not a complete journal entry"):
        unpack(actor.submit(CODE, token="secret"))
    torn.unlink()
    assert (
        unpack(actor.submit(CODE, token="secret"))["lsn"] == 7
    )  # after the lease of the controller that was built anew


def test_a_long_decision_is_no_dead_controller_until_its_time_is_over(
    trainer: TrainerSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    deciding, released = threading.Event(), threading.Event()

    def advance() -> int:
        deciding.set()
        released.wait(60)
        return 0

    monkeypatch.setattr(controller, "BUSY_S", 0.1)
    actor = ControllerActor(str(trainer.run_dir / "journal"), "controller-a", token_digest("secret"))
    first = unpack(actor.ping())
    monkeypatch.setattr(actor._controller, "advance", advance)
    assert deciding.wait(10)
    assert unpack(actor.ping()) == first
    with pytest.raises(ServiceUnavailable, match="an online policy is deciding: try again"):
        unpack(actor.submit(CODE, token="secret"))
    monkeypatch.setattr(actor, "_decides_until", 0.0)
    with pytest.raises(ServiceUnavailable, match="an online policy is deciding"):
        unpack(actor.ping())
    released.set()


def test_a_decision_may_take_what_its_policies_are_given(trainer: TrainerSide) -> None:
    mixing = controller_of(trainer)
    assert mixing.decision_limit_s() == JOURNAL_S
    for timeout_s in (40.0, 200.0):
        mixing.submit({"kind": "odm", "round_steps": 10, "shadow": True, "guard": {"timeout_s": timeout_s}})
    assert mixing.decision_limit_s() == JOURNAL_S + 240.0


@pytest.mark.parametrize(
    "error",
    [
        kind("m")
        for kind in (AccessRefused, JournalConflict, JournalError, PlanMismatch, PolicyRejected, ServiceUnavailable)
    ],
)
def test_errors_cross_processes(error: Exception) -> None:
    with pytest.raises(type(error), match=r"^m$"):
        unpack(failure(error))  # type: ignore[arg-type]
    assert str(pickle.loads(pickle.dumps(error))) == "m"


def test_a_journal_that_was_away_for_a_while_is_used_again(trainer: TrainerSide) -> None:
    controller = controller_of(trainer)
    folder = trainer.run_dir / "journal"
    moved = folder.rename(folder.with_name("away"))
    folder.write_text("a file where the folder was")
    with pytest.raises(JournalError):
        controller.submit(CODE)
    folder.unlink()
    moved.rename(folder)
    assert controller.submit(CODE)["lsn"] == 5
