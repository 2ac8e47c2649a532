"""A job's log as it grows, line by line, through interruptions of the connection to the cluster."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading

from mixwright.data_mixing.errors import ServiceUnavailable
from mixwright.launch.jobs_api import JobsApi

RETRY_S = 2.0
SILENCE_S = 30.0
"""Web sockets are asked for a sign of life this often."""
_PROGRESS = re.compile(r"step (\d+)/\d+\b|.*: [\d,]+ of [\d,]+\b")


def progress_of(line: str) -> int | None:
    """The step that a line of a rank tells, 0 for other counts (`sampling: 10 of 200`), None for any other line."""
    found = _PROGRESS.match(line)
    return None if found is None else int(found[1] or 0)


class JobLog:
    """Follows one job in a thread. Ray streams a log from its beginning only, so what was had before is skipped."""

    def __init__(self, api: JobsApi, submission_id: str, retry_s: float = RETRY_S) -> None:
        self._api, self._submission_id, self._retry_s = api, submission_id, retry_s
        self._text, self._num_received, self._is_open = "", 0, True
        self._lock, self._closing = threading.Lock(), threading.Event()
        threading.Thread(target=self._follow, name=f"log of {submission_id}", daemon=True).start()

    def lines(self) -> list[str]:
        """The complete lines since the last call."""
        with self._lock:
            complete, newline, self._text = self._text.rpartition("\n")
        return complete.split("\n") if newline else []

    def rest(self) -> list[str]:
        """All lines that are still to come of a job that has ended. Nothing is followed any more."""
        self.close()
        with contextlib.suppress(ServiceUnavailable):
            unread = self._api.log(self._submission_id)[self._num_received :]
            self._num_received += len(unread)
            self._text += unread
        rest, self._text = self._text, ""
        return rest.splitlines()

    def close(self) -> None:
        """Follow no longer."""
        with self._lock:
            self._is_open = False
        self._closing.set()

    def _receive(self, text: str) -> None:
        with self._lock:
            if self._is_open:
                self._num_received += len(text)
                self._text += text

    def _follow(self) -> None:
        import aiohttp

        while not self._closing.is_set():
            with contextlib.suppress(ServiceUnavailable, aiohttp.ClientError, OSError, asyncio.TimeoutError):
                asyncio.run(self._stream())
            self._closing.wait(self._retry_s)

    async def _stream(self) -> None:
        """Receive until the socket closes: the job has ended, or the connection."""
        import aiohttp

        url = f"{self._api.url}/api/jobs/{self._submission_id}/logs/tail"
        skip = self._num_received
        async with (
            aiohttp.ClientSession(headers=self._api.headers) as session,
            session.ws_connect(url, heartbeat=SILENCE_S, max_msg_size=0) as socket,
        ):
            while not self._closing.is_set():
                with contextlib.suppress(asyncio.TimeoutError):
                    message = await socket.receive(timeout=1.0)
                    if message.type != aiohttp.WSMsgType.TEXT:
                        return
                    text, skip = message.data[skip:], max(skip - len(message.data), 0)
                    self._receive(text)
