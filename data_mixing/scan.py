"""First pass over the documents: identities and sizes, so that duplicates, limits and splits can be decided."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.documents import BadDocument, read_unit
from mixwright.data_mixing.errors import DataError
from mixwright.data_mixing.selection import Scan, concatenate, identity_of, rank_of
from mixwright.data_mixing.staging import atomic_file
from mixwright.data_mixing.units import Unit

MAX_BAD_EXAMPLES = 5


@dataclass(frozen=True)
class Task:
    """Consecutive units of one domain, which one process reads. `index` counts tasks over all domains."""

    index: int
    domain: str
    units: tuple[Unit, ...]
    min_chars: int

    @property
    def num_bytes(self) -> int:
        return sum(unit.num_bytes for unit in self.units)


@dataclass(frozen=True)
class ScanTask:
    """Scan `task` into the file `result`."""

    task: Task
    result: Path
    seed: int
    stop_on_bad: bool

    @property
    def work(self) -> int:
        return self.task.num_bytes


def run_scan(scan_task: ScanTask) -> None:
    """Write the Scan of a task; raises DataError at the first bad document under the policy `stop`."""
    scans = [_scan_unit(unit, scan_task) for unit in scan_task.task.units]
    scanned = concatenate(scans)
    summary = {"num_short": scanned.num_short, "num_bad": scanned.num_bad, "bad": scanned.bad[:MAX_BAD_EXAMPLES]}
    with atomic_file(scan_task.result) as file:
        np.savez(
            file,
            identity_n2=scanned.identity_n2,
            rank_n=scanned.rank_n,
            num_bytes_n=scanned.num_bytes_n,
            per_unit=scanned.per_unit,
            summary=np.frombuffer(json.dumps(summary).encode(), np.uint8),
        )


def read_scan(path: Path) -> Scan:
    """A Scan that `run_scan` wrote."""
    with np.load(path) as arrays:
        summary = json.loads(arrays["summary"].tobytes())
        return Scan(
            arrays["identity_n2"], arrays["rank_n"], arrays["num_bytes_n"], arrays["per_unit"],
            summary["num_short"], summary["num_bad"], tuple(summary["bad"]),
        )  # fmt: skip


def _scan_unit(unit: Unit, scan_task: ScanTask) -> Scan:
    identities, ranks, sizes, bad = [], [], [], []
    num_short = num_bad = 0
    for document in read_unit(unit):
        if isinstance(document, BadDocument):
            if scan_task.stop_on_bad:
                raise DataError(f"{document}; `on_bad_document: skip` leaves such documents out and counts them")
            num_bad += 1
            bad += [str(document)] if num_bad <= MAX_BAD_EXAMPLES else []
        elif is_short(document, scan_task.task.min_chars):
            num_short += 1
        else:
            text = document.encode()
            identities.append(identity_of(text))
            ranks.append(rank_of(identities[-1], scan_task.seed))
            sizes.append(len(text))
    identity_n2 = np.frombuffer(b"".join(identities), "<u8").reshape(-1, 2)
    rank_n, num_bytes_n = np.array(ranks, np.uint64), np.array(sizes, np.int64)
    return Scan(identity_n2, rank_n, num_bytes_n, np.array([len(sizes)]), num_short, num_bad, tuple(bad))


def is_short(text: str, min_chars: int) -> bool:
    """Fewer than `min_chars` characters between the outer white space."""
    return len(text.strip()) < min_chars


def usable_texts(task: Task) -> Iterator[str]:
    """The documents that a task's Scan lists, in its order."""
    for document in itertools.chain.from_iterable(map(read_unit, task.units)):
        if isinstance(document, str) and not is_short(document, task.min_chars):
            yield document


def narrow(task: Task, scan: Scan, wanted_n: NDArray[np.bool_]) -> tuple[Task, NDArray[np.bool_]]:
    """The task without the units in which no document is wanted, and bool [n]: which documents are left."""
    unit_n = np.repeat(np.arange(len(task.units)), scan.per_unit)
    needed = np.zeros(len(task.units), bool)
    needed[unit_n[wanted_n]] = True
    return replace(task, units=tuple(itertools.compress(task.units, needed))), needed[unit_n]
