"""The Prometheus endpoint of a run's mixing service: `GET /metrics`, from the journal and the host's own knowledge.

It lives in the service's host process (`mixing_host.py`), which outlives a controller that was killed, and can tell so.
"""

from __future__ import annotations

import logging
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mixwright.data_mixing.entries import Report
from mixwright.data_mixing.entry_file import Entry
from mixwright.data_mixing.errors import MixingError, ServiceUnavailable
from mixwright.data_mixing.journal import read_entries
from mixwright.data_mixing.plain_data import parse_json
from mixwright.data_mixing.prometheus import CONTENT_TYPE, HostFigures, exposition
from mixwright.data_mixing.run_figures import Refusals, RunFollower

logger = logging.getLogger("mixing_host")

REQUEST_TIMEOUT_S = 10.0
TAIL_BYTES = 64 << 10
"""Of metrics.jsonl: enough for its newest step, however many domains a record names."""


class MetricsPage:
    """What `/metrics` says, followed from the journal at each request. `is_up` and `append_seconds` are the host's."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._lock = threading.Lock()
        self._follower: RunFollower | None = None
        self._refusals = Refusals()
        self._digest_mismatches = 0
        self.is_up = False
        self.append_seconds: float | None = None

    def text(self) -> str:
        """The page. Raises MixingError when the journal tells nothing yet, or cannot be read."""
        with self._lock:
            follower = self._followed()
            step = newest_step(self._run_dir / "metrics.jsonl")
            host = HostFigures(
                is_up=self.is_up,
                append_seconds=self.append_seconds,
                trained_step=step.get("step"),
                step_seconds=step.get("step_seconds"),
                wait_seconds=step.get("wait_seconds"),
                digest_mismatches=self._digest_mismatches,
            )
            leases = {role: lease.epoch for role, lease in follower.history.leases.items()}
            return exposition(follower.figures(), self._refusals, host, leases)

    def _followed(self) -> RunFollower:
        if self._follower is None:
            follower = RunFollower(self._run_dir / "journal")
            known = follower.history.last_lsn
            self._refusals.add([entry for entry in read_entries(self._run_dir / "journal") if entry.lsn <= known])
            self._follower = follower
            return follower
        entries = self._follower.poll()
        self._refusals.add(entries)
        self._digest_mismatches += sum(_is_mismatch(self._follower, entry) for entry in entries)
        return self._follower


def _is_mismatch(follower: RunFollower, entry: Entry) -> bool:
    """Whether a report says that other rows were trained on than this process derives from the commits."""
    body = entry.body
    if not isinstance(body, Report) or not body.digest:
        return False
    plan = follower.history.plan()
    total = sum(plan.digest(step) for step in range(body.first_step, body.last_step + 1))
    return f"{total % (1 << 64):016x}" != body.digest


def newest_step(path: Path) -> dict[str, Any]:
    """The newest `step` record of a metrics file, from its end; empty when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - TAIL_BYTES, 0))
            lines = file.read().split(b"\n")
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            record = parse_json(line)
        except ValueError:  # a line that is being written, or whose beginning was not read
            continue
        if isinstance(record, dict) and record.get("kind") == "step":
            return record
    return {}


class MetricsServer:
    """Serves a page at `host`:`port` (0: any free one) until it is closed. Raises ServiceUnavailable when taken."""

    def __init__(self, page: MetricsPage, host: str, port: int) -> None:
        try:
            self._server = ThreadingHTTPServer((host, port), _handler(page))
        except OSError as error:
            raise ServiceUnavailable(f"no metrics at {host}:{port}: {error.strerror or error}") from None
        self._server.daemon_threads = True
        self.url = f"http://{host}:{self._server.server_address[1]}/metrics"
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()


def _handler(page: MetricsPage) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_TIMEOUT_S

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self._answer(404, "text/plain; charset=utf-8", "the metrics are at /metrics\n")
                return
            try:
                self._answer(200, CONTENT_TYPE, page.text())
            except MixingError as error:
                self._answer(503, "text/plain; charset=utf-8", f"{error}\n")

        def _answer(self, code: int, content_type: str, text: str) -> None:
            body = text.encode()
            self.send_response(code)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            logger.debug(format, *arguments)

    return Handler
