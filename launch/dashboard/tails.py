"""Reading what grows, from where the last look ended: the journal's entries and the lines of a file."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixwright.data_mixing.entry_file import NO_HASH, Entry, entry_path, read_entry
from mixwright.data_mixing.plain_data import parse_json

CHUNK_BYTES = 1 << 20
MAX_STEP = 1 << 53
MAX_LINE_BYTES = 32 << 20
"""A longer line is no record of ours; it is passed over and not kept in memory."""


class JournalTail:
    """The entries of a journal that were not read yet, hashes and chain verified. Writes nothing, ever.

    `journal.Journal` would also remove what killed writers left behind: a viewer has no business to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._next_lsn, self._last_hash = 0, NO_HASH

    def read(self, limit: int) -> Iterator[Entry]:
        """Up to `limit` new entries, in order. Raises JournalError naming the file that is damaged."""
        for _ in range(limit):
            entry = read_entry(self._folder, self._next_lsn, self._last_hash)
            if entry is None:
                return
            self._next_lsn, self._last_hash = entry.lsn + 1, entry.hash
            yield entry

    def num_left(self) -> int:
        """About how many entries are still to be read, found by doubling: a listing of the folder would be slow."""
        step = 1
        while self._exists(self._next_lsn + step - 1):
            step *= 2
        low, high = step // 2, step
        while low + 1 < high:
            middle = (low + high) // 2
            low, high = (middle, high) if self._exists(self._next_lsn + middle - 1) else (low, middle)
        return low

    def _exists(self, lsn: int) -> bool:
        return entry_path(self._folder, lsn).exists()


class LineTail:
    """Whole lines that were appended to a file; half a line waits until it is whole.

    A file that became shorter, or another file under the same name, is read from its beginning: `restarts` counts.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset, self._inode, self._half = 0, -1, b""
        self.restarts = 0

    def read(self) -> list[bytes]:
        """The next lines, at most about CHUNK_BYTES of them; [] when there are none (now)."""
        try:
            with self._path.open("rb") as file:
                self._check_same(file.fileno())
                file.seek(self._offset)
                chunk = file.read(CHUNK_BYTES)
        except OSError:  # not written yet, or not reachable now: it is looked for again
            return []
        self._offset += len(chunk)
        *lines, self._half = (self._half + chunk).split(b"\n")
        if len(self._half) > MAX_LINE_BYTES:
            self._half = b""
        # A chunk may hold nothing but a part of a long line; there is more to read then.
        return lines if lines or len(chunk) < CHUNK_BYTES else self.read()

    def _check_same(self, descriptor: int) -> None:
        found = os.fstat(descriptor)
        if self._inode not in (-1, found.st_ino) or found.st_size < self._offset:
            self._offset, self._half = 0, b""
            self.restarts += 1
        self._inode = found.st_ino


def records(lines: list[bytes], kinds: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The records of these kinds, which the writer puts first in a line; half a line of a killed writer is none."""
    heads = tuple(f'{{"kind": "{kind}"'.encode() for kind in kinds)
    for line in itertools.compress(lines, (line.startswith(heads) for line in lines)):
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if type(step := record.get("step")) is int and 0 <= step <= MAX_STEP:
            yield record
