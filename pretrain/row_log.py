"""The row log: loss and weight of every row that was trained on, in Parquet, about 12 bytes a row or less.

A row is named by (step, position in the global batch): the journal's plan derives its domain, epoch and number from
that (`hard_rows.py`), so that nothing else is stored. Each rank writes files of its own, one per `flush_steps` steps:

    <run>/row_log/step-00001200-attempt-0003-rank-00001.parquet     step, position: uint32; loss, weight: float32

A file appears under its name once it is complete. A run that was resumed does steps again: from the first step of an
attempt on, what earlier attempts wrote is void.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mixwright.data_mixing.errors import DataError
from mixwright.data_mixing.staging import atomic_file

FOLDER = "row_log"
FLUSH_STEPS = 100

_SCHEMA = pa.schema([
    pa.field("step", pa.uint32(), nullable=False),
    pa.field("position", pa.uint32(), nullable=False),
    pa.field("loss", pa.float32(), nullable=False),
    pa.field("weight", pa.float32(), nullable=False),
])  # fmt: skip
_REPEATING = ["step", "position"]
"""Columns with few different values in a file; losses and weights have too many for a dictionary to help."""

_NAME = re.compile(r"step-(\d{8,10})-attempt-(\d{4,})-rank-(\d{5,})\.parquet")
_LARGEST = np.iinfo(np.uint32).max

Columns = tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.float32], NDArray[np.float32]]


def row_log_folder(run_dir: Path) -> Path:
    return run_dir / FOLDER


class RowLossLog:
    """What one rank writes in one attempt. Use as a context manager: leaving it writes what is held.

    Steps come in order, a step in one `add` or several. Files hold `flush_steps` steps, or what there is at a `flush`.
    """

    def __init__(self, folder: Path, rank: int, attempt: int, flush_steps: int = FLUSH_STEPS) -> None:
        if rank < 0 or attempt < 0 or flush_steps < 1:
            raise ValueError(f"rank {rank}, attempt {attempt}, flush_steps {flush_steps}: expected >= 0, >= 0 and >= 1")
        self._folder, self._rank, self._attempt, self._flush_steps = folder, rank, attempt, flush_steps
        self._held: list[Columns] = []
        self._held_steps: list[int] = []
        self._first_open_step = 0
        for part in folder.glob(f"*-rank-{rank:05d}.parquet.part"):  # of an attempt that was killed
            part.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, step: int, positions_n: NDArray[Any], loss_n: NDArray[Any], weight_n: NDArray[Any]) -> None:
        """Rows of `step`, [n] each; copied.

        positions_n: int64, in the global batch. loss_n: float32, mean plain cross-entropy of the row, nats per token.
        weight_n: float32, relative to uniform: weight in the step's objective times its number of samples.
        Raises ValueError when they do not fit together, DataError when a file cannot be written.
        """
        self._check(step, positions_n, loss_n, weight_n)
        if len(positions_n) == 0:
            return
        if not self._held_steps or step > self._held_steps[-1]:
            if len(self._held_steps) == self._flush_steps:
                self.flush()
            self._held_steps.append(step)
        step_n = np.full(len(positions_n), step, np.uint32)
        columns = (np.array(positions_n, np.uint32), np.array(loss_n, np.float32), np.array(weight_n, np.float32))
        self._held.append((step_n, *columns))

    def flush(self) -> None:
        """Write what is held, so that a resume from here loses none of it: call it before each checkpoint.

        The steps written take no more rows. Raises DataError; the rows are then still held.
        """
        if not self._held:
            return
        name = f"step-{self._held_steps[0]:08d}-attempt-{self._attempt:04d}-rank-{self._rank:05d}.parquet"
        arrays = [np.concatenate(parts) for parts in zip(*self._held, strict=True)]
        table = pa.Table.from_arrays([pa.array(array) for array in arrays], schema=_SCHEMA)
        with atomic_file(self._folder / name, durable=True) as file:
            pq.write_table(table, file, use_dictionary=_REPEATING, write_page_checksum=True)
        self._first_open_step = self._held_steps[-1] + 1
        self._held, self._held_steps = [], []

    def close(self) -> None:
        """Write what is held; the log may be closed more than once."""
        self.flush()

    def _check(self, step: int, positions_n: NDArray[Any], loss_n: NDArray[Any], weight_n: NDArray[Any]) -> None:
        shapes = [np.shape(array) for array in (positions_n, loss_n, weight_n)]
        if len(shapes[0]) != 1 or any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"step {step}: expected three arrays [n], found shapes {shapes}")
        first_open = self._held_steps[-1] if self._held_steps else self._first_open_step
        if not first_open <= step <= _LARGEST:
            raise ValueError(f"step {step}: steps come in order, this log takes rows from step {first_open} on")
        if len(positions_n) and not 0 <= np.min(positions_n) <= np.max(positions_n) <= _LARGEST:
            raise ValueError(f"step {step}: positions {np.min(positions_n)} to {np.max(positions_n)} are no uint32")


@dataclass(frozen=True, eq=False)
class RowLog:
    """All rows of a log in order of step and position, [n] each: step, position int64; loss, weight float32."""

    step_n: NDArray[np.int64]
    position_n: NDArray[np.int64]
    loss_n: NDArray[np.float32]
    weight_n: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.step_n)

    def take(self, which_m: NDArray[Any]) -> RowLog:
        """The rows at these indices, or where this mask holds, in that order."""
        return RowLog(self.step_n[which_m], self.position_n[which_m], self.loss_n[which_m], self.weight_n[which_m])


_NO_ROWS = RowLog(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.float32))


def read_row_log(folder: Path, only_step: int | None = None) -> RowLog:
    """All that was logged and is not void, or that of one step. Files of other names, half-written ones among them, are
    not read, and of those that cannot hold `only_step` only the name is.

    Raises DataError when there is no log, a file is damaged (named), or two files have the same row.
    """
    names = [name for path in folder.iterdir() if (name := _NAME.fullmatch(path.name))] if folder.is_dir() else []
    if not names:
        raise DataError(f"{folder}: no row log; training writes one with `metrics.row_log: true`")
    first_steps: dict[int, int] = {}
    for name in names:
        step, attempt = int(name[1]), int(name[2])
        first_steps[attempt] = min(step, first_steps.get(attempt, step))
    parts = []
    for name in sorted(names if only_step is None else _covering(names, only_step), key=lambda name: name[0]):
        void_from = min((s for attempt, s in first_steps.items() if attempt > int(name[2])), default=_LARGEST + 1)
        if int(name[1]) < void_from:
            rows = _read_file(folder / name[0], int(name[1]))
            parts.append(rows if rows.step_n[-1] < void_from else rows.take(rows.step_n < void_from))
    if only_step is not None:
        parts = [rows.take(rows.step_n == only_step) for rows in parts]
    return _in_order(folder, parts or [_NO_ROWS])


def _covering(names: list[re.Match[str]], step: int) -> list[re.Match[str]]:
    """Of each attempt and rank, the last file that begins at or before `step`: files hold steps without gaps."""
    latest: dict[tuple[str, str], re.Match[str]] = {}
    for name in sorted(names, key=lambda name: int(name[1])):
        if int(name[1]) <= step:
            latest[name[2], name[3]] = name
    return list(latest.values())


def _read_file(path: Path, first_step: int) -> RowLog:
    """Rows of one file, as they stand."""
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable row log file: {' '.join(str(error).split())}") from None
    found = ", ".join(f"{field.name}: {field.type}" for field in table.schema)
    expected = ", ".join(f"{field.name}: {field.type}" for field in _SCHEMA)
    if found != expected or any(column.null_count for column in table.columns):
        raise DataError(f"{path}: not a row log file: has columns {found}, expected {expected} without nulls")
    step_n, position_n, loss_n, weight_n = (column.to_numpy() for column in table.columns)
    if len(step_n) == 0 or step_n[0] != first_step or (step_n[1:] < step_n[:-1]).any():
        raise DataError(f"{path}: not the file of this name: its {len(step_n)} rows are not of steps {first_step} on")
    return RowLog(step_n.astype(np.int64), position_n.astype(np.int64), loss_n, weight_n)


def _in_order(folder: Path, parts: list[RowLog]) -> RowLog:
    log = RowLog(
        np.concatenate([part.step_n for part in parts]),
        np.concatenate([part.position_n for part in parts]),
        np.concatenate([part.loss_n for part in parts]),
        np.concatenate([part.weight_n for part in parts]),
    )
    log = log.take(np.lexsort((log.position_n, log.step_n)))
    again_n = (np.diff(log.step_n) == 0) & (np.diff(log.position_n) == 0)
    if again_n.any():
        at = int(again_n.argmax())
        raise DataError(f"{folder}: two files have the row of step {log.step_n[at]}, position {log.position_n[at]}")
    return log
