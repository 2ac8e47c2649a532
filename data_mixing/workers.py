"""Work spread over processes: results in the order of the tasks, no process outlives the one that started it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

from mixwright.data_mixing.staging import Resumable

Task = TypeVar("Task")
Result = TypeVar("Result")


class Workers:
    """`num_workers` processes, or this one when that is 1. Use as a context manager."""

    def __init__(self, num_workers: int | None) -> None:
        self.num_workers = num_workers or len(os.sched_getaffinity(0))
        self._pool = _start_pool(self.num_workers) if self.num_workers > 1 else None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """`function` of every task, in order. The first error ends it; raises Resumable when a process dies."""
        if self._pool is None:
            yield from map(function, tasks)
            return
        try:
            yield from self._pool.map(function, tasks)
        except BrokenProcessPool:
            raise Resumable(
                "a worker process was killed (out of memory?); run the same command again: it continues, "
                "and a smaller num_workers needs less memory"
            ) from None


def _start_pool(num_workers: int) -> ProcessPoolExecutor:
    # Neither fork (tokenizers and pyarrow run threads) nor spawn (imports everything once per worker).
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mixwright.data_mixing.build"])
    return ProcessPoolExecutor(num_workers, mp_context=context, initializer=_begin_worker)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per worker: the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
