"""Rows of preference files, one after the other, each with its place: JSONL (also .gz), Parquet, a `datasets` path."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from mixwright.data_mixing.answers import one_line
from mixwright.data_mixing.corpora import DatasetSource
from mixwright.data_mixing.errors import DataError, nearest
from mixwright.data_mixing.hub import describe, open_dataset
from mixwright.data_mixing.manifest import fingerprint
from mixwright.data_mixing.plain_data import parse_json, read_json_object
from mixwright.pretrain.rpo.config import ColumnsConfig
from mixwright.pretrain.rpo.pair_counts import BadPair

_JSONL, _PARQUET = (".jsonl", ".ndjson"), (".parquet",)
_BATCH_ROWS = 1000
_MANY_KEYS = 1000
_BROKEN_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)


@dataclass(frozen=True)
class Row:
    """One row: its values by column, and how much of its source has been read with it."""

    where: str
    values: dict[str, Any]
    position: int


@dataclass(frozen=True)
class Source:
    """A source of rows. `fingerprint` identifies its content; `size`, like positions in it, is in bytes or rows."""

    name: str
    fingerprint: str
    size: int
    rows: Callable[[], Iterator[Row | BadPair]]


def open_source(path: str, split: str, columns: ColumnsConfig) -> Source:
    """The source that `path` names; `split` is of a `datasets` path.

    Raises DataError when it cannot be read, or its schema lacks a column. Of JSONL only the lines tell: there the last
    row is followed by that error when no row had the column. A row that is no JSON object comes as a BadPair.
    """
    file = Path(path)
    suffix = _suffix(file)
    if not file.is_dir() and suffix in _JSONL + _PARQUET:
        try:
            return _jsonl(file, columns) if suffix in _JSONL else _parquet(file, columns)
        except FileNotFoundError:
            siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
            raise DataError(f"{path}: no such file{nearest(file.name, siblings) if siblings else ''}") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if file.is_file():
        raise DataError(f"{path}: expected a file that ends with .jsonl, .ndjson (also .gz) or .parquet")
    return _dataset(DatasetSource(path=path, split=split), columns)


def _suffix(path: Path) -> str:
    return (Path(path.stem).suffix if path.suffix == ".gz" else path.suffix).lower()


def _wanted(columns: ColumnsConfig) -> dict[str, str]:
    """Columns that must be there, by the key that names each."""
    named = {"prompt": columns.prompt, "chosen": columns.chosen, "rejected": columns.rejected}
    return {f"data.columns.{key}": column for key, column in named.items() if column is not None}


def _check_columns(name: str, found: Iterable[str], columns: ColumnsConfig) -> None:
    found = set(found)
    for key, column in _wanted(columns).items():
        if column not in found:
            remedy = "" if key != "data.columns.prompt" else "; messages that hold their prompt want `prompt: null`"
            raise DataError(f"{name}: no column {column!r} ({key}){nearest(column, found)}{remedy}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- JSONL ------------------------------------------------------------------------------------------------------


def _jsonl(path: Path, columns: ColumnsConfig) -> Source:
    return Source(str(path), _sha256(path), path.stat().st_size, lambda: _jsonl_rows(path, columns))


def _jsonl_rows(path: Path, columns: ColumnsConfig) -> Iterator[Row | BadPair]:
    keys: set[str] = set()
    num_objects = 0
    for number, line, position in _lines(path):
        row = _parse(f"{path}:{number}", line, position)
        if isinstance(row, Row):
            num_objects += 1
            if len(keys) < _MANY_KEYS:
                keys.update(row.values)
        yield row
    if num_objects:
        _check_columns(str(path), keys, columns)


def _lines(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """Number, content and end (in bytes of the file) of each line that is not blank."""
    number = 0
    try:
        with path.open("rb") as raw, _unpacked(raw, path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line, raw.tell()
    except _BROKEN_GZIP as error:
        raise DataError(f"{path}:{number + 1}: broken gzip file from here on: {one_line(error)}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _unpacked(raw: BinaryIO, path: Path) -> BinaryIO:
    return gzip.open(raw) if path.suffix == ".gz" else raw  # type: ignore[return-value]


def _parse(where: str, line: bytes, position: int) -> Row | BadPair:
    try:
        record = parse_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 text: byte 0x{error.object[error.start]:02x} ({error.reason})"
        return BadPair(where, "malformed", problem)
    except ValueError as error:
        return BadPair(where, "malformed", f"not a JSON value: {one_line(error)}")
    if not isinstance(record, dict):
        return BadPair(where, "malformed", f"expected a JSON object, found {type(record).__name__}")
    return Row(where, record, position)


# --- Parquet ----------------------------------------------------------------------------------------------------


def _parquet(path: Path, columns: ColumnsConfig) -> Source:
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(str(path), file.schema_arrow.names, columns)
            num_rows = file.metadata.num_rows
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file: {one_line(error)}") from None
    return Source(str(path), _sha256(path), num_rows, lambda: _parquet_rows(path, columns))


def _parquet_rows(path: Path, columns: ColumnsConfig) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            batches = file.iter_batches(_BATCH_ROWS, columns=list(dict.fromkeys(_wanted(columns).values())))
            yield from _numbered(str(path), (batch.to_pylist() for batch in batches))
    except (pa.ArrowInvalid, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}: broken Parquet file: {one_line(error)}") from None


def _numbered(name: str, batches: Iterable[list[dict[str, Any]]]) -> Iterator[Row]:
    """Rows counted from 0."""
    for number, values in enumerate(values for batch in batches for values in batch):
        yield Row(f"{name}: row {number}", values, number + 1)


# --- datasets ---------------------------------------------------------------------------------------------------


def _dataset(source: DatasetSource, columns: ColumnsConfig) -> Source:
    _check_split(source)
    table = open_dataset(source)
    _check_columns(describe(source), table.column_names, columns)
    # `datasets` identifies content by this; it has no public name for it.
    identity = fingerprint({"dataset": table._fingerprint, "split": source.split})
    table = table.select_columns(list(dict.fromkeys(_wanted(columns).values()))).with_format(None)
    return Source(describe(source), identity, len(table), lambda: _dataset_rows(describe(source), table))


def _check_split(source: DatasetSource) -> None:
    """Of a saved folder with splits, the one that is asked for must be there."""
    listing = Path(source.path) / "dataset_dict.json"
    if listing.is_file():
        try:
            splits = list(map(str, read_json_object(listing)["splits"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{listing}: not the list of a dataset's splits: {one_line(error)}") from None
        if source.split not in splits:
            raise DataError(f"dataset {source.path!r}: no split {source.split!r}{nearest(source.split, splits)}")


def _dataset_rows(name: str, table: Any) -> Iterator[Row]:
    def as_rows(batch: dict[str, list[Any]]) -> list[dict[str, Any]]:
        return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]

    yield from _numbered(name, (as_rows(batch) for batch in table.iter(_BATCH_ROWS)))
