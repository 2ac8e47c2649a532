"""The mixing service of a run as faults find it: its host, its Ray's processes, the controller's actor."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from mixwright.data_mixing.client import MixingClient
from mixwright.data_mixing.entries import PolicyEntry
from mixwright.data_mixing.errors import ServiceUnavailable
from mixwright.data_mixing.journal import read_entries
from mixwright.data_mixing.service import has_host, read_record, stop_service
from tests.pretrain.jobs import BIN

Part = Literal["host", "gcs", "raylet", "controller"]
COMMANDS = {"gcs": "gcs_server", "raylet": "raylet/raylet", "controller": "ray::ControllerActor"}
START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Service:
    """The service of the run in `run_dir`, which may be down."""

    run_dir: Path

    def up(self, **environment: str) -> None:
        """`mixwright mix up` with a private Ray."""
        command = [str(BIN / "mixwright"), "mix", "up", "--run", str(self.run_dir), "--address", "local"]
        done = subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, timeout=180, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def down(self) -> None:
        stop_service(self.run_dir)

    def is_up(self) -> bool:
        """Whether its host is alive and has said that it is ready."""
        record = read_record(self.run_dir) if has_host(self.run_dir) else None
        return record is not None and record.state == "ready"

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.is_up():
            assert time.monotonic() < deadline, "the service did not start"
            time.sleep(0.1)

    def part(self, name: Part) -> psutil.Process | None:
        """One of its processes, None when there is none."""
        record = read_record(self.run_dir) if has_host(self.run_dir) else None
        if record is None:
            return None
        with contextlib.suppress(psutil.Error):
            host = psutil.Process(record.pid)
            if name == "host":
                return host
            return next((p for p in host.children(recursive=True) if COMMANDS[name] in _command(p)), None)
        return None

    def kill(self, name: Part) -> bool:
        """kill -9 of one of its processes; whether there was one."""
        process = self.part(name)
        if process is None:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
        return True

    def policies_of(self, request_id: str) -> list[int]:
        """Entries of the policies that a request led to."""
        return [
            entry.lsn
            for entry in read_entries(self.run_dir / "journal")
            if isinstance(entry.body, PolicyEntry) and entry.body.request_id == request_id
        ]


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


class Submission:
    """A policy on its way: sent again, under one request id, until the controller has taken it."""

    def __init__(self, run_dir: Path, document: dict[str, Any], *, timeout_s: float = 10.0) -> None:
        self.run_dir, self.document, self.request_id = run_dir, document, secrets.token_hex(8)
        self.is_accepted = False
        self._timeout_s = timeout_s
        self._giving_up = threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def _send(self) -> None:
        client = MixingClient(self.run_dir, timeout_s=self._timeout_s)
        while not self._giving_up.is_set():
            try:
                client.submit(self.document, self.request_id)
                self.is_accepted = True
                return
            except ServiceUnavailable:
                self._giving_up.wait(1.0)

    def wait(self, timeout_s: float) -> None:
        """Until it is taken; fails after `timeout_s`."""
        self._thread.join(timeout_s)
        assert self.is_accepted, f"no controller took the policy within {timeout_s:g} s"

    def give_up(self) -> None:
        self._giving_up.set()
        self._thread.join()
