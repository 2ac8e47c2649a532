"""This process among the data-parallel ranks, and the one small collective of every step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mixwright.pretrain.errors import TrainingError

_WRAP = 1 << 64

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """Data-parallel coordinates, and two process groups of CPUs, None when alone.

    `control` is for the control word of every step. `patient` has a limit of hours, for what the leader does alone.
    """

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None
    patient: dist.ProcessGroup | None = None

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """All-reduce `value` in place over all ranks and return it."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def gather(self, value_CS: Tensor) -> Tensor:
        """Columns of all ranks in the order of ranks; the number of columns may differ between ranks."""
        if self.size == 1:
            return value_CS
        counts = torch.zeros(self.size, dtype=torch.int64, device=value_CS.device)
        counts[self.rank] = value_CS.shape[1]
        widths = self.sum(counts).tolist()
        padded_CS = torch.nn.functional.pad(value_CS, (0, max(widths) - value_CS.shape[1])).contiguous()
        parts = [torch.empty_like(padded_CS) for _ in range(self.size)]
        dist.all_gather(parts, padded_CS)
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def gather_plain(self, value: Any) -> list[Any]:
        """Every rank's `value` in the order of ranks. It travels as JSON: nothing is unpickled."""
        if self.size == 1:
            return [value]
        line = f"{json.dumps(value)}\n".encode()
        lines = self.gather(torch.tensor([list(line)], dtype=torch.uint8, device=self.device))
        return [json.loads(line) for line in bytes(lines[0].tolist()).splitlines()]

    def from_leader(self, value: int) -> int:
        """The leader's `value`, on every rank; all wait for it, however long it takes the leader."""
        word = torch.tensor([value if self.is_leader else 0], dtype=torch.int64)
        if self.size > 1:
            dist.all_reduce(word, group=self.patient)
        return int(word)

    def leader_first(self, work: Callable[[], Result]) -> Result | None:
        """What `work` returns to the leader, None on the other ranks, which wait for it.

        Raises what `work` raises, on the other ranks TrainingError.
        """
        result, is_done = None, False
        try:
            if self.is_leader:
                result, is_done = work(), True
        finally:
            is_done = bool(self.from_leader(int(is_done)))
        if not is_done:
            raise TrainingError("rank 0 could not prepare what all ranks need; its own line says why")
        return result

    def barrier(self) -> None:
        """All wait for the last one, however long it takes."""
        if self.size > 1:
            dist.barrier(group=self.patient)

    def leave(self) -> None:
        """Leave the process group, so that the process can end."""
        if dist.is_initialized():
            dist.destroy_process_group()


ALONE = Ranks(0, 1, torch.device("cpu"), None)
"""A process without others."""


@dataclass(frozen=True)
class ControlWord:
    """What all ranks know of a step once it is over: digest of its rows, newest committed entry, wish to stop."""

    digest: int
    committed_lsn: int
    stop: bool


class PendingControlWord:
    """A control word under way: 24 bytes, summed over ranks while the step computes."""

    def __init__(self, ranks: Ranks, digest: int, committed_lsn: int, stop: bool) -> None:
        """`digest` is this rank's share; `committed_lsn` counts on the leader only; `stop` on any rank stops all."""
        lsn = committed_lsn if ranks.is_leader else 0
        self._word = torch.tensor([_to_signed(digest), lsn, int(stop)], dtype=torch.int64)
        self._work = None
        if ranks.size > 1:
            self._work = dist.all_reduce(self._word, group=ranks.control, async_op=True)

    def wait(self) -> ControlWord:
        if self._work is not None:
            self._work.wait()
        digest, lsn, stop = self._word.tolist()
        return ControlWord(digest % _WRAP, lsn, stop > 0)


def _to_signed(value: int) -> int:
    """The int64 with the same 64 bits: sums of these wrap modulo 2**64."""
    return value - _WRAP if value >= _WRAP // 2 else value


def launched_rank() -> int:
    """Global rank given by the launcher's environment, 0 for a plain `python` start."""
    return int(os.environ.get("RANK", "0"))
