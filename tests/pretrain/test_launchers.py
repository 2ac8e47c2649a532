"""A rank that was left alone notices it. The launchers are small programs with the names of the real ones."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mixwright.pretrain.launchers import Launchers

RANK = """
import time
from mixwright.pretrain.launchers import Launchers
launchers = Launchers.above()
print(*launchers.pids, flush=True)
while (lost := launchers.lost()) is None:
    time.sleep(0.01)
print(lost, flush=True)
"""
LAUNCHER = """
import subprocess, sys
print(__import__("os").getpid(), flush=True)
subprocess.run([sys.executable, *sys.argv[1:]])
"""


@contextmanager
def launched(folder: Path, *names: str) -> Iterator[tuple[list[int], subprocess.Popen[str]]]:
    """A rank under programs of these names, outermost first: their process numbers, and what prints."""
    (folder / "rank.py").write_text(RANK)
    for name in names:
        (folder / name).write_text(LAUNCHER)
    command = [sys.executable, *(str(folder / name) for name in (*names, "rank.py"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield [int(process.stdout.readline()) for _ in names], process


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_notices_that_either_of_its_launchers_was_killed(tmp_path: Path, victim: int) -> None:
    with launched(tmp_path, "deepspeed", "torchrun") as (pids, process):
        assert process.stdout is not None
        assert process.stdout.readline().split() == [str(pids[1]), str(pids[0])], "nearest first"
        os.kill(pids[victim], 9)
        assert int(process.stdout.readline()) == pids[victim]


def test_a_shell_that_ends_is_no_launcher(tmp_path: Path) -> None:
    with launched(tmp_path, "my_script", "deepspeed", "run.sh") as (pids, process):
        assert process.stdout is not None
        assert process.stdout.readline() == "\n", "nothing above a program that is none of them counts"
        for pid in (*pids, *_children(pids[-1])):
            os.kill(pid, 9)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_this_process_has_lost_nobody() -> None:
    assert Launchers.above().lost() is None
