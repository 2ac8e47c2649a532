"""The fold of a journal: what is in force, what waits, who leads, how far the run is."""

import dataclasses
from pathlib import Path

import pytest

from mixwright.data_mixing.domain import Cap
from mixwright.data_mixing.entries import (
    Cancel,
    Checkpoint,
    Commit,
    End,
    EntryBody,
    Lease,
    PolicyEntry,
    Reject,
)
from mixwright.data_mixing.entry_file import Entry
from mixwright.data_mixing.errors import JournalError, PlanMismatch
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.journal import read_entries
from mixwright.data_mixing.plan import Plan
from tests.data_mixing.journal_cases import caught_up, commit, committed_run, report, small_run
from tests.data_mixing.plan_cases import policy


def told(*bodies: EntryBody) -> RunHistory:
    """The history of a run of which these are the entries after the first."""
    history = RunHistory()
    for body in (small_run(), *bodies):
        tell(history, body)
    return history


def tell(history: RunHistory, body: EntryBody) -> None:
    kind = {"PolicyEntry": "POLICY"}.get(type(body).__name__, type(body).__name__.upper())
    history.apply(Entry(history.last_lsn + 1, kind, body, "leader", 0.0, "", f"hash {history.last_lsn + 1}"))


def committed(lsn: int, step: int, digest: str = "?") -> Commit:
    return Commit(policy_lsn=lsn, effective_step=step, plan_digest=digest)


def test_an_empty_history_knows_that_the_run_has_not_begun() -> None:
    history = RunHistory()
    assert not history.has_genesis
    assert (history.last_lsn, history.last_step, history.last_ruling_lsn) == (-1, -1, -1)
    with pytest.raises(JournalError, match="the journal is empty: the run has no GENESIS entry yet"):
        _ = history.genesis


def test_the_first_entry_is_genesis_and_no_other_is() -> None:
    with pytest.raises(JournalError, match="entry 0 is a REPORT: GENESIS is entry 0 and no other"):
        RunHistory().apply(Entry(0, "REPORT", report(1), "w", 0.0, "", ""))
    with pytest.raises(JournalError, match="entry 1 is a GENESIS"):
        told(small_run())


def test_entries_are_taken_in_order_and_once() -> None:
    history = told(report(1), report(2))
    history.apply(Entry(1, "END", End(step=1, reason="complete", digest=""), "w", 0.0, "", ""))
    assert history.end is None
    assert history.last_lsn == 2
    with pytest.raises(JournalError, match="entry 5 was applied after entry 2: those between are missing"):
        history.apply(Entry(5, "REPORT", report(1), "w", 0.0, "", ""))


def test_policies_wait_in_order_until_they_are_committed_or_cancelled_and_shadows_never_do() -> None:
    shadow = policy([1, 1, 1]).model_copy(update={"shadow": True})
    history = told(policy([1, 0, 0]), shadow, policy([0, 1, 0]), policy([0, 0, 1]), policy([1, 2, 3]))
    assert [lsn for lsn, _ in history.pending()] == [1, 3, 4, 5]
    assert history.pending()[1][1] == policy([0, 1, 0])
    tell(history, Cancel(policy_lsn=4))
    tell(history, committed(3, 10))
    assert [lsn for lsn, _ in history.pending()] == [1, 5], "a newer POLICY does not cancel an older one"
    assert list(history.policies) == [1, 2, 3, 4, 5]


def test_commits_are_kept_in_journal_order_with_the_entry_of_their_policy() -> None:
    history = told(policy([1, 0, 0]), policy([0, 1, 0]), committed(2, 0), report(1), committed(1, 7))
    assert [(c.effective_step, c.lsn) for c in history.commits] == [(0, 2), (7, 1)]
    assert history.commits[1].policy == policy([1, 0, 0])
    assert history.last_ruling_lsn == 5
    assert history.num_commits == 2


def test_a_policy_can_be_committed_again_and_a_commit_wins_over_a_cancel() -> None:
    history = told(policy([1, 0, 0]), Cancel(policy_lsn=1), committed(1, 0), committed(1, 5))
    assert [commit.effective_step for commit in history.commits] == [0, 5]
    assert history.pending() == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (committed(9, 0), "entry 2: policy_lsn=9 is no POLICY entry before it; valid names: 1"),
        (committed(0, 0), "entry 2: policy_lsn=0 is no POLICY entry"),
        (Cancel(policy_lsn=2), "entry 2: policy_lsn=2 is no POLICY entry"),
        (policy([1, 2]), "entry 2: policy 2: the segment at step 0 has 2 proportions, the run has 3 domains"),
        (
            policy([1, 1, 1], caps={"d11": Cap(max_epochs=1)}),
            "entry 2: policy 2: caps name 'd11', which is no domain of the run; did you mean 'd1'",
        ),
    ],
)
def test_an_entry_that_does_not_follow_is_refused_and_changes_nothing(body: EntryBody, message: str) -> None:
    history = told(policy([1, 1, 1]))
    before = history.state()
    with pytest.raises(JournalError, match=message):
        tell(history, body)
    assert history.state() == before


def test_a_shadow_cannot_be_committed() -> None:
    history = told(policy([1, 1, 1]).model_copy(update={"shadow": True}))
    with pytest.raises(JournalError, match="entry 2: commits policy 1, which is a shadow"):
        tell(history, committed(1, 0))


def test_leases_checkpoints_and_rejects_are_remembered() -> None:
    first, second = (Lease(role="trainer", holder=h, epoch=e) for e, h in enumerate("ab"))
    controller = Lease(role="controller", holder="c", epoch=0)
    saved = [Checkpoint(step=step, tag=f"step-{step}", digest="") for step in (10, 20)]
    history = told(first, controller, saved[0], second, Reject(document={}, reason="no"), saved[1])
    assert history.leases == {"trainer": second, "controller": controller}
    assert history.checkpoints == saved
    assert history.last_step == 19


def test_the_newest_reports_are_kept_and_say_how_far_training_is() -> None:
    history = RunHistory(keep_reports=3)
    for body in (small_run(), *(report(step) for step in range(5))):
        tell(history, body)
    assert [r.last_step for r in history.reports] == [2, 3, 4]
    assert history.last_step == 4
    tell(history, report(99).model_copy(update={"kind": "validation"}))
    assert history.last_step == 4, "validation trains nothing"
    tell(history, report(2).model_copy(update={"attempt": 1}))
    assert history.last_step == 2, "a later attempt went back to a checkpoint"


def test_a_run_that_was_over_and_trains_again_is_open() -> None:
    history = told(report(1), End(step=2, reason="exhausted", digest="aa"))
    assert history.end is not None
    assert history.last_step == 1
    tell(history, policy([1, 1, 1]))
    assert history.end is not None
    tell(history, report(2))
    assert history.end is None


def test_the_plan_follows_the_commits_and_is_the_plan_of_all_of_them(tmp_path: Path) -> None:
    journal, history = committed_run(tmp_path, 4)
    before = history.plan()
    assert history.plan() is before
    commit(journal, history, policy([0, 1, 1]), 20)
    fresh = Plan(history.genesis, history.commits)
    assert [history.plan().digest(step) for step in range(30)] == [fresh.digest(step) for step in range(30)]
    assert [before.digest(step) for step in range(20)] == [fresh.digest(step) for step in range(20)]


def test_a_history_told_anew_plans_the_same(tmp_path: Path) -> None:
    _, history = committed_run(tmp_path, 5)
    again = RunHistory()
    for entry in read_entries(tmp_path):
        again.apply(entry)
    assert [again.plan().digest(step) for step in range(20)] == [history.plan().digest(step) for step in range(20)]


def test_a_commit_whose_fingerprint_is_not_derived_here_stops_the_run() -> None:
    history = told(policy([1, 1, 1]), committed(1, 0, "feed" * 16))
    with pytest.raises(PlanMismatch, match="entry of policy 1 at step 0 recorded plan state 'feedfeedfeed', but"):
        history.plan()


def test_state_and_back_is_the_same_history(tmp_path: Path) -> None:
    journal, history = committed_run(tmp_path, 5)
    for body in (
        report(3), Cancel(policy_lsn=1), policy([3, 2, 1]), Lease(role="trainer", holder="x", epoch=4),
        Checkpoint(step=3, tag="t", digest="d"), Reject(document=1, reason="r"),
    ):  # fmt: skip
        journal.append(body)
    caught_up(journal, history)
    restored = RunHistory.from_state(type(history.state()).model_validate_json(history.state().model_dump_json()))
    assert restored.state() == history.state()
    assert restored.pending() == history.pending()
    assert [c.lsn for c in restored.commits] == [c.lsn for c in history.commits]
    assert [restored.plan().digest(step) for step in range(25)] == [history.plan().digest(step) for step in range(25)]
    journal.append(End(step=50, reason="complete", digest=""))
    for entry in journal.poll():
        restored.apply(entry)
        history.apply(entry)
    assert restored.state() == history.state()


def test_a_state_of_the_run_before_its_first_commit_works_too() -> None:
    history = told(policy([1, 1, 1]), report(1))
    assert RunHistory.from_state(history.state()).state() == history.state()


@pytest.mark.parametrize("field", ["cursors", "credits"])
def test_a_state_with_a_wrong_plan_is_refused(tmp_path: Path, field: str) -> None:
    state = committed_run(tmp_path, 5)[1].state()
    values = getattr(state, field)
    with pytest.raises(PlanMismatch, match="the COMMIT entry of policy 9 at step 12 recorded plan state"):
        RunHistory.from_state(state.model_copy(update={field: (values[0] + 1, *values[1:])}))


def test_entries_are_frozen() -> None:
    entry = Entry(0, "GENESIS", small_run(), "w", 0.0, "", "")
    with pytest.raises(dataclasses.FrozenInstanceError):
        entry.lsn = 1  # type: ignore[misc]
    assert isinstance(policy([1]), PolicyEntry)
