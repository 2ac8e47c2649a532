"""Third pass: the tokens of a domain and split, joined over tasks and cut into rows, one Arrow file per shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.manifest import SPLITS, RowFile
from mixwright.data_mixing.row_files import probe, write_rows
from mixwright.data_mixing.staging import atomic_file
from mixwright.data_mixing.tokens import TokenFile

_BATCH_BYTES = 4 << 20


@dataclass(frozen=True)
class RowShape:
    """Tokens per row, rows per Arrow record batch, rows per file (a multiple of that)."""

    width: int
    dtype: str
    rows_per_batch: int
    rows_per_file: int


@dataclass(frozen=True)
class ShardTask:
    """Write rows first_row .. first_row + num_rows - 1 of a split to `path`, and its RowFile to `result`."""

    token_files: tuple[TokenFile, ...]
    split_index: int
    first_row: int
    num_rows: int
    shape: RowShape
    path: Path
    result: Path

    @property
    def work(self) -> int:
        return self.num_rows


def row_shape(sequence_length: int, dtype: str, shard_bytes: int) -> RowShape:
    """Shape of the files: record batches of at most 4 MiB, files of about `shard_bytes`."""
    width = sequence_length + 1
    row_bytes = width * np.dtype(dtype).itemsize
    rows_per_batch = max(1, min(_BATCH_BYTES, shard_bytes) // row_bytes)
    batches_per_file = max(1, shard_bytes // (rows_per_batch * row_bytes))
    return RowShape(width, dtype, rows_per_batch, rows_per_batch * batches_per_file)


def plan_shards(
    token_files: tuple[TokenFile, ...], split_index: int, shape: RowShape, folder: Path, results: Path
) -> list[ShardTask]:
    """The shards of one split of a domain; tokens that fill no row at the end are left out."""
    num_rows = sum(file.num_tokens[split_index] for file in token_files) // shape.width
    tasks = []
    for number, first_row in enumerate(range(0, num_rows, shape.rows_per_file)):
        name = f"{SPLITS[split_index]}-{number:05d}"
        count = min(shape.rows_per_file, num_rows - first_row)
        path, result = folder / f"{name}.arrow", results / f"{name}.json"
        tasks.append(ShardTask(token_files, split_index, first_row, count, shape, path, result))
    return tasks


def run_shard(task: ShardTask) -> None:
    """Write one Arrow file, then its RowFile, whose presence says that it is done."""
    with atomic_file(task.path, durable=True) as file:
        sha256 = write_rows(file, _row_blocks(task), task.shape.width, task.shape.dtype)
    row_file = RowFile(
        name=task.path.name,
        num_rows=task.num_rows,
        num_bytes=task.path.stat().st_size,
        sha256=sha256,
        probe=probe(task.path),
    )
    with atomic_file(task.result) as file:
        file.write(row_file.model_dump_json().encode())


def read_row_file(result: Path) -> RowFile:
    """The RowFile that `run_shard` wrote."""
    return RowFile.model_validate_json(result.read_bytes())


def _row_blocks(task: ShardTask) -> Iterator[NDArray[Any]]:
    """The shard's rows, one record batch [n, width] at a time."""
    width = task.shape.width
    last = task.first_row + task.num_rows
    for row in range(task.first_row, last, task.shape.rows_per_batch):
        stop = min(row + task.shape.rows_per_batch, last)
        tokens_n = read_tokens(task.token_files, task.split_index, row * width, stop * width)
        yield tokens_n.reshape(-1, width)


def read_tokens(files: Sequence[TokenFile], split_index: int, start: int, stop: int) -> NDArray[Any]:
    """Tokens start .. stop - 1 of a split, over the boundaries of files."""
    parts, first = [], 0
    for file in files:
        count = file.num_tokens[split_index]
        if start < first + count and first < stop:
            parts.append(file.read(split_index, max(start - first, 0), min(stop - first, count)))
        first += count
    return np.concatenate(parts)
