"""Run a function on several real ranks: spawned processes with the environment that a launcher would set."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

TIMEOUT_S = 240.0


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """Results of `function(*arguments)` in order of rank; `function` must be importable from a test module."""
    context = multiprocessing.get_context("spawn")
    port = free_port()
    results: Any = context.Queue()
    processes = [
        context.Process(target=_rank, args=(rank, world, port, results, function, arguments)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(_checked(results.get(timeout=TIMEOUT_S)) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()
    return [found[rank] for rank in range(world)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank(
    rank: int, world: int, port: int, results: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    try:
        # Pickled here: a queue would share tensors through descriptors, which end with this process.
        results.put((rank, pickle.dumps(function(*arguments)), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def _checked(item: tuple[int, bytes, str | None]) -> tuple[int, Any]:
    rank, value, failure = item
    if failure is not None:
        raise AssertionError(f"rank {rank} failed:\n{failure}")
    return rank, pickle.loads(value)
