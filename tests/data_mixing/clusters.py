"""A Ray cluster of `ray start --head` with token authentication, as somebody else would have started it."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class HeadNode:
    """Its address, the file of its token, and the processes that can be killed."""

    address: str
    token_path: Path
    process: subprocess.Popen[str]

    def kill(self) -> None:
        """kill -9 of the head with everything that it has started."""
        everything = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        for one in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGKILL)


@contextlib.contextmanager
def head_node(folder: Path, num_cpus: int = 1) -> Iterator[HeadNode]:
    ray_folder = tempfile.mkdtemp(prefix="mw-", dir="/tmp")  # Ray's socket paths allow for a short one only
    token_path = folder / "token"
    token_path.write_text(secrets.token_hex(32))
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}",
               f"--num-cpus={num_cpus}", "--include-dashboard=false", "--disable-usage-stats",
               f"--temp-dir={ray_folder}"]  # fmt: skip
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_path)}
    process = subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = next(match for line in process.stdout if (match := re.search(r"--address='([^']+)'", line)))
    head = HeadNode(found[1], token_path, process)
    try:
        yield head
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            head.kill()
        process.communicate()
        shutil.rmtree(ray_folder, ignore_errors=True)
