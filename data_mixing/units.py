"""Units: sources cut into parts that one process reads on its own.

A unit is a text file, a byte range of a JSONL file, a row group of a Parquet file, or a range of rows of a
`datasets` table. Reading a unit twice gives the same documents in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mixwright.data_mixing.corpora import DatasetSource, DomainSource, Format
from mixwright.data_mixing.errors import DataError, nearest
from mixwright.data_mixing.staging import storage_error

UNIT_BYTES = 64 << 20
_SUFFIXES: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class Unit:
    """A part of a source. `start` and `stop` count bytes (jsonl), row groups (parquet) or rows (dataset).

    `label` and `first_line` give documents the position that they have in their source rather than in `path`.
    """

    path: Path
    format: str
    text_field: str
    num_bytes: int
    start: int = 0
    stop: int = 0
    dataset: DatasetSource | None = None
    label: str = ""
    first_line: int = 1

    def at(self, line: int) -> str:
        """`file:line`, for a line counted from 0 within the file."""
        return f"{self.label or self.path}:{self.first_line + line}"


def file_units(path: Path, source: DomainSource, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """`path` cut into units; raises DataError when it cannot be opened or lacks the text column."""
    format = _format_of(path) if source.format == "auto" else source.format
    try:
        size = path.stat().st_size
        if format == "parquet":
            return _parquet_units(path, source.text_field, size)
    except OSError as error:
        raise storage_error(f"{path}: cannot be read", error) from None
    # Neither a gzip stream nor a document that is a whole file can be entered in the middle.
    step = unit_bytes if format == "jsonl" and path.suffix != ".gz" else max(size, 1)
    starts = range(0, max(size, 1), step)
    return [Unit(path, format, source.text_field, min(step, size - s), s, min(s + step, size)) for s in starts]


def _format_of(path: Path) -> Format:
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return _SUFFIXES.get(suffix.lower(), "text")


def _parquet_units(path: Path, text_field: str, size: int) -> list[Unit]:
    try:
        with pq.ParquetFile(path) as file:
            names, num_groups = file.schema_arrow.names, file.num_row_groups
            if text_field not in names:
                raise DataError(f"{path}: no column {text_field!r}{nearest(text_field, names)}")
            column = file.schema_arrow.field(text_field).type
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file: {' '.join(str(error).split())}") from None
    if not (pa.types.is_string(column) or pa.types.is_large_string(column)):
        raise DataError(f"{path}: column {text_field!r} has type {column}, expected string")
    return [Unit(path, "parquet", text_field, size // num_groups, i, i + 1) for i in range(num_groups)]
