"""Asking the controller of a run, from any process and without Ray in it.

Each request runs in a short-lived process of its own (about 2 s), so that every call ends within its time limit and a
broken cluster cannot abort, stall or end the caller (see `mixwright.data_mixing.service`).
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixwright.data_mixing.answers import Answer, unpack
from mixwright.data_mixing.entries import Cancel, Pause, PolicyEntry, Reject
from mixwright.data_mixing.entry_file import Entry
from mixwright.data_mixing.errors import PolicyRejected, ServiceUnavailable
from mixwright.data_mixing.journal import read_entries
from mixwright.data_mixing.plain_data import parse_json
from mixwright.data_mixing.policy import plain_mapping, read_text
from mixwright.data_mixing.run_token import GUARDED_VERBS, find_token
from mixwright.data_mixing.service import POLL_INTERVAL_S, ServiceRecord, has_host, read_record, service_status

logger = logging.getLogger(__name__)

CALL_MODULE = "mixwright.launch.mixing_call"
DEFAULT_TIMEOUT_S = 30.0
STILL_WAITING_S = 10.0


class MixingClient:
    """The controller's verbs. Each raises ServiceUnavailable when there is no answer within `timeout_s`.

    Those that change something raise AccessRefused without the run's token (`run_token.py`).
    """

    def __init__(self, run_dir: Path, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._run_dir, self._timeout_s = run_dir, timeout_s

    def submit(self, document: Any, request_id: str | None = None) -> Answer:
        """Propose a policy (a mapping or YAML text): its entry number `lsn`, and `remarks`. Raises PolicyRejected.

        Sent again with the same `request_id`, it is journaled once.
        """
        mapping = plain_mapping(read_text(document) if isinstance(document, str) else document)
        return self._call("submit", {"document": mapping, "request_id": request_id or new_request_id()})

    def cancel(self, policy_lsn: int, *, author: str = "", why: str = "", request_id: str | None = None) -> Answer:
        """Withdraw a policy that is not committed: entry number `lsn` of the CANCEL. Raises PolicyRejected."""
        request_id = request_id or new_request_id()
        arguments = {"policy_lsn": policy_lsn, "request_id": request_id, "author": author, "why": why}
        return self._call("cancel", arguments)

    def pause(self, held: bool, *, author: str = "", why: str = "", request_id: str | None = None) -> Answer:
        """Hold the mixture of online policies, or let them decide again: entry number `lsn`. Raises PolicyRejected."""
        request_id = request_id or new_request_id()
        return self._call("pause", {"held": held, "request_id": request_id, "author": author, "why": why})

    def roll_back(self, policy_lsn: int, *, author: str = "", why: str = "", request_id: str | None = None) -> Answer:
        """Submit an earlier policy again, answered like `submit`. Raises PolicyRejected."""
        request_id = request_id or new_request_id()
        arguments = {"policy_lsn": policy_lsn, "request_id": request_id, "author": author, "why": why}
        return self._call("roll_back", arguments)

    def status(self) -> Answer:
        """The run's status as plain data (`run_status.RunStatus`)."""
        return self._call("status", {})

    def history(self, since_lsn: int = 0) -> Answer:
        """Journal entries as plain data, from `since_lsn` on."""
        return self._call("history", {"since_lsn": since_lsn})

    def ping(self) -> Answer:
        """Who answers, and how far it has read the journal."""
        return self._call("ping", {})

    def end(self) -> Answer:
        """End the controller's actor; the journal stays."""
        return self._call("end", {})

    def _call(self, verb: str, arguments: Mapping[str, Any]) -> Answer:
        record = self._ready_service()
        sent = {**arguments, "token": find_token(self._run_dir)} if verb in GUARDED_VERBS else arguments
        request = {
            "address": record.address,
            "actor": record.actor,
            "private": record.private,
            "token_path": str(record.token_path) if record.token_path else None,
            "verb": verb,
            "arguments": sent,
            "timeout_s": self._timeout_s,
        }
        try:
            return unpack(_in_own_process(request, self._timeout_s))
        except ServiceUnavailable as error:
            return self._outcome(arguments.get("request_id"), error)

    def _ready_service(self) -> ServiceRecord:
        """How to reach the service; one that is starting gets `timeout_s` to become ready."""
        deadline = time.monotonic() + self._timeout_s
        while service_status(self._run_dir).state == "starting" and time.monotonic() < deadline:
            time.sleep(POLL_INTERVAL_S)
        return reachable_service(self._run_dir)

    def _outcome(self, request_id: str | None, error: ServiceUnavailable) -> Answer:
        """What became of a request without an answer: the journal knows whether it arrived."""
        entry = find_request(self._run_dir, request_id) if request_id else None
        if entry is None:
            raise error
        if isinstance(entry.body, Reject):
            raise PolicyRejected(entry.body.reason)
        return {"lsn": entry.lsn, "remarks": []}


def new_request_id() -> str:
    """An id that no other request has."""
    return secrets.token_hex(8)


def reachable_service(run_dir: Path) -> ServiceRecord:
    """How to reach the run's controller from this machine. Raises ServiceUnavailable, saying what to do."""
    record = read_record(run_dir)
    if record is None or record.state != "ready" or (record.private and not has_host(run_dir)):
        raise ServiceUnavailable(service_status(run_dir).message)
    if record.private and record.host != socket.gethostname():
        raise ServiceUnavailable(
            f"the mixing service of run {record.run!r} is on {record.host!r} and listens only there: run this command "
            "there, or start the service on a Ray cluster that both machines reach (`mix up --address HOST:PORT`)"
        )
    return record


def find_request(run_dir: Path, request_id: str) -> Entry | None:
    """The journal entry that a request led to."""
    for entry in reversed(read_entries(run_dir / "journal")):
        if isinstance(entry.body, (PolicyEntry, Reject, Cancel, Pause)) and entry.body.request_id == request_id:
            return entry
    return None


def _in_own_process(request: Mapping[str, Any], timeout_s: float) -> Answer:
    """The answer of the call process; raises ServiceUnavailable when it dies or does not end within `timeout_s`."""
    command = [sys.executable, "-m", CALL_MODULE]
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, log = _communicate(process, json.dumps(request), timeout_s)
    except subprocess.TimeoutExpired:
        raise ServiceUnavailable(
            f"{request['verb']}: no answer from the controller at {request['address']} within "
            f"{time.monotonic() - started:.0f} s (limit {timeout_s:g} s)"
        ) from None
    finally:
        _kill(process)
    try:
        answer: Answer = parse_json(output)
    except ValueError:
        last = next((line for line in reversed(log.splitlines()) if line.strip()), "it said nothing")
        raise ServiceUnavailable(
            f"{request['verb']}: the call to {request['address']} ended with code {process.returncode}: {last[:300]}"
        ) from None
    return answer


def _communicate(process: subprocess.Popen[str], request: str, timeout_s: float) -> tuple[str, str]:
    """Both outputs of the call process; says so when it takes long. Raises TimeoutExpired."""
    try:
        return process.communicate(request, timeout=min(timeout_s, STILL_WAITING_S))
    except subprocess.TimeoutExpired:
        if timeout_s <= STILL_WAITING_S:
            raise
    logger.warning("still waiting for the controller's answer (limit %g s)", timeout_s)
    return process.communicate(timeout=timeout_s - STILL_WAITING_S)


def _kill(process: subprocess.Popen[str]) -> None:
    """End the call process and what it has started, and reap it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()
