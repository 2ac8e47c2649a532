"""The mixing service of a run as faults find it: its host, its Ray's processes, the controller's actor."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from mixwright.data_mixing.client import MixingClient
from mixwright.data_mixing.entries import PolicyEntry
from mixwright.data_mixing.errors import ServiceUnavailable
from mixwright.data_mixing.journal import read_entries
from mixwright.data_mixing.service import has_host, read_record, stop_service
from tests.data_mixing.live_run import wait_until
from tests.drills.drill_run import DrillRun, Job
from tests.drills.undisturbed import References, assert_as_undisturbed
from tests.pretrain.jobs import BIN, metrics

Part = Literal["host", "gcs", "raylet", "controller"]
COMMANDS = {"gcs": "gcs_server", "raylet": "raylet/raylet", "controller": "ray::ControllerActor"}
START_TIMEOUT_S = 120.0
STEP_S = 0.5
"""How long each step of `slow_run` is made to last."""


@dataclass(frozen=True)
class Service:
    """The service of the run in `run_dir`, which may be down."""

    run_dir: Path

    def up(self, address: str = "local", **environment: str) -> None:
        """`mixwright mix up`, with a private Ray unless told otherwise."""
        command = [str(BIN / "mixwright"), "mix", "up", "--run", str(self.run_dir), "--address", address]
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


def longest_step_s(run: DrillRun, first_step: int, last_step: int) -> float:
    """The slowest of these steps, by the leader's clock."""
    return max(r["step_seconds"] for r in metrics(run.run_dir, "step") if first_step <= r["step"] <= last_step)


def slow_run(make_run: Callable[..., DrillRun], **changes: Any) -> DrillRun:
    """A run of 160 steps; at STEP_S each it lasts long enough for a service to start, die and come back."""
    return make_run(policies=(), training__num_steps=160, evaluation__every=80, **changes)


def end(run: DrillRun, job: Job, references: References) -> None:
    """The rest at full speed; then everything is as without the fault."""
    assert run.last_step() < run.num_steps, "the run ended before the fault was over: it proves nothing"
    run.speed_up()
    job.succeed()
    assert_as_undisturbed(run, references.of(run))


def end_with_both(
    run: DrillRun, job: Job, service: Service, references: References, sent: tuple[Submission, Submission]
) -> None:
    """`end`, once both policies are committed; each must have been journaled once."""
    wait_until(lambda: len(run.history().commits) == 3)
    end(run, job, references)
    assert [len(service.policies_of(submission.request_id)) for submission in sent] == [1, 1]
