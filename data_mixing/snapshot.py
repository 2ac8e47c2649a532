"""Snapshots of a run's history, so that opening a long journal reads its newest entries only.

A snapshot is a file beside the journal with the fold of the entries up to a number and the plan's state at the last
commit. It is only a shortcut: it carries its own hash and the hash of the entry it ends with, the plan state is checked
against the fingerprint in that commit, and whatever fails a check is passed over. The entries stay the truth.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
from pathlib import Path

from pydantic import ValidationError

from mixwright.data_mixing.entry_file import read_entry
from mixwright.data_mixing.errors import MixingError
from mixwright.data_mixing.history import HistoryState, RunHistory
from mixwright.data_mixing.journal import SNAPSHOTS, Journal

logger = logging.getLogger(__name__)

EVERY_COMMITS = 100
EVERY_ENTRIES = 1000
KEEP = 2
_NAME = re.compile(r"[0-9]{8}\.[0-9]+\.json")
_HASH_LENGTH = 64


def resume(folder: Path, writer: str) -> tuple[Journal, RunHistory]:
    """Open the journal in `folder` and everything it tells: newest sound snapshot, then the entries after it.

    The journal's next `poll` returns what comes later. Raises JournalError for a damaged journal.
    """
    history = _newest(folder) or RunHistory()
    journal = Journal(folder, writer, after=history)
    for entry in journal.poll():
        history.apply(entry)
    return journal, history


def write_when_due(folder: Path, history: RunHistory) -> bool:
    """Write a snapshot when 100 commits or 1,000 entries have come since the newest; whether one was written.

    A snapshot that cannot be written is reported and missed by nobody.
    """
    newest = max(_numbers(folder), default=(-1, 0))
    if history.last_lsn - newest[0] < EVERY_ENTRIES and history.num_commits - newest[1] < EVERY_COMMITS:
        return False
    try:
        _write(folder, history)
    except OSError as error:
        logger.warning("%s: no snapshot: %s", snapshot_folder(folder), error.strerror)
        return False
    return True


def snapshot_folder(folder: Path) -> Path:
    """Where the snapshots of the journal in `folder` lie."""
    return folder / SNAPSHOTS


def _write(folder: Path, history: RunHistory) -> None:
    path = snapshot_folder(folder) / f"{history.last_lsn:08d}.{history.num_commits}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = history.state().model_dump_json().encode()
    temporary = path.with_name(f".{os.getpid()}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.write_bytes(hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    outdated = [f"{lsn:08d}.{commits}.json" for lsn, commits in _numbers(folder)[:-KEEP]]
    # Temporary files of killed writers go too; a live writer whose file is taken goes without this snapshot.
    for old in [*(path.parent / name for name in outdated), *path.parent.glob(".*.tmp")]:
        old.unlink(missing_ok=True)


def _numbers(folder: Path) -> list[tuple[int, int]]:
    """Newest entry and number of commits of each snapshot, ascending; read from the file names."""
    paths = snapshot_folder(folder).iterdir() if snapshot_folder(folder).is_dir() else ()
    names = (path.name.split(".") for path in paths if _NAME.fullmatch(path.name))
    return sorted((int(lsn), int(commits)) for lsn, commits, _ in names)


def _newest(folder: Path) -> RunHistory | None:
    """The history of the newest snapshot that passes every check; damaged ones are removed so as to be rebuilt."""
    for lsn, commits in reversed(_numbers(folder)):
        path = snapshot_folder(folder) / f"{lsn:08d}.{commits}.json"
        try:
            return _load(folder, path)
        except (OSError, ValueError, MixingError) as error:
            logger.warning("%s: snapshot is passed over: %s", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
    return None


def _load(folder: Path, path: Path) -> RunHistory:
    raw = path.read_bytes()
    recorded, payload = raw[:_HASH_LENGTH], raw[_HASH_LENGTH + 1 :]
    if hashlib.sha256(payload).hexdigest().encode() != recorded:
        raise ValueError("its content does not have the recorded hash")
    try:
        state = HistoryState.model_validate_json(payload)
    except ValidationError:
        raise ValueError("its content is not a history as this version writes it") from None
    entry = read_entry(folder, state.last_lsn, None)
    if entry is None or entry.hash != state.last_hash:
        raise ValueError(f"the journal has no entry {state.last_lsn} with hash {state.last_hash[:12]}...")
    return RunHistory.from_state(state)
