"""The run's record: one immutable file for each entry, created exclusively, linked by a hash chain.

An entry is written to a temporary file, flushed to disk and hard-linked to its number, so that it appears complete or
not at all. Of two writers that want the same number one gets it; the other reads what is new and takes the next. A
writer can therefore append only when it has read everything before, which is what fences a writer whose role was taken
over: it meets the newer LEASE and stops. Nothing is locked, nothing is overwritten, clocks decide nothing.

Works on any file system with hard links that all writers share (spec/mixing.md 4.3).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Literal

from mixwright.data_mixing.entries import Commit, EntryBody, Genesis, Lease
from mixwright.data_mixing.entry_file import NO_HASH, Entry, entry_numbers, entry_path, read_entry, sealed
from mixwright.data_mixing.errors import JournalConflict, JournalError, PlanMismatch
from mixwright.data_mixing.history import RunHistory

__all__ = ["Entry", "Journal", "Role", "read_entries", "verify"]

logger = logging.getLogger(__name__)

Role = Literal["controller", "trainer"]
SNAPSHOTS = "snapshots"
"""Folder beside the entries where `snapshot.py` keeps its short cuts."""
STALE_TEMPORARY_S = 3600.0
_TEMPORARY = re.compile(r"\.(?P<pid>[0-9]+)\.[0-9a-f]+@(?P<host>.+)\.tmp")


class Journal:
    """One process's view of the journal in `folder`; `writer` names it in the entries that it appends.

    `after` is the history that the caller knows already (from a snapshot); `poll` then begins behind it. Safe to use
    from threads. Every method raises JournalError, naming the file, when the journal cannot be read or written.
    `append_seconds`: what it took until the newest entry of this writer was on disk; None before the first.
    """

    def __init__(self, folder: Path, writer: str, *, after: RunHistory | None = None) -> None:
        self.folder, self.writer = folder, writer
        self._next_lsn = 0 if after is None else after.last_lsn + 1
        self._next_path = str(entry_path(folder, self._next_lsn))
        self._last_hash = NO_HASH if after is None or after.last_lsn < 0 else after.last_hash
        self._newest_leases: dict[str, Lease] = {} if after is None else dict(after.leases)
        self._held: dict[str, Lease] = {}
        self._unread: list[Entry] = []
        self.append_seconds: float | None = None
        self._lock = threading.RLock()
        if folder.is_dir():
            self._sweep()
            check_complete(folder)

    def poll(self, last_lsn: int | None = None) -> list[Entry]:
        """Entries since the last call, one's own included, in order. Costs one stat when there is none.

        `last_lsn`: files after that entry are not looked at, whatever they hold.
        """
        with self._lock:
            self._read_new(last_lsn)
            unread, self._unread = self._unread, []
            return unread

    def append(self, body: EntryBody) -> Entry:
        """Write an entry at the end of the journal. It is on disk when this returns.

        Raises JournalConflict when another process has taken over a role that was acquired here, or has begun the run.
        """
        with self._lock:
            while True:
                self._read_new()
                self._check_may_append(body)
                entry = self._try_append(body)
                if entry is not None:
                    return entry

    def append_after(self, lsn: int, body: EntryBody) -> Entry | None:
        """Append only if entry `lsn` is still the newest one; else write nothing and return None."""
        with self._lock:
            self._read_new()
            self._check_may_append(body)
            return self._try_append(body) if self._next_lsn == lsn + 1 else None

    def acquire(self, role: Role) -> Lease:
        """Take over `role` from whoever holds it; the former holder's next append raises JournalConflict."""
        with self._lock:
            while True:
                self._read_new()
                former = self._newest_leases.get(role)
                lease = Lease(role=role, holder=self.writer, epoch=former.epoch + 1 if former else 0)
                if self.append_after(self._next_lsn - 1, lease) is not None:
                    self._held[role] = lease
                    return lease

    def _check_may_append(self, body: EntryBody) -> None:
        if isinstance(body, Genesis) and self._next_lsn > 0:
            raise JournalConflict(f"{self.folder}: the run has begun already; a second GENESIS is not possible")
        if not isinstance(body, Genesis) and self._next_lsn == 0:
            raise JournalError(f"{self.folder}: the first entry must be GENESIS, not {type(body).__name__}")
        for role, held in self._held.items():
            newest = self._newest_leases[role]
            if newest.epoch > held.epoch and not (isinstance(body, Lease) and body.role == role):
                raise JournalConflict(
                    f"{self.folder}: {newest.holder!r} has taken over as {role} (lease {newest.epoch}); "
                    f"{self.writer!r} (lease {held.epoch}) must stop"
                )

    def _read_new(self, last_lsn: int | None = None) -> None:
        while last_lsn is None or self._next_lsn <= last_lsn:
            if not os.path.exists(self._next_path):  # noqa: PTH110 (a rank asks this at every step)
                return
            entry = read_entry(self.folder, self._next_lsn, self._last_hash)
            if entry is None:
                return
            self._take(entry)

    def _take(self, entry: Entry) -> None:
        self._next_path = str(entry_path(self.folder, entry.lsn + 1))
        self._next_lsn, self._last_hash = entry.lsn + 1, entry.hash
        self._unread.append(entry)
        if isinstance(entry.body, Lease):
            self._newest_leases[entry.body.role] = entry.body

    def _try_append(self, body: EntryBody) -> Entry | None:
        """Write the entry as the next one; None when another writer was faster.

        Nothing is read once the entry is there: a journal that cannot be read any further must not hide that it is.
        """
        entry, raw = sealed(self._next_lsn, body, self.writer, round(time.time(), 6), self._last_hash)
        path = entry_path(self.folder, entry.lsn)
        began = time.perf_counter()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            created = _create(path, raw)
        except OSError as error:
            raise JournalError(f"{path}: entry cannot be written: {error.strerror}") from None
        if not created:
            return None
        self.append_seconds = time.perf_counter() - began
        self._take(entry)
        return entry

    def _sweep(self) -> None:
        """Remove what killed writers have left behind. It is harmless while it lies there, so failing is no error."""
        for path in self.folder.glob(".*.tmp"):
            try:
                if _is_abandoned(path):
                    path.unlink()
            except OSError as error:
                logger.debug("left-over %s stays: %s", path, error)


def read_entries(folder: Path, first_lsn: int = 0) -> list[Entry]:
    """All entries from `first_lsn` on, hashes and chain verified.

    Raises JournalError naming the file that is missing, torn, altered or foreign.
    """
    check_complete(folder)
    entries: list[Entry] = []
    prev = NO_HASH if first_lsn == 0 else None
    while (entry := read_entry(folder, first_lsn + len(entries), prev)) is not None:
        entries.append(entry)
        prev = entry.hash
    return entries


def verify(folder: Path) -> RunHistory:
    """Audit a journal: replay its chain and derive the plan's state at every COMMIT anew; the history it tells.

    Raises JournalError or PlanMismatch naming the entry that does not hold.
    """
    _check_no_strangers(folder)
    history = RunHistory()
    for entry in read_entries(folder):
        try:
            history.apply(entry)
            if isinstance(entry.body, Commit):
                history.plan()
        except (JournalError, PlanMismatch) as error:
            raise type(error)(f"{entry_path(folder, entry.lsn)}: {error}") from None
    return history


def check_complete(folder: Path) -> None:
    """Raise JournalError when an entry is missing before the newest one."""
    numbers = entry_numbers(folder)
    for expected, number in enumerate(numbers):
        # A listing is no snapshot: an entry that appeared while it ran may be absent from it.
        if expected != number and not entry_path(folder, expected).exists():
            raise JournalError(f"{entry_path(folder, expected)}: entry is missing, but {number:08d}.json exists")


def _check_no_strangers(folder: Path) -> None:
    """Raise JournalError for a file that nobody who keeps this journal writes."""
    numbers = entry_numbers(folder)
    known = {entry_path(folder, number).name for number in numbers} | {SNAPSHOTS}
    for path in sorted(folder.iterdir()):
        if path.name not in known and not _TEMPORARY.fullmatch(path.name):
            raise JournalError(f"{path}: is no journal entry; expected names like {entry_path(folder, 0).name}")


def _create(path: Path, raw: bytes) -> bool:
    """Make `path` appear with content `raw`, durably; False when it exists already. Raises OSError."""
    temporary = path.parent / f".{os.getpid()}.{secrets.token_hex(6)}@{socket.gethostname()}.tmp"
    try:
        _write_durably(temporary, raw)
        if not _link(temporary, path):
            return False
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    _flush_folder(path.parent)
    return True


def _write_durably(path: Path, raw: bytes) -> None:
    with path.open("xb", buffering=0) as file:
        view = memoryview(raw)
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())


def _link(temporary: Path, path: Path) -> bool:
    try:
        os.link(temporary, path)
    except FileExistsError:
        # A network file system may repeat a request whose answer was lost: two links mean that the first one won.
        return temporary.stat().st_nlink == 2
    except FileNotFoundError:
        # Another process took the temporary file for abandoned; without a folder the error is real.
        if not path.parent.is_dir():
            raise
        return False
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOTSUP):
            raise OSError(
                error.errno, "the file system has no hard links; put the run folder on one that has"
            ) from None
        raise
    return True


def _flush_folder(folder: Path) -> None:
    """Make the folder's new name durable. The entry is visible by now, so a failure is reported and no error."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        logger.warning("%s: the newest entry may not survive a power failure: %s", folder, error.strerror)


def _is_abandoned(path: Path) -> bool:
    """Whether the writer of a temporary file is dead, or on another machine and silent for an hour.

    A wrong guess does no harm: the writer finds its file gone and writes another.
    """
    match = _TEMPORARY.fullmatch(path.name)
    if match is None:
        return False
    if match["host"] != socket.gethostname():
        return time.time() - path.stat().st_mtime > STALE_TEMPORARY_S
    try:
        os.kill(int(match["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
