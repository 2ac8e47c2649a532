"""Work spread over processes: results in the order of the tasks, no process outlives the one that started it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from mixwright.data_mixing.staging import Resumable

Task = TypeVar("Task")
Result = TypeVar("Result")


class Workers:
    """`num_workers` processes, or this one when that is 1. Use as a context manager.

    When it is left by an exception, what the processes are at is abandoned, not waited for.
    """

    def __init__(self, num_workers: int | None) -> None:
        self.num_workers = num_workers or len(os.sched_getaffinity(0))
        self._running: tuple[ProcessPoolExecutor, Connection] | None = None

    def __enter__(self) -> Workers:
        if self.num_workers > 1:
            self._running = _start_pool(self.num_workers)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._running is not None:
            pool, alive = self._running
            if error is not None:
                alive.close()
            pool.shutdown(wait=True, cancel_futures=True)
            alive.close()

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """`function` of every task, in order. The first error ends it; raises Resumable when a process dies."""
        if self._running is None:
            yield from map(function, tasks)
            return
        try:
            yield from self._running[0].map(function, tasks)
        except BrokenProcessPool:
            raise Resumable(
                "a worker process was killed (out of memory?); run the same command again: it continues, "
                "and a smaller num_workers needs less memory"
            ) from None


def _start_pool(num_workers: int) -> tuple[ProcessPoolExecutor, Connection]:
    """The pool, and a connection whose closing ends its processes."""
    # Neither fork (tokenizers and pyarrow run threads) nor spawn (imports everything once per worker).
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mixwright.data_mixing.build", "datasets.arrow_writer"])
    watched, alive = context.Pipe(duplex=False)
    return ProcessPoolExecutor(num_workers, context, _begin_worker, (watched,)), alive


def _begin_worker(watched: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per worker: the processes are the parallelism
    threading.Thread(target=_end_with_parent, args=(watched,), daemon=True).start()


def _end_with_parent(watched: Connection) -> None:
    """End this process when the parent closes its end of the pipe, or is gone."""
    wait([watched])
    os._exit(1)
