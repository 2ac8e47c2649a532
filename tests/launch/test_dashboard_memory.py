"""Memory of the dashboard's process: one heap, whatever threads do."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys, threading
from mixwright.launch.dashboard.memory import give_memory_back
if sys.argv[1] == "kept":
    give_memory_back()
together = threading.Barrier(6)
def build():
    together.wait()
    pieces = [bytearray(20_000) for _ in range(50)]
    together.wait()
threads = [threading.Thread(target=build) for _ in range(6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
ctypes.CDLL(None).malloc_stats()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other heaps")
@pytest.mark.parametrize(("how", "is_one"), [("kept", True), ("as it is", False)])
def test_threads_share_one_heap(how: str, is_one: bool) -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, timeout=60, check=True)
    assert (ended.stderr.count("Arena ") == 1) == is_one, ended.stderr
