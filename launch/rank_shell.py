"""What Ray Train runs on every worker of a cluster job: a thin shell around one rank, and the board that it reports to.

The rank is a process of its own (`cluster_rank`), in the environment that every launcher makes. The board, an actor,
connects the shells with the job's driver: what ranks print goes there, and so into the job's log; a wish to stop comes
back.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import IO, Any

import ray
from ray.train import get_context
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

from mixwright.launch.cluster_rank import FAILED, INTERRUPTED, PARENT

FINAL = (FAILED, 2, 3, INTERRUPTED)
"""Exit codes of a rank after which nobody starts the ranks of this job again."""
EXCHANGE_INTERVAL_S = 0.5
DEAF_S = 10.0
"""Shells that have not been heard for so long are gone, or were never started."""
MAX_LINE_CHARACTERS = 2000


class RankLost(Exception):
    """A rank ended before it was done; Ray Train starts all of them again."""


class Board:
    """What the shells of a job and its driver tell each other."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._outcome: int | None = None
        self._is_stopping = self._is_over = False
        self._heard = -DEAF_S

    def exchange(self, lines: list[str]) -> tuple[bool, bool]:
        """A shell gives what its rank printed; answered: whether to stop in order, whether all is over."""
        self._heard = time.monotonic()
        self._lines += lines
        return self._is_stopping, self._is_over

    def finish(self, code: int, is_over: bool) -> None:
        """A rank ended for good. The first code counts, the others follow from it; `is_over`: end the other ranks."""
        if self._outcome is None:
            self._outcome = code
        self._is_over |= is_over

    def look(self, stop: bool) -> tuple[list[str], bool]:
        """The driver takes the lines and says whether to stop; answered: the lines, whether any shell is alive."""
        self._is_stopping = stop
        lines, self._lines = self._lines, []
        return lines, time.monotonic() - self._heard < DEAF_S

    def outcome(self) -> int | None:
        """The exit code of a rank that ended for good, other than 0."""
        return self._outcome


class MeetingPlace(Backend):  # type: ignore[misc]
    """Tells the workers where the ranks meet. Joining the process group is left to the ranks."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        address, port = worker_group.execute_single(0, _free_address)
        worker_group.execute(_set_meeting_place, address, port)


@dataclass
class RankConfig(TorchConfig):  # type: ignore[misc]
    """A TorchConfig that makes no process group and no CUDA context in the workers."""

    @property
    def backend_cls(self) -> type[Backend]:
        return MeetingPlace

    @property
    def train_func_context(self) -> Any:
        return contextlib.nullcontext


def _free_address() -> tuple[str, int]:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), int(probe.getsockname()[1])


def _set_meeting_place(address: str, port: int) -> None:
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


def run_shell(settings: dict[str, Any]) -> None:
    """Ray Train's function on every worker: start the rank, pass on what it prints and what it is told.

    Raises RankLost.
    """
    rank, board = get_context().get_world_rank(), settings["board"]
    command = [sys.executable, "-m", "mixwright.launch.cluster_rank", settings["phase"]]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env={**os.environ, **rank_environment(settings["has_gpu"])},
    ) as process:  # fmt: skip
        try:
            is_stopping, is_over = _attend(process, rank, board)
        finally:
            process.kill()
    code = process.returncode
    if is_over or code == 0:
        return
    if is_stopping and code == -signal.SIGTERM:
        # It was told before it could save anything, and without it the others cannot save either.
        ray.get(board.finish.remote(INTERRUPTED, True))
    elif code in FINAL:
        ray.get(board.finish.remote(code, code != INTERRUPTED))
    else:
        raise RankLost(f"rank {rank} ended with {_describe(code)}")


def _attend(process: subprocess.Popen[str], rank: int, board: Any) -> tuple[bool, bool]:
    """Stay with a rank until it ends, or until all is over; the board's last answer."""
    printed: queue.SimpleQueue[str] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(process.stdout, printed), daemon=True)
    reader.start()
    is_told = False
    while True:
        has_ended = process.poll() is not None
        if has_ended:
            reader.join(EXCHANGE_INTERVAL_S)
        is_stopping, is_over = ray.get(board.exchange.remote(_lines(printed, rank)))
        if has_ended or is_over:
            return is_stopping, is_over
        if is_stopping and not is_told:
            process.terminate()  # once: a second signal would end the rank without a checkpoint
            is_told = True
        time.sleep(EXCHANGE_INTERVAL_S)


def _read(stream: IO[str] | None, printed: queue.SimpleQueue[str]) -> None:
    assert stream is not None
    with contextlib.suppress(ValueError):  # closed meanwhile
        for line in stream:
            printed.put(line.rstrip("\n")[:MAX_LINE_CHARACTERS])


def _lines(printed: queue.SimpleQueue[str], rank: int) -> list[str]:
    prefix = f"[rank {rank}] " if rank else ""
    return [prefix + printed.get() for _ in range(printed.qsize())]


def rank_environment(has_gpu: bool) -> dict[str, str]:
    """The variables that launchers set, from Ray Train's context; the meeting place is set already."""
    context = get_context()
    variables = {
        "RANK": context.get_world_rank(),
        "WORLD_SIZE": context.get_world_size(),
        "LOCAL_RANK": context.get_local_rank(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        "GROUP_RANK": context.get_node_rank(),
        PARENT: os.getpid(),
        "PYTHONUNBUFFERED": 1,
    }
    if not has_gpu:
        variables |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {name: str(value) for name, value in variables.items()}


def _describe(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
