"""Proxy runs as Ray tasks: each result written by its worker, whatever is finished kept, equal runs performed once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from mixwright.data_mixing.store import TokenStore
from mixwright.launch.ray_tasks import TaskMap, TaskOptions, task_map
from mixwright.pretrain.proxy import ProxyRecord, ProxyRun, run_key
from mixwright.pretrain.sweeps.perform import Execute, find_record, perform

Tell = Callable[[int, int, ProxyRecord], None]
"""Called after each run that was performed: how many are done, of how many, and its record."""


@contextlib.contextmanager
def executor(
    folder: Path, num_workers: int, tell: Tell, *, address: str | None = None, deadline: float | None = None
) -> Iterator[Execute]:
    """Performs runs `num_workers` at a time (0: one after the other in this process), each on one CPU.

    Records are kept in `folder`, which on a cluster all nodes must share. After `deadline` (time.monotonic) no run is
    begun, and the call raises OutOfTime. Raises ServiceUnavailable when Ray cannot be had.
    """
    work = partial(perform, folder=folder.resolve())
    with task_map(work, num_workers, TaskOptions("a proxy run"), address) as map_:
        yield lambda runs: _perform_all(runs, folder, tell, deadline, map_)


def _perform_all(
    runs: Sequence[ProxyRun], folder: Path, tell: Tell, deadline: float | None, map_: TaskMap[ProxyRun, ProxyRecord]
) -> list[ProxyRecord]:
    """Records of all runs: finished ones are read, equal ones performed once."""
    fingerprints = {run.store: TokenStore.open(run.store).fingerprint for run in runs}
    keys = [run_key(run, fingerprints[run.store]) for run in runs]
    records: dict[str, ProxyRecord] = {}
    waiting: dict[str, ProxyRun] = {}
    for key, run in zip(keys, runs, strict=True):
        found = find_record(run, folder, fingerprints[run.store])
        if found is None:
            waiting.setdefault(key, run)
        else:
            records[key] = found
    for _, record in map_(list(waiting.values()), deadline):
        records[record.key] = record
        tell(len(records), len(set(keys)), record)
    return [records[key] for key in keys]
