"""A journal entry as a file: canonical JSON, one immutable file for each entry, linked by a hash chain.

    {"entry":{"body":{...},"lsn":7,"prev":"<its hash>","time":1.5,"type":"COMMIT","writer":"leader"},"hash":"..."}

Keys are sorted, there is no white space, text is ASCII. `hash` is the SHA-256 of the bytes of the `entry` object, so
that an audit needs no knowledge of the types. The file of entry 7 is 00000007.json.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixwright.data_mixing.config_file import StrictModel, validate
from mixwright.data_mixing.entries import BODY_TYPES, EntryBody
from mixwright.data_mixing.errors import ConfigError, JournalError, nearest
from mixwright.data_mixing.plain_data import parse_json

NO_HASH = "0" * 64
"""`prev` of the first entry."""

_FRAME = re.compile(rb'\{"entry":(\{.*\}),"hash":"([0-9a-f]{64})"\}\n', re.DOTALL)
_ENTRY_NAME = re.compile(r"[0-9]{8}\.json")
_TYPE_OF_BODY = {body_type: name for name, body_type in BODY_TYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One entry of a run's record. `time` is the writer's clock in Unix seconds and decides nothing."""

    lsn: int
    type: str
    body: EntryBody
    writer: str
    time: float
    prev: str
    hash: str


def entry_path(folder: Path, lsn: int) -> Path:
    """The file of entry `lsn`."""
    return folder / f"{lsn:08d}.json"


def entry_numbers(folder: Path) -> list[int]:
    """Numbers of the entry files in `folder`, ascending. Raises JournalError when the folder cannot be listed."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        raise JournalError(f"{folder}: the journal folder cannot be read: {error.strerror}") from None
    return sorted(int(name[:8]) for name in names if _ENTRY_NAME.fullmatch(name))


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value. Raises ValueError for NaN and infinity, TypeError for what is no JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def sealed(lsn: int, body: EntryBody, writer: str, time: float, prev: str) -> tuple[Entry, bytes]:
    """A new entry and the bytes of its file. Raises JournalError when the body cannot be written as JSON."""
    entry_type = _TYPE_OF_BODY.get(type(body))
    if entry_type is None:
        raise JournalError(f"{type(body).__name__} is no body of a journal entry{nearest('', BODY_TYPES)}")
    head = {"lsn": lsn, "type": entry_type, "writer": writer, "time": time, "prev": prev}
    try:
        payload = canonical_json({**head, "body": body.model_dump(mode="json")})
    except (TypeError, ValueError) as error:
        raise JournalError(f"a {entry_type} entry cannot be written as JSON: {error}") from None
    digest = hashlib.sha256(payload).hexdigest()
    raw = b'{"entry":' + payload + b',"hash":"' + digest.encode() + b'"}\n'
    return Entry(lsn, entry_type, body, writer, time, prev, digest), raw


def read_entry(folder: Path, lsn: int, prev: str | None) -> Entry | None:
    """Entry `lsn`, checked against its hash and against `prev`, the hash before it (None: not checked).

    None when there is no such file. Raises JournalError naming the file and what is wrong with it.
    """
    path = entry_path(folder, lsn)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise JournalError(f"{path}: cannot be read: {error.strerror}") from None
    entry = _decode(path, raw)
    if entry.lsn != lsn:
        raise JournalError(f"{path}: holds entry {entry.lsn}; expected entry {lsn}")
    if prev is not None and entry.prev != prev:
        raise JournalError(
            f"{path}: follows an entry with hash {entry.prev[:12]}..., but entry {lsn - 1} here has {prev[:12]}...: "
            "it belongs to another journal, or the entry before it was replaced"
        )
    return entry


def _decode(path: Path, raw: bytes) -> Entry:
    frame = _FRAME.fullmatch(raw)
    if frame is None:
        raise JournalError(f"{path}: is not a complete journal entry ({len(raw)} bytes): torn, or not written by us")
    payload, recorded = frame[1], frame[2].decode()
    digest = hashlib.sha256(payload).hexdigest()
    if digest != recorded:
        raise JournalError(f"{path}: content has hash {digest[:12]}..., recorded is {recorded[:12]}...: it was altered")
    try:
        tree = parse_json(payload)
        lsn, entry_type, body = int(tree["lsn"]), str(tree["type"]), tree["body"]
        writer, clock, prev = str(tree["writer"]), float(tree["time"]), str(tree["prev"])
        if not math.isfinite(clock):
            raise ValueError(f"time {clock} is no time")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise JournalError(f"{path}: is not a journal entry: {error!r}") from None
    return Entry(lsn, entry_type, _body(path, entry_type, body), writer, clock, prev, recorded)


def _body(path: Path, entry_type: str, tree: Any) -> EntryBody:
    model: type[StrictModel] | None = BODY_TYPES.get(entry_type)
    if model is None:
        raise JournalError(f"{path}: unknown entry type {entry_type!r}{nearest(entry_type, BODY_TYPES)}")
    try:
        return validate(model, tree, f"{path}: {entry_type}")  # type: ignore[return-value]
    except ConfigError as error:
        raise JournalError(str(error)) from None
