"""Snapshots: a long journal opens fast, and a snapshot that is wrong in any way is as good as none."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from mixwright.data_mixing import journal as journal_module
from mixwright.data_mixing.entries import Lease
from mixwright.data_mixing.errors import JournalConflict, JournalError
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.journal import Journal, verify
from mixwright.data_mixing.snapshot import resume, snapshot_folder, write_when_due
from tests.data_mixing.journal_cases import begun, caught_up, commit, committed_run, report
from tests.data_mixing.plan_cases import policy


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots every 5 commits or 20 entries."""
    monkeypatch.setattr("mixwright.data_mixing.snapshot.EVERY_COMMITS", 5)
    monkeypatch.setattr("mixwright.data_mixing.snapshot.EVERY_ENTRIES", 20)


def long_run(folder: Path, num_reports: int = 50) -> RunHistory:
    """A run of 8 commits and many reports whose writer takes snapshots as they come due."""
    journal, history = begun(folder), RunHistory()
    caught_up(journal, history)
    for index in range(8):
        commit(journal, history, policy([1 + index, 2, 3]), 3 * index)
        write_when_due(folder, history)
    for step in range(num_reports):
        journal.append(report(step))
        caught_up(journal, history)
        write_when_due(folder, history)
    return history


def snapshots(folder: Path) -> list[str]:
    return sorted(path.name for path in snapshot_folder(folder).iterdir())


@pytest.mark.usefixtures("often")
def test_snapshots_come_every_so_many_commits_or_entries_and_two_are_kept(tmp_path: Path) -> None:
    journal, history, written = begun(tmp_path), RunHistory(), []
    caught_up(journal, history)
    for index in range(12):
        commit(journal, history, policy([1 + index, 2, 3]), index)
        written.append(write_when_due(tmp_path, history))
    assert [index for index, wrote in enumerate(written) if wrote] == [4, 9]
    for step in range(45):
        journal.append(report(step))
        caught_up(journal, history)
        write_when_due(tmp_path, history)
    assert snapshots(tmp_path) == ["00000040.12.json", "00000060.12.json"]
    assert not write_when_due(tmp_path, history)


@pytest.mark.usefixtures("often")
def test_a_run_resumed_from_a_snapshot_is_the_run_read_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = long_run(tmp_path)
    read: list[int] = []
    read_entry = journal_module.read_entry
    monkeypatch.setattr(journal_module, "read_entry", lambda f, lsn, prev: read.append(lsn) or read_entry(f, lsn, prev))
    journal, resumed = resume(tmp_path, "rank-0")
    assert read == list(range(51, 67)), "entries before the snapshot are not read"
    assert resumed.state() == history.state() == verify(tmp_path).state()
    assert [resumed.plan().digest(step) for step in range(30)] == [history.plan().digest(step) for step in range(30)]
    assert journal.poll() == []
    assert journal.append(report(77)).lsn == 67
    assert [entry.lsn for entry in journal.poll()] == [67]


@pytest.mark.usefixtures("often")
def test_leases_before_the_snapshot_are_known_behind_it(tmp_path: Path) -> None:
    journal, history = begun(tmp_path), RunHistory()
    old = Journal(tmp_path, "old")
    old.acquire("trainer")
    for step in range(30):
        journal.append(report(step))
    caught_up(journal, history)
    assert write_when_due(tmp_path, history)
    resumed, _ = resume(tmp_path, "new")
    assert resumed.acquire("trainer") == Lease(role="trainer", holder="new", epoch=1)
    with pytest.raises(JournalConflict):
        old.append(report(1))


def test_a_run_without_snapshots_or_without_a_journal_can_be_resumed(tmp_path: Path) -> None:
    _, history = committed_run(tmp_path / "run", 3)
    assert resume(tmp_path / "run", "x")[1].state() == history.state()
    journal, empty = resume(tmp_path / "new", "x")
    assert not empty.has_genesis
    assert journal.poll() == []


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def _reseal(path: Path, old: bytes, new: bytes) -> None:
    import hashlib

    payload = path.read_bytes()[65:]
    assert old in payload
    payload = payload.replace(old, new, 1)
    path.write_bytes(hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "torn": (_truncate, "does not have the recorded hash"),
    "a bit flipped": (_flip, "does not have the recorded hash"),
    "empty": (lambda path: path.write_bytes(b""), "does not have the recorded hash"),
    "of another journal": (lambda path: _reseal(path, b'"last_hash":"', b'"last_hash":"0'), "the journal has no entry"),
    "of another plan": (lambda path: _reseal(path, b'"cursors":[', b'"cursors":[9'), "recorded plan state"),
    "of another version": (lambda path: _reseal(path, b'"settled"', b'"old_key"'), "not a history as"),
    "no JSON": (lambda path: _reseal(path, b'{"genesis"', b'{genesis'), "not a history as"),
}  # fmt: skip


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_snapshot_is_passed_over_and_built_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    history = long_run(tmp_path)
    older, newest = (snapshot_folder(tmp_path) / name for name in snapshots(tmp_path))
    alter, reason = DAMAGES[damage]
    alter(newest)
    with caplog.at_level(logging.WARNING):
        resumed = resume(tmp_path, "rank-0")[1]
    assert f"{newest}: snapshot is passed over: " in caplog.text
    assert reason in caplog.text
    assert resumed.state() == history.state()
    assert snapshots(tmp_path) == [older.name]
    assert write_when_due(tmp_path, resumed)
    assert len(snapshots(tmp_path)) == 2


@pytest.mark.usefixtures("often")
def test_when_every_snapshot_is_damaged_the_whole_journal_is_read(tmp_path: Path) -> None:
    history = long_run(tmp_path)
    for path in snapshot_folder(tmp_path).iterdir():
        _truncate(path)
    assert resume(tmp_path, "rank-0")[1].state() == history.state()


@pytest.mark.usefixtures("often")
def test_a_snapshot_does_not_hide_an_entry_that_is_missing(tmp_path: Path) -> None:
    long_run(tmp_path)
    (tmp_path / "00000003.json").unlink()
    with pytest.raises(JournalError, match=r"00000003.json: entry is missing, but 00000004.json exists"):
        resume(tmp_path, "rank-0")


@pytest.mark.usefixtures("often")
def test_a_snapshot_that_cannot_be_written_disturbs_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    snapshot_folder(tmp_path).parent.mkdir(exist_ok=True)
    snapshot_folder(tmp_path).write_text("in the way")
    history = long_run(tmp_path)
    assert "no snapshot: " in caplog.text
    assert resume(tmp_path, "rank-0")[1].state() == history.state()


@pytest.mark.usefixtures("often")
def test_temporary_files_of_killed_snapshot_writers_are_swept_by_the_next(tmp_path: Path) -> None:
    history = long_run(tmp_path, 5)
    (snapshot_folder(tmp_path) / ".999999999.abc.tmp").write_text("torn")
    long_run_goes_on(tmp_path, history)
    assert all(not name.startswith(".") for name in snapshots(tmp_path))


def long_run_goes_on(folder: Path, history: RunHistory) -> None:
    journal = Journal(folder, "leader", after=history)
    for step in range(40):
        journal.append(report(step))
        caught_up(journal, history)
        write_when_due(folder, history)
