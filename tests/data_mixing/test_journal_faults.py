"""Journals under fire: concurrent writers, kill -9, full disks, folders that cannot be written, odd file systems."""

import contextlib
import errno
import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixwright.data_mixing.errors import JournalConflict, JournalError
from mixwright.data_mixing.journal import Journal, read_entries, verify
from tests.data_mixing.journal_cases import begun, report

ROOT = Path(__file__).parents[2]


def writers(folder: Path, count: int, **first_steps: int) -> list[subprocess.Popen[str]]:
    """Processes that append reports, started together; they print the number of each entry that is on disk for them."""
    command = [sys.executable, "-m", "tests.data_mixing.journal_cases", str(folder)]
    started = [
        subprocess.Popen([*command, name, str(first), str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         text=True, cwd=ROOT)
        for name, first in first_steps.items()
    ]  # fmt: skip
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return started


def test_two_processes_that_append_two_hundred_entries_each_lose_none(tmp_path: Path) -> None:
    begun(tmp_path)
    both = writers(tmp_path, 200, a=0, b=1000)
    acknowledged = {name: list(map(int, w.communicate()[0].split())) for name, w in zip("ab", both, strict=True)}
    assert [w.returncode for w in both] == [0, 0]
    entries = read_entries(tmp_path)
    assert verify(tmp_path).last_lsn == 400
    for name, first in (("a", 0), ("b", 1000)):
        mine = [entry for entry in entries if entry.writer == name]
        assert [entry.lsn for entry in mine] == acknowledged[name]
        assert [entry.body.first_step for entry in mine] == list(range(first, first + 200))  # type: ignore[union-attr]
    switches = sum(a.writer != b.writer for a, b in itertools.pairwise(entries))
    assert switches > 5, "the two did not really run at the same time"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{lsn:08d}.json" for lsn in range(401)]


def test_a_writer_killed_at_any_moment_leaves_a_whole_chain_with_every_acknowledged_entry(tmp_path: Path) -> None:
    begun(tmp_path)
    rng = random.Random(0)
    promised = 0
    for attempt in range(6):
        (victim,) = writers(tmp_path, 10**6, **{f"victim-{attempt}": 0})
        assert victim.stdout is not None
        promised = max(promised, int(victim.stdout.readline()))
        time.sleep(rng.uniform(0, 0.08))
        victim.kill()
        lines = victim.communicate()[0].split()
        promised = max([promised, *map(int, lines[:-1])])
        assert victim.returncode == -signal.SIGKILL
        assert verify(tmp_path).last_lsn >= promised
    Journal(tmp_path, "survivor").append(report(1))
    assert not list(tmp_path.glob(".*.tmp")), "what the victims left was swept"


def test_a_frozen_writer_that_thaws_after_losing_its_role_writes_nothing(tmp_path: Path) -> None:
    """The zombie controller of spec/mixing.md 3.4, finding 7: stopped in the middle, thawed after the take-over."""
    script = (
        "import sys; from pathlib import Path; from mixwright.data_mixing.journal import Journal;"
        "from tests.data_mixing.journal_cases import report; j = Journal(Path(sys.argv[1]), 'zombie');"
        "j.acquire('controller'); print('held', flush=True)\n"
        "try:\n    for step in range(10**6): j.append(report(step))\n"
        "except Exception as error: print(type(error).__name__, flush=True)"
    )
    begun(tmp_path)
    zombie = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert zombie.stdout is not None
    assert zombie.stdout.readline() == "held\n"
    time.sleep(0.05)
    zombie.send_signal(signal.SIGSTOP)
    successor = Journal(tmp_path, "successor")
    lease = successor.acquire("controller")
    successor.append(report(7))
    zombie.send_signal(signal.SIGCONT)
    assert zombie.communicate(timeout=60)[0] == "JournalConflict\n"
    entries = read_entries(tmp_path)
    taken = next(entry.lsn for entry in entries if entry.body == lease)
    assert "zombie" not in [entry.writer for entry in entries[taken:]]


@pytest.fixture
def tiny_disk() -> Iterator[Path]:
    """A file system of 64 kB; skipped where none may be mounted."""
    folder = Path(tempfile.mkdtemp())
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=0777", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        folder.rmdir()
        pytest.skip("mounting needs rights that this process does not have")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
    folder.rmdir()


def test_a_full_disk_is_an_error_that_leaves_nothing_half_written(tiny_disk: Path) -> None:
    journal = begun(tiny_disk / "journal")

    def fill() -> None:
        for step in range(100):
            journal.append(report(step))

    with pytest.raises(JournalError, match=r"journal/\d{8}.json: entry cannot be written: No space left on device"):
        fill()
    written = verify(tiny_disk / "journal").last_lsn
    assert written >= 3
    assert len(list((tiny_disk / "journal").iterdir())) == written + 1
    (tiny_disk / "journal" / f"{written:08d}.json").unlink()  # room, as an administrator would make it elsewhere
    again = Journal(tiny_disk / "journal", "leader").append(report(99))
    assert again.lsn == written


def test_a_folder_that_cannot_be_made_on_a_full_disk_is_a_clear_error(tiny_disk: Path) -> None:
    with (tiny_disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))
    with pytest.raises(JournalError, match="cannot be written: No space left on device"):
        begun(tiny_disk / "run" / "journal")


def test_a_disk_that_becomes_read_only_is_an_error_and_can_still_be_read(tiny_disk: Path) -> None:
    journal = begun(tiny_disk)
    journal.append(report(1))
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(JournalError, match=r"00000002.json: entry cannot be written: Read-only file system"):
        journal.append(report(2))
    assert verify(tiny_disk).last_lsn == 1
    subprocess.run(["mount", "-o", "remount,rw", str(tiny_disk)], check=True)
    assert journal.append(report(2)).lsn == 2


def test_a_file_size_limit_is_an_error_that_leaves_nothing_half_written(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(JournalError, match=r"00000001.json: entry cannot be written: File too large"):
            journal.append(report(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["00000000.json"]
    assert journal.append(report(1)).lsn == 1


def test_a_folder_without_write_permission_is_an_error_and_can_still_be_read(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp()) / "journal"
    begun(folder)
    folder.parent.chmod(0o755)
    folder.chmod(0o555)
    (folder / "00000000.json").chmod(0o444)
    script = (
        "import sys, os; from pathlib import Path; from mixwright.data_mixing.journal import Journal\n"
        "from tests.data_mixing.journal_cases import report\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "journal = Journal(Path(sys.argv[1]), 'nobody'); print(len(journal.poll()))\n"
        "try: journal.append(report(1))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines() == [
        "1", f"JournalError {folder}/00000001.json: entry cannot be written: Permission denied",
    ]  # fmt: skip
    assert len(list(folder.iterdir())) == 1
    folder.chmod(0o755)


def test_a_file_system_without_hard_links_is_named_as_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = begun(tmp_path)

    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(
        JournalError, match=r"00000001.json: entry cannot be written: the file system has no hard links"
    ):
        journal.append(report(1))
    assert len(list(tmp_path.iterdir())) == 1


def test_an_answer_lost_by_a_network_file_system_does_not_write_an_entry_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, link = begun(tmp_path), os.link

    def link_and_repeat(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", link_and_repeat)
    assert journal.append(report(1)).lsn == 1
    assert [entry.lsn for entry in read_entries(tmp_path)] == [0, 1]


def test_a_temporary_file_swept_under_its_writer_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, link, swept = begun(tmp_path), os.link, []

    def sweep_once(source: Path, target: Path) -> None:
        if not swept:
            swept.append(source)
            source.unlink()
        link(source, target)

    monkeypatch.setattr(os, "link", sweep_once)
    assert journal.append(report(1)).lsn == 1
    assert verify(tmp_path).last_lsn == 1


def test_a_journal_folder_removed_under_its_writer_is_an_error(tmp_path: Path) -> None:
    journal = begun(tmp_path / "journal")
    (tmp_path / "journal" / "00000000.json").unlink()
    (tmp_path / "journal").rmdir()
    journal.append(report(1))
    with pytest.raises(JournalError, match=r"00000000.json: entry is missing, but 00000001.json exists"):
        read_entries(tmp_path / "journal")


def test_the_loser_of_a_race_for_the_first_entry_is_told_that_the_run_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, link = Journal(tmp_path, "slow"), os.link

    def overtaken(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        begun(tmp_path, "fast")
        link(source, target)

    monkeypatch.setattr(os, "link", overtaken)
    from tests.data_mixing.journal_cases import small_run

    with pytest.raises(JournalConflict, match="the run has begun already"):
        slow.append(small_run())
    assert [entry.writer for entry in read_entries(tmp_path)] == ["fast"]


def test_a_failed_folder_flush_is_reported_and_the_entry_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    journal, fsync = begun(tmp_path), os.fsync

    def fail_for_folders(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_for_folders)
    assert journal.append(report(1)).lsn == 1
    assert "may not survive a power failure: Invalid argument" in caplog.text
