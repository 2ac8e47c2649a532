"""The journal: entries in order, each complete, chained, fenced by leases; and every way a file can be wrong."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mixwright.data_mixing.entries import Cancel, Commit, End, Lease, PolicyEntry, Reject
from mixwright.data_mixing.errors import JournalConflict, JournalError, PlanMismatch
from mixwright.data_mixing.journal import Journal, read_entries, verify
from tests.data_mixing.journal_cases import begun, caught_up, committed_run, report, small_run
from tests.data_mixing.plan_cases import policy


def test_entries_are_numbered_chained_and_read_back_in_order(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    bodies = [policy([1, 2, 3]), report(1), Reject(document={"x": [1, None]}, reason="no"), report(2)]
    written = [journal.append(body) for body in bodies]
    entries = read_entries(tmp_path)
    assert [entry.lsn for entry in entries] == [0, 1, 2, 3, 4]
    assert [entry.type for entry in entries] == ["GENESIS", "POLICY", "REPORT", "REJECT", "REPORT"]
    assert [entry.body for entry in entries[1:]] == bodies
    assert entries[1:] == written
    assert [entry.prev for entry in entries[1:]] == [entry.hash for entry in entries[:-1]]
    assert entries[0].prev == "0" * 64
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{lsn:08d}.json" for lsn in range(5)]


def test_a_file_is_canonical_json_whose_hash_anyone_can_check(tmp_path: Path) -> None:
    import hashlib

    begun(tmp_path).append(PolicyEntry(document={"ü": 1.5, "a": {10: "x", 9: None}}, program=policy([1, 1, 1]).program))
    raw = (tmp_path / "00000001.json").read_bytes()
    tree = json.loads(raw)
    assert raw == json.dumps(tree, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    payload = json.dumps(tree["entry"], sort_keys=True, separators=(",", ":")).encode()
    assert tree["hash"] == hashlib.sha256(payload).hexdigest()
    assert read_entries(tmp_path)[1].body.document == {"ü": 1.5, "a": {"10": "x", "9": None}}  # type: ignore[union-attr]


def test_poll_returns_what_is_new_once_and_ones_own_too(tmp_path: Path) -> None:
    mine, yours = begun(tmp_path), Journal(tmp_path, "controller")
    assert [entry.lsn for entry in yours.poll()] == [0]
    assert yours.poll() == []
    mine.append(report(1))
    yours.append(report(2))
    mine.append(report(3))
    assert [entry.lsn for entry in yours.poll()] == [1, 2, 3]
    assert [entry.writer for entry in mine.poll()] == ["leader", "leader", "controller", "leader"]
    assert mine.poll() == yours.poll() == []


def test_poll_of_a_folder_that_is_not_there_yet_is_empty(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "later", "rank-3")
    assert journal.poll() == []
    begun(tmp_path / "later")
    assert len(journal.poll()) == 1


def test_polling_for_nothing_costs_about_a_stat(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    journal.poll()
    missing = tmp_path / "00000001.json"

    def best_us(call: Callable[[], object]) -> float:
        times = []
        for _ in range(20):
            started = time.perf_counter()
            for _ in range(200):
                call()
            times.append((time.perf_counter() - started) / 200 * 1e6)
        return min(times)

    assert best_us(journal.poll) < best_us(missing.exists) * 3 + 3


def test_the_first_entry_must_be_the_only_genesis(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="first entry must be GENESIS, not Report"):
        Journal(tmp_path / "j", "leader").append(report(0))
    assert not (tmp_path / "j").exists()
    with pytest.raises(JournalError, match="first entry must be GENESIS"):
        Journal(tmp_path / "j", "leader").acquire("trainer")
    begun(tmp_path / "j")
    with pytest.raises(JournalConflict, match="the run has begun already"):
        Journal(tmp_path / "j", "leader 2").append(small_run())
    assert len(read_entries(tmp_path / "j")) == 1


def test_append_after_writes_only_while_nothing_newer_exists(tmp_path: Path) -> None:
    mine, yours = begun(tmp_path), Journal(tmp_path, "controller")
    cancel = Cancel(policy_lsn=0)
    yours.append(cancel)
    assert mine.append_after(0, report(1)) is None
    entry = mine.append_after(1, report(1))
    assert entry is not None
    assert entry.lsn == 2


def test_a_newer_lease_stops_the_former_holder_of_the_role(tmp_path: Path) -> None:
    old, new = begun(tmp_path, "leader-a"), Journal(tmp_path, "leader-b")
    assert old.acquire("trainer") == Lease(role="trainer", holder="leader-a", epoch=0)
    old.append(report(1))
    assert new.acquire("trainer") == Lease(role="trainer", holder="leader-b", epoch=1)
    with pytest.raises(
        JournalConflict, match=r"'leader-b' has taken over as trainer \(lease 1\); 'leader-a' \(lease 0\)"
    ):
        old.append(report(2))
    with pytest.raises(JournalConflict):
        old.append_after(3, report(2))
    new.append(report(2))
    assert [entry.type for entry in read_entries(tmp_path)] == ["GENESIS", "LEASE", "REPORT", "LEASE", "REPORT"]
    assert [entry.lsn for entry in old.poll()] == [0, 1, 2, 3, 4], "a fenced writer may still read"


def test_roles_are_fenced_apart_and_can_be_won_back(tmp_path: Path) -> None:
    leader, controller = begun(tmp_path, "leader"), Journal(tmp_path, "controller")
    leader.acquire("trainer")
    controller.acquire("controller")
    leader.append(report(1))
    controller.append(policy([1, 1, 1]))
    Journal(tmp_path, "controller-2").acquire("controller")
    leader.append(report(2))
    with pytest.raises(JournalConflict):
        controller.append(report(1))
    assert controller.acquire("controller").epoch == 2
    controller.append(policy([1, 2, 3]))


def test_a_writer_without_a_lease_is_not_fenced(tmp_path: Path) -> None:
    tool = begun(tmp_path)
    Journal(tmp_path, "leader").acquire("trainer")
    written = tool.append(report(5))
    assert read_entries(tmp_path)[-1] == written


def test_time_is_recorded_and_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = begun(tmp_path)
    for clock in (5e9, 100.0, -7.0, 2e9):
        monkeypatch.setattr("mixwright.data_mixing.journal.time.time", lambda clock=clock: clock)
        journal.append(report(1))
        Journal(tmp_path, "other").append(report(2))
    assert [entry.time for entry in verify_reports(tmp_path)] == [5e9, 5e9, 100, 100, -7, -7, 2e9, 2e9]


def verify_reports(folder: Path) -> list:
    assert verify(folder).last_lsn == 8
    return read_entries(folder)[1:]


def test_left_over_temporary_files_are_harmless_and_swept(tmp_path: Path) -> None:
    import socket

    begun(tmp_path)
    ours = f"@{socket.gethostname()}.tmp"
    dead, alive = tmp_path / f".999999999.abc{ours}", tmp_path / f".{os.getpid()}.abc{ours}"
    elsewhere, forgotten = tmp_path / ".1.abc@other.host.tmp", tmp_path / ".2.abc@other.host.tmp"
    for path in (dead, alive, elsewhere, forgotten):
        path.write_text("torn")
    os.utime(forgotten, (0, 0))
    Journal(tmp_path, "leader").append(report(1))
    assert verify(tmp_path).last_lsn == 1
    assert [path.exists() for path in (dead, alive, elsewhere, forgotten)] == [False, True, True, False]


def test_entries_can_be_read_from_the_middle(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    for step in range(5):
        journal.append(report(step))
    assert [entry.lsn for entry in read_entries(tmp_path, first_lsn=3)] == [3, 4, 5]
    assert read_entries(tmp_path, first_lsn=9) == []


def test_a_body_that_is_no_json_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    with pytest.raises(JournalError, match="a REJECT entry cannot be written as JSON"):
        journal.append(Reject(document={"x": object()}, reason="r"))
    assert [path.name for path in tmp_path.iterdir()] == ["00000000.json"]


def test_a_refused_document_with_numbers_that_json_lacks_can_still_be_recorded(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    journal.append(Reject(document={"web": float("nan"), "code": float("inf")}, reason="not finite"))
    assert read_entries(tmp_path)[1].body.document == {"web": None, "code": None}  # type: ignore[union-attr]


def ten_entries(folder: Path) -> Path:
    journal = begun(folder)
    for step in range(9):
        journal.append(report(step))
    return folder / "00000004.json"


def reseal(path: Path, change: object) -> None:
    """Alter an entry and give it a hash that fits, as a forger would."""
    import hashlib

    tree = json.loads(path.read_bytes())
    change(tree["entry"])  # type: ignore[operator]
    payload = json.dumps(tree["entry"], sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(payload.encode()).hexdigest()
    path.write_text(f'{{"entry":{payload},"hash":"{digest}"}}\n')


DAMAGES = {
    "empty": (lambda p: p.write_bytes(b""), r"is not a complete journal entry \(0 bytes\)"),
    "torn": (lambda p: p.write_bytes(p.read_bytes()[:100]), r"not a complete journal entry \(100 bytes\): torn"),
    "without its last byte": (lambda p: p.write_bytes(p.read_bytes()[:-1]), "not a complete journal entry"),
    "zeros": (lambda p: p.write_bytes(bytes(500)), "not a complete journal entry"),
    "not UTF-8": (lambda p: p.write_bytes(b"\xff\xfe" * 50), "not a complete journal entry"),
    "one digit changed": (lambda p: p.write_bytes(p.read_bytes().replace(b'"num_rows":1', b'"num_rows":2', 1)),
                          "it was altered"),
    "spaced out": (lambda p: p.write_text(json.dumps(json.loads(p.read_text()))), "not a complete journal entry"),
    "another entry": (lambda p: shutil.copy(p.with_name("00000005.json"), p), "holds entry 5; expected entry 4"),
    "removed": (lambda p: p.unlink(), "entry is missing, but 00000005.json exists"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "cannot be read: Is a directory"),
    "forged": (lambda p: reseal(p, lambda e: e["body"].update(attempt=1)), "00000005.json: follows an entry with hash"),
    "of unknown type": (lambda p: reseal(p, lambda e: e.update(type="REPORTS")),
                        "unknown entry type 'REPORTS'; did you mean 'REPORT'"),
    "with an unknown key": (lambda p: reseal(p, lambda e: e["body"].update(atempt=1)),
                            "REPORT: atempt: unknown key; did you mean 'attempt'"),
    "with a key missing": (lambda p: reseal(p, lambda e: e["body"].pop("attempt")), "attempt: required key is missing"),
    "with a wrong value": (lambda p: reseal(p, lambda e: e["body"].update(attempt=-1)), r"attempt: .*\(found -1\)"),
    "without writer": (lambda p: reseal(p, lambda e: e.pop("writer")), "is not a journal entry: KeyError"),
    "with a list as body": (lambda p: reseal(p, lambda e: e.update(body=[1])), "REPORT: .*dictionary"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_an_error_that_names_the_file_and_what_is_wrong(tmp_path: Path, damage: str) -> None:
    alter, message = DAMAGES[damage]
    path = ten_entries(tmp_path)
    alter(path)  # type: ignore[no-untyped-call]
    for read in (read_entries, verify, lambda folder: Journal(folder, "rank-0").poll()):
        with pytest.raises(JournalError, match=message) as caught:
            read(tmp_path)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_damage_met_while_following_is_an_error_too(tmp_path: Path) -> None:
    follower = Journal(tmp_path, "rank-1")
    ten_entries(tmp_path)
    assert len(follower.poll()) == 10
    (tmp_path / "00000010.json").write_text("{}")
    for call in (follower.poll, lambda: follower.append(report(1))):
        with pytest.raises(JournalError, match=r"00000010.json: is not a complete journal entry"):
            call()


def test_an_entry_of_another_journal_is_foreign(tmp_path: Path) -> None:
    ten_entries(tmp_path / "a")
    ten_entries(tmp_path / "b")
    shutil.copy(tmp_path / "b" / "00000009.json", tmp_path / "a" / "00000009.json")
    with pytest.raises(JournalError, match=r"00000009.json: follows an entry .* belongs to another journal"):
        read_entries(tmp_path / "a")


def test_the_audit_also_names_files_that_nobody_wrote_for_the_journal(tmp_path: Path) -> None:
    ten_entries(tmp_path)
    (tmp_path / "4.json").write_text("{}")
    assert len(read_entries(tmp_path)) == 10
    with pytest.raises(JournalError, match=r"4.json: is no journal entry; expected names like 00000000.json"):
        verify(tmp_path)


def test_a_folder_that_is_missing_or_a_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="nowhere: the journal folder cannot be read: No such file"):
        read_entries(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="the journal folder cannot be read: Not a directory"):
        verify(tmp_path / "file")
    with pytest.raises(JournalError, match="entry cannot be written: "):
        Journal(tmp_path / "file", "leader").append(small_run())


def test_the_audit_derives_every_commit_again(tmp_path: Path) -> None:
    committed_run(tmp_path, 6)
    assert verify(tmp_path).num_commits == 6
    journal = Journal(tmp_path, "leader")
    lsn = journal.append(policy([3, 1, 1])).lsn
    journal.append(Commit(policy_lsn=lsn, effective_step=40, plan_digest="0" * 64))
    with pytest.raises(PlanMismatch, match=r"00000014.json: the COMMIT entry of policy 13 at step 40 recorded"):
        verify(tmp_path)


def test_an_entry_that_does_not_follow_is_named_by_the_audit(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    journal.append(Commit(policy_lsn=7, effective_step=0, plan_digest=""))
    with pytest.raises(JournalError, match=r"00000001.json: entry 1: policy_lsn=7 is no POLICY entry before it"):
        verify(tmp_path)


def test_a_run_from_beginning_to_end_reads_back_as_it_was_written(tmp_path: Path) -> None:
    journal, history = committed_run(tmp_path, 3)
    journal.append(End(step=9, reason="complete", digest="aa"))
    caught_up(journal, history)
    audited = verify(tmp_path)
    assert audited.state() == history.state()
    assert audited.end == End(step=9, reason="complete", digest="aa")
