"""Proxy runs as Ray tasks: bounded parallelism, each result written by its worker, whatever is finished kept.

The one file for proxy runs that imports Ray, and it does so when it is asked to. Ray is started as for the mixing
service: private to this user and machine, with a token, or the cluster at an address.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mixwright.data_mixing.answers import one_line
from mixwright.data_mixing.errors import MixingError, ServiceUnavailable
from mixwright.data_mixing.store import TokenStore
from mixwright.launch import ray_environment
from mixwright.launch.mixing_host import make_ray_folder, remove_ray_folder, write_token
from mixwright.pretrain.proxy import ProxyRecord, ProxyRun, run_key
from mixwright.pretrain.sweeps.perform import Execute, find_record, perform

logger = logging.getLogger(__name__)

Tell = Callable[[int, int, ProxyRecord], None]
"""Called after each run that was performed: how many are done, of how many, and its record."""

OBJECT_STORE_BYTES = 80 << 20
RETRIES = 2
"""Of a run whose worker process died."""


class OutOfTime(MixingError):
    """The time budget is spent; what is finished is kept, the same command goes on."""

    exit_code = 3


@contextlib.contextmanager
def executor(
    folder: Path, num_workers: int, tell: Tell, *, address: str | None = None, deadline: float | None = None
) -> Iterator[Execute]:
    """Performs runs `num_workers` at a time (0: one after the other in this process), each on one CPU.

    Records are kept in `folder`, which on a cluster all nodes must share. After `deadline` (time.monotonic) no run is
    begun, and the call raises OutOfTime. Raises ServiceUnavailable when Ray cannot be had.
    """
    if num_workers == 0:
        yield lambda runs: _perform_all(runs, folder, tell, deadline, _one_by_one)
        return
    with _ray(num_workers, address) as remote:
        yield lambda runs: _perform_all(runs, folder, tell, deadline, _Parallel(remote, num_workers))


def _perform_all(
    runs: Sequence[ProxyRun], folder: Path, tell: Tell, deadline: float | None, map_: Any
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
    for record in map_(list(waiting.values()), folder, deadline):
        records[record.key] = record
        tell(len(records), len(set(keys)), record)
    return [records[key] for key in keys]


def _one_by_one(runs: Sequence[ProxyRun], folder: Path, deadline: float | None) -> Iterator[ProxyRecord]:
    for run in runs:
        _check_time(deadline)
        yield perform(run, folder)


class _Parallel:
    """Runs as Ray tasks, at most `num_workers` at a time; records in order of completion."""

    def __init__(self, remote: Any, num_workers: int) -> None:
        self._remote, self._num_workers = remote, num_workers

    def __call__(self, runs: Sequence[ProxyRun], folder: Path, deadline: float | None) -> Iterator[ProxyRecord]:
        import ray

        waiting = list(reversed(runs))
        running: list[Any] = []
        try:
            while waiting or running:
                while waiting and len(running) < self._num_workers and not _is_over(deadline):
                    running.append(self._remote.remote(waiting.pop(), folder.resolve()))
                if not running:
                    _check_time(deadline)
                done, running = ray.wait(running, num_returns=1)
                yield _result(done[0])
        finally:
            for task in running:
                ray.cancel(task, force=True)


def _result(task: Any) -> ProxyRecord:
    """Raises what the run raised, and ServiceUnavailable when its worker is lost for good."""
    import ray

    try:
        outcome = ray.get(task)
    except ray.exceptions.RayError as error:
        raise ServiceUnavailable(f"a proxy run was lost: {one_line(error)}; run the same command again") from None
    if isinstance(outcome, MixingError):
        raise outcome
    record: ProxyRecord = outcome
    return record


def perform_quietly(run: ProxyRun, folder: Path) -> ProxyRecord | MixingError:
    """`perform` in a Ray worker; an expected failure is a value, so that Ray does not wrap it in a traceback."""
    try:
        return perform(run, folder)
    except MixingError as error:
        return error


@contextlib.contextmanager
def _ray(num_workers: int, address: str | None) -> Iterator[Any]:
    """A Ray remote function that performs a run."""
    address = address or os.environ.get("RAY_ADDRESS")
    private = address in (None, "", "local")
    folder = make_ray_folder() if private else None
    before = dict(os.environ)
    try:
        if folder is not None:
            write_token(folder / "auth_token")
            ray_environment.apply(ray_environment.private_ray(folder / "auth_token"))
        else:
            ray_environment.apply(ray_environment.attached_ray(os.environ))
        yield _start(num_workers, None if private else address, folder)
    finally:
        with contextlib.suppress(Exception):
            import ray

            ray.shutdown()
        remove_ray_folder(folder)
        ray_environment.apply({name: before.get(name) for name in {**os.environ, **before}})


def _start(num_workers: int, address: str | None, folder: Path | None) -> Any:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is not None:
            ray.init(address=address, **quiet)
        else:
            ray.init(
                address="local", num_cpus=num_workers, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False,
                _temp_dir=str(folder / "ray" if folder else ""), **quiet,
            )  # fmt: skip
    except Exception as error:  # Ray documents none of what a failing start raises
        raise ServiceUnavailable(f"Ray cannot be used for proxy runs: {one_line(error)}") from None
    return ray.remote(perform_quietly).options(num_cpus=1, max_retries=RETRIES)


def _is_over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


def _check_time(deadline: float | None) -> None:
    if _is_over(deadline):
        raise OutOfTime("the time budget is spent; finished runs are kept, the same command goes on")
