from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.domain import Domain
from mixwright.data_mixing.entries import Cancel, Commit, EntryBody, Genesis, PolicyEntry
from mixwright.data_mixing.errors import JournalConflict, JournalError, PolicyRejected, StoreChanged
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.journal import Entry, Journal, read_entries, verify
from mixwright.data_mixing.leader import Leader, open_run
from tests.data_mixing.run_cases import FIRST_POLICY
from tests.data_mixing.run_cases import genesis as run_of

DOMAINS = tuple(Domain(name=name, num_rows=1000, fingerprint=name) for name in ("a", "b", "c"))
GENESIS = Genesis(
    run="r", seed=1, sequence_length=8, rows_per_step=4, num_steps=1000, store_fingerprint="s", domains=DOMAINS
)
FIRST = accept({"kind": "static", "mixture": {"a": 1, "b": 1}}, GENESIS)


ROUND_STEPS = 12
ONLINE = accept({"kind": "odm", "round_steps": ROUND_STEPS}, GENESIS)


def policy(**changes: object) -> PolicyEntry:
    return accept({"kind": "static", "mixture": {"c": 1}, **changes}, GENESIS)


def begin(folder: Path, start_step: int = 0) -> tuple[Journal, Leader]:
    journal = Journal(folder, writer="leader")
    history, _ = open_run(journal, GENESIS, FIRST)
    return journal, Leader(journal, history, start_step=start_step, lead_steps=8, prefetch_steps=4)


def propose(folder: Path, body: EntryBody) -> int:
    controller = Journal(folder, writer="controller")
    controller.poll()
    return controller.append(body).lsn


def commits(folder: Path) -> list[Commit]:
    return [entry.body for entry in read_entries(folder) if isinstance(entry.body, Commit)]


def wait_for_commits(folder: Path, count: int, timeout_s: float = 10.0) -> list[Commit]:
    deadline = time.monotonic() + timeout_s
    while len(commits(folder)) < count and time.monotonic() < deadline:
        time.sleep(0.02)
    return commits(folder)


def test_a_new_run_has_genesis_lease_first_policy_and_its_commit(tmp_path: Path) -> None:
    begin(tmp_path)
    assert sorted(entry.type for entry in read_entries(tmp_path)) == ["COMMIT", "GENESIS", "LEASE", "POLICY"]
    assert [commit.effective_step for commit in commits(tmp_path)] == [0]


def test_opening_again_adds_only_a_lease(tmp_path: Path) -> None:
    begin(tmp_path)
    begin(tmp_path)
    assert [entry.type for entry in read_entries(tmp_path)].count("COMMIT") == 1
    assert [entry.type for entry in read_entries(tmp_path)][-1] == "LEASE"


def test_an_asap_policy_is_committed_lead_steps_ahead(tmp_path: Path) -> None:
    _, leader = begin(tmp_path)
    with leader:
        leader.begin_step(100)
        lsn = propose(tmp_path, policy())
        found = wait_for_commits(tmp_path, 2)
    assert (found[1].policy_lsn, found[1].effective_step) == (lsn, 108)
    verify(tmp_path)


def test_at_step_is_met_exactly_and_not_committed_before_it_is_near(tmp_path: Path) -> None:
    _, leader = begin(tmp_path)
    with leader:
        leader.begin_step(10)
        propose(tmp_path, policy(at_step=500))
        time.sleep(0.5)
        assert len(commits(tmp_path)) == 1
        leader.begin_step(450)
        found = wait_for_commits(tmp_path, 2)
    assert found[1].effective_step == 500


def test_an_at_step_that_has_passed_takes_effect_as_soon_as_possible(tmp_path: Path) -> None:
    _, leader = begin(tmp_path, start_step=600)
    with leader:
        propose(tmp_path, policy(at_step=500))
        found = wait_for_commits(tmp_path, 2)
    assert found[1].effective_step == 608


def test_a_cancelled_policy_and_a_shadow_are_never_committed(tmp_path: Path) -> None:
    _, leader = begin(tmp_path)
    propose(tmp_path, Cancel(policy_lsn=propose(tmp_path, policy(at_step=900))))
    propose(tmp_path, policy(shadow=True))
    with leader:
        leader.begin_step(950)
        time.sleep(0.5)
    assert len(commits(tmp_path)) == 1


def test_a_policy_cancelled_at_the_last_moment_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CANCEL gets the entry number that the COMMIT was about to take."""
    journal, leader = begin(tmp_path)
    lsn = propose(tmp_path, policy())
    append_after = journal.append_after

    def overtaken(last_lsn: int, body: EntryBody) -> Entry | None:
        monkeypatch.setattr(journal, "append_after", append_after)
        propose(tmp_path, Cancel(policy_lsn=lsn))
        return append_after(last_lsn, body)

    monkeypatch.setattr(journal, "append_after", overtaken)
    with leader:
        time.sleep(0.6)
    assert len(commits(tmp_path)) == 1
    verify(tmp_path)


def test_two_policies_are_committed_in_order_and_never_backwards(tmp_path: Path) -> None:
    _, leader = begin(tmp_path)
    first, second = propose(tmp_path, policy(at_step=60)), propose(tmp_path, policy())
    with leader:
        found = wait_for_commits(tmp_path, 3)
    assert [(commit.policy_lsn, commit.effective_step) for commit in found[1:]] == [(first, 60), (second, 60)]


def test_a_policy_that_waits_for_its_step_delays_no_urgent_one(tmp_path: Path) -> None:
    """At 0.15 s a step, what waits for a step 40 ahead is not committed yet."""
    _, leader = begin(tmp_path)
    with leader:
        for step in range(4):
            leader.begin_step(step)
            time.sleep(0.15)
        waits, urgent = propose(tmp_path, policy(at_step=51)), propose(tmp_path, policy())
        found = wait_for_commits(tmp_path, 2)
        assert [(commit.policy_lsn, commit.effective_step) for commit in found[1:]] == [(urgent, 11)]
        leader.begin_step(40)
        found = wait_for_commits(tmp_path, 3)
    assert (found[2].policy_lsn, found[2].effective_step) == (waits, 51)


def test_training_waits_at_the_edge_of_a_commit_that_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal's disk is slow; no step may pass the point where the commit can still be announced in time."""
    journal, leader = begin(tmp_path)
    append_after, released = journal.append_after, threading.Event()

    def slow_append(lsn: int, body: EntryBody) -> Entry | None:
        released.wait(10)
        return append_after(lsn, body)

    monkeypatch.setattr(journal, "append_after", slow_append)
    with leader:
        propose(tmp_path, policy())
        while leader._writing_effective_step is None:
            time.sleep(0.01)
        leader.begin_step(1)
        passed = threading.Event()
        waiting = threading.Thread(target=lambda: (leader.begin_step(2), passed.set()))
        waiting.start()
        assert not passed.wait(0.3), "step 2 is the last that can announce effective step 8 with 4 steps prefetched"
        released.set()
        assert passed.wait(5)
        assert leader.announced_lsn == [e.lsn for e in read_entries(tmp_path) if e.type == "COMMIT"][-1]
        waiting.join()


def lead_to_the_end_of_a_round(folder: Path, leader: Leader) -> int:
    """The boundary at which `ONLINE` decides, once it is committed and the step before that has begun."""
    boundary = wait_for_commits(folder, 2)[1].effective_step + ROUND_STEPS
    leader.begin_step(boundary - 1)
    return boundary


def test_nobody_leaves_a_boundary_while_a_commit_that_holds_from_it_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two policies are committed at the end of a round. The first ends the wait, the second comes a moment later."""
    journal, leader = begin(tmp_path)
    propose(tmp_path, ONLINE)
    append_after = journal.append_after

    def slow_append(lsn: int, body: EntryBody) -> Entry | None:
        time.sleep(0.3)
        return append_after(lsn, body)

    with leader:
        boundary = lead_to_the_end_of_a_round(tmp_path, leader)
        monkeypatch.setattr(journal, "append_after", slow_append)
        propose(tmp_path, policy())
        propose(tmp_path, policy(mixture={"a": 1}))
        announced = leader.await_decision(boundary, timeout_s=30)
    holding = [
        e.lsn for e in read_entries(tmp_path) if isinstance(e.body, Commit) and e.body.effective_step == boundary
    ]
    assert len(holding) == 2
    assert announced == holding[-1]


def test_a_decision_that_comes_after_a_persons_policy_does_not_undo_it(tmp_path: Path) -> None:
    """At the end of a round a person's policy is journaled, and then what the online policy has just decided."""
    _, leader = begin(tmp_path)
    online = propose(tmp_path, ONLINE)
    with leader:
        boundary = lead_to_the_end_of_a_round(tmp_path, leader)
        persons = propose(tmp_path, policy(why="rollback"))
        decided = propose(tmp_path, ONLINE.model_copy(update={"root": online, "why": "decision 1"}))
        leader.await_decision(boundary, timeout_s=30)
        time.sleep(0.3)  # time to commit the other one too
    assert [(c.policy_lsn, c.effective_step) for c in commits(tmp_path)[2:]] == [(persons, boundary)]
    assert decided not in [lsn for lsn, _ in verify(tmp_path).pending()]


def test_a_decision_that_comes_before_a_persons_policy_holds_until_that_one(tmp_path: Path) -> None:
    _, leader = begin(tmp_path)
    online = propose(tmp_path, ONLINE)
    with leader:
        boundary = lead_to_the_end_of_a_round(tmp_path, leader)
        decided = propose(tmp_path, ONLINE.model_copy(update={"root": online, "why": "decision 1"}))
        persons = propose(tmp_path, policy(at_step=boundary + 5))
        leader.await_decision(boundary, timeout_s=30)
        found = wait_for_commits(tmp_path, 4)
    assert [(c.policy_lsn, c.effective_step) for c in found[2:]] == [(decided, boundary), (persons, boundary + 5)]


def test_what_lies_unreadable_behind_a_commit_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody has put a file at the number after the one that the COMMIT takes."""
    journal, leader = begin(tmp_path)
    lsn = propose(tmp_path, policy())
    append_after = journal.append_after

    def before_garbage(last_lsn: int, body: EntryBody) -> Entry | None:
        (tmp_path / f"{last_lsn + 2:08d}.json").write_text("{")
        return append_after(last_lsn, body)

    monkeypatch.setattr(journal, "append_after", before_garbage)
    leader.__enter__()
    deadline = time.monotonic() + 10
    while leader.announced_lsn <= lsn and time.monotonic() < deadline:
        time.sleep(0.02)
    assert leader.announced_lsn == lsn + 1
    with pytest.raises(JournalError, match="torn"):
        leader.__exit__(None, None, None)
    (tmp_path / f"{lsn + 2:08d}.json").unlink()
    assert commits(tmp_path)[-1].policy_lsn == lsn


def test_a_leader_that_was_replaced_stops_and_says_so(tmp_path: Path) -> None:
    _, leader = begin(tmp_path)
    with pytest.raises(JournalConflict, match="has taken over as trainer"):
        train_after_a_takeover(leader, tmp_path)


def train_after_a_takeover(leader: Leader, folder: Path) -> None:
    with leader:
        begin(folder)
        propose(folder, policy())
        for step in range(1, 200):
            leader.begin_step(step)
            time.sleep(0.02)


def test_what_was_queued_is_written_at_once_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixwright.data_mixing import leader as module
    from mixwright.data_mixing.entries import Checkpoint

    monkeypatch.setattr(module, "POLL_INTERVAL_S", 60.0)
    _, leader = begin(tmp_path)
    with leader:
        time.sleep(0.2)  # its thread sleeps by now
        for step in range(3):
            leader.write(Checkpoint(step=step, tag=f"step-{step}", digest="00"))
        leader.flush()
        written = [entry.body for entry in read_entries(tmp_path) if isinstance(entry.body, Checkpoint)]
        assert [checkpoint.step for checkpoint in written] == [0, 1, 2]


def test_reports_wait_while_the_journal_is_away_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixwright.data_mixing import leader as module
    from mixwright.data_mixing.entries import Checkpoint

    monkeypatch.setattr(module, "RETRY_INTERVAL_S", 0.05)
    journal, leader = begin(tmp_path)
    append, away = journal.append, threading.Event()
    away.set()

    def failing_append(body: EntryBody) -> Entry:
        if away.is_set():
            raise JournalError("no space left")
        return append(body)

    monkeypatch.setattr(journal, "append", failing_append)
    with leader:
        leader.write(Checkpoint(step=3, tag="step-3", digest="00"))
        for step in range(5):
            leader.begin_step(step)
            time.sleep(0.05)
        leader.flush()  # does not wait for a journal that is away
        assert [entry.type for entry in read_entries(tmp_path)].count("CHECKPOINT") == 0
        away.clear()
    assert [entry.type for entry in read_entries(tmp_path)].count("CHECKPOINT") == 1


def test_a_journal_that_stays_away_is_an_error_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixwright.data_mixing.entries import Checkpoint

    journal, leader = begin(tmp_path)

    def failing_append(body: EntryBody) -> Entry:
        raise JournalError("no space left")

    monkeypatch.setattr(journal, "append", failing_append)
    with pytest.raises(JournalError, match="no space left"), leader:
        leader.write(Checkpoint(step=3, tag="step-3", digest="00"))


@pytest.mark.parametrize(
    ("changes", "error", "expected"),
    [
        ({"store_fingerprint": "other"}, StoreChanged, "restore the old store or start a new run"),
        ({"seed": 2}, JournalError, r"seed = 2 \(the run has 1\)"),
        ({"num_steps": 7}, JournalError, r"num_steps = 7 \(the run has 1000\)"),
        ({"domains": DOMAINS[:2]}, JournalError, "domains ="),
    ],
)
def test_a_run_is_not_continued_with_settings_that_change_what_it_reads(
    tmp_path: Path, changes: dict, error: type[Exception], expected: str
) -> None:
    begin(tmp_path)
    with pytest.raises(error, match=expected):
        open_run(Journal(tmp_path, writer="leader"), GENESIS.model_copy(update=changes), FIRST)


def test_a_killed_start_is_completed_by_the_next(tmp_path: Path) -> None:
    """Killed after the first policy's entry, before its commit."""
    journal = Journal(tmp_path, writer="leader")
    journal.append(GENESIS)
    journal.append(FIRST)
    begin(tmp_path)
    history = RunHistory()
    for entry in read_entries(tmp_path):
        history.apply(entry)
    assert [(commit.effective_step, commit.policy) for commit in history.commits] == [(0, FIRST)]
    assert len(history.policies) == 1


def test_the_leader_leaves_snapshots_from_which_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixwright.data_mixing import snapshot
    from mixwright.data_mixing.entries import Checkpoint

    monkeypatch.setattr(snapshot, "EVERY_ENTRIES", 20)
    _, leader = begin(tmp_path)
    with leader:
        for step in range(60):
            leader.write(Checkpoint(step=step, tag=f"step-{step}", digest="00"))
    assert list(snapshot.snapshot_folder(tmp_path).iterdir())
    _, history = snapshot.resume(tmp_path, "reader")
    assert [checkpoint.step for checkpoint in history.checkpoints] == list(range(60))
    assert history.plan().state_digest(7) == verify(tmp_path).plan().state_digest(7)


def test_a_run_does_not_begin_with_a_shadow_and_nothing_is_written_of_it(tmp_path: Path) -> None:
    """The COMMIT of a shadow, once written, would make the journal unreadable for good."""
    run = run_of()
    with pytest.raises(PolicyRejected, match="shadow: a run begins with a policy that is obeyed"):
        open_run(Journal(tmp_path / "journal", "leader"), run, accept({**FIRST_POLICY, "shadow": True}, run))
    assert not (tmp_path / "journal").exists()
