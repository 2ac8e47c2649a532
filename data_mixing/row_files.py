"""Row files: rows of one domain and split in one Arrow file, written with `datasets`, read as a strided view.

The file is an Arrow IPC stream with one column `tokens` (fixed-size list), in record batches of equal numbers of
rows. The batches' values then lie at a constant pitch in the file, and row r is at [r // batch, r % batch] of one
3-D view over the memory map. Where the pitch is not constant, one 2-D view per batch does the same, slower.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from mixwright.data_mixing.errors import StoreChanged

COLUMN = "tokens"
_PROBE_BYTES = 4096
_BLOCK_ROWS = 4096


def write_rows(file: BinaryIO, blocks: Iterable[NDArray[Any]], width: int, dtype: str) -> str:
    """Write blocks of rows [n, width], each one record batch; returns the SHA-256 of their tokens."""
    from datasets import Features, List, Value  # seconds to import; reading does not need it
    from datasets.arrow_writer import ArrowWriter

    features = Features({COLUMN: List(Value(dtype), length=width)})
    digest = hashlib.sha256()
    writer = ArrowWriter(features=features, stream=file)
    for rows_NW in blocks:
        digest.update(rows_NW.astype(f"<u{rows_NW.itemsize}", copy=False).data)
        column = pa.FixedSizeListArray.from_arrays(pa.array(rows_NW.reshape(-1)), width)
        writer.write_table(pa.table({COLUMN: column}, schema=features.arrow_schema), len(rows_NW))
    writer.finalize(close_stream=False)
    return digest.hexdigest()


def probe(path: Path) -> str:
    """SHA-256 of the first, middle and last block of a file: a cheap sign that it is still the same."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start in (0, size // 2, max(size - _PROBE_BYTES, 0)):
            file.seek(start)
            digest.update(file.read(_PROBE_BYTES))
    return digest.hexdigest()


@dataclass(frozen=True)
class RowFileView:
    """Rows of an open file: one `strided` view [batches, rows, width], or else one view [rows, width] per batch."""

    strided: NDArray[Any] | None
    batches: tuple[NDArray[Any], ...]
    first_row_b: NDArray[np.int64]

    def take(self, row_n: NDArray[np.int64]) -> NDArray[Any]:
        """A copy of the rows, in the order given; [n, width]. The rows must be in the file: this is not checked."""
        if self.strided is not None:
            return self.strided[np.divmod(row_n, self.strided.shape[1])]
        batch_n = np.searchsorted(self.first_row_b, row_n, side="right") - 1
        within_n = row_n - self.first_row_b[batch_n]
        return np.stack([self.batches[b][r] for b, r in zip(batch_n.tolist(), within_n.tolist(), strict=True)])


def rows_sha256(view: RowFileView, num_rows: int) -> str:
    """SHA-256 of the tokens of all rows, as `write_rows` returned it. Reads the whole file."""
    digest = hashlib.sha256()
    for first in range(0, num_rows, _BLOCK_ROWS):
        rows_NW = view.take(np.arange(first, min(first + _BLOCK_ROWS, num_rows)))
        digest.update(np.ascontiguousarray(rows_NW, dtype=rows_NW.dtype.newbyteorder("<")).data)
    return digest.hexdigest()


def open_rows(path: Path, width: int, dtype: str, num_rows: int) -> RowFileView:
    """Map a row file of `num_rows` rows; raises StoreChanged when it does not hold them."""
    try:
        with pa.memory_map(str(path)) as mapped:
            content = mapped.read_buffer()
        # The file descriptor is closed from here on; the map lives as long as `content` is referred to.
        batches = _batch_views(content, width, np.dtype(dtype))
    except (OSError, ValueError, KeyError) as error:  # ArrowInvalid is a ValueError
        raise StoreChanged(f"{path}: not a readable row file: {' '.join(str(error).split())}") from None
    found = sum(map(len, batches))
    if found != num_rows:
        raise StoreChanged(f"{path}: holds {found} rows, the manifest says {num_rows}")
    first_row_b = np.cumsum([0, *map(len, batches)])[:-1]
    strided = _strided(batches)
    return RowFileView(strided, () if strided is not None else batches, first_row_b)


def _batch_views(content: pa.Buffer, width: int, dtype: np.dtype[Any]) -> tuple[NDArray[Any], ...]:
    """Views [rows, width] of the record batches; raises ValueError when the column is not what is expected."""
    expected = pa.list_(pa.from_numpy_dtype(dtype), width)
    views = []
    for batch in pa.ipc.open_stream(content):
        column = batch.column(COLUMN)
        if column.type.list_size != width or column.type.value_type != expected.value_type or column.null_count:
            raise ValueError(f"column {COLUMN!r} has type {column.type}, expected {expected} without nulls")
        values = column.values
        flat = np.frombuffer(values.buffers()[1], dtype, len(batch) * width, values.offset * dtype.itemsize)
        views.append(flat.reshape(len(batch), width))
    return tuple(views)


def _strided(batches: tuple[NDArray[Any], ...]) -> NDArray[Any] | None:
    """One view [batches, rows, width] over all of them; None when rows per batch or pitch differ.

    The last batch may be shorter. The view then extends over rows that are not there: callers check row numbers.
    """
    rows_b = [len(batch) for batch in batches]
    address_b = np.array([batch.ctypes.data for batch in batches])
    if len(set(rows_b[:-1]) | {rows_b[0]}) > 1 or rows_b[-1] > rows_b[0] or len(set(np.diff(address_b))) > 1:
        return None
    first = batches[0]
    pitch = int(address_b[1] - address_b[0]) if len(batches) > 1 else first.nbytes
    return as_strided(first, (len(batches), *first.shape), (pitch, *first.strides), writeable=False)
