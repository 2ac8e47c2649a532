"""Whether those who started this rank are still there: a rank that was left alone must not train on unseen."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

NAMES = ("deepspeed", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run", "accelerate")
"""Programs and modules that start ranks and end them when one fails."""


@dataclass(frozen=True)
class Launchers:
    """The launchers among this process's ancestors, nearest first; none when a person or a script started it."""

    pids: tuple[int, ...]

    @classmethod
    def above(cls) -> Launchers:
        """Those of now. Linux only; elsewhere none are seen."""
        return cls(_launchers_above(os.getpid()))

    def lost(self) -> int | None:
        """The first one that has ended since; None while all are there."""
        child = os.getpid()
        for pid in self.pids:
            if _parent_of(child) != pid:
                return pid
            child = pid
        return None


def _launchers_above(pid: int) -> tuple[int, ...]:
    parent = _parent_of(pid)
    return (parent, *_launchers_above(parent)) if parent and _is_launcher(parent) else ()


def _parent_of(pid: int) -> int:
    """0 when there is none, or none to be seen."""
    if pid == os.getpid():
        return os.getppid()
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])


def _is_launcher(pid: int) -> bool:
    """By the program or module of its command line: `python .../bin/deepspeed ...`, `python -u -m MODULE ...`."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(os.fsdecode(word).rpartition("/")[2] in NAMES for word in words[:4])
