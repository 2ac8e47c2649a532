"""`feed: actor` on a rank: a token store whose rows come through the node's agent. Needs no Ray.

    rank ── Unix socket ── agent (one process a node, a Ray driver) ── Ray ── actor on a node with the store

A rank is no Ray driver: a broken cluster can end the agent, and the rank says what is wrong (DESIGN.md contract 2). One
frame of JSON says what is asked or answered, a second one holds the numbers as they are; nothing is pickled.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.answers import unpack
from mixwright.data_mixing.errors import MixingError, ServiceUnavailable, StoreChanged
from mixwright.data_mixing.manifest import MANIFEST, read_manifest
from mixwright.data_mixing.plain_data import parse_json
from mixwright.data_mixing.store import TokenStore

logger = logging.getLogger(__name__)

AGENT_MODULE = "mixwright.launch.feed_agent"
TOKENS_PER_CALL = 1 << 16
"""A call costs about a millisecond whatever it carries: fewer tokens waste it (spec/mixing.md 3.3)."""
STILL_WAITING_S = 10.0
BACKSTOP_S = 15.0
"""How much longer a rank waits than its agent, which says better what is wrong."""
START_TIMEOUT_S = 120.0
REMEDY = (
    "start the Ray cluster again and run the same command, or copy the token store to this node and set "
    "mixing.feed: local"
)


class Line:
    """A connection to the agent. Answers come in the order of the questions."""

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        self._connection, self._timeout_s = connection, timeout_s

    @classmethod
    def open(cls, socket_path: Path, timeout_s: float) -> Line:
        """Raises OSError while there is no agent."""
        return cls(Client(str(socket_path), family="AF_UNIX"), timeout_s)

    def describe(self) -> dict[str, Any]:
        """What `FeedActor.describe` says."""
        self._send({"verb": "describe"})
        return self._answer()

    def ask(self, split: str, domain_n: NDArray[np.int64], row_n: NDArray[np.int64]) -> None:
        refs_2n = np.stack([np.asarray(domain_n, np.int64), np.asarray(row_n, np.int64)])
        self._send({"verb": "rows", "split": split}, refs_2n.tobytes())

    def take(self) -> NDArray[Any]:
        """The rows of the oldest question that was not answered yet, [n, T+1]."""
        head = self._answer()
        return np.frombuffer(self._receive(), dtype=head["dtype"]).reshape(head["shape"])

    def close(self) -> None:
        self._connection.close()

    def _send(self, head: dict[str, Any], payload: bytes | None = None) -> None:
        try:
            self._connection.send_bytes(json.dumps(head).encode())
            if payload is not None:
                self._connection.send_bytes(payload)
        except OSError as error:
            raise ServiceUnavailable(f"the feed agent of this node is gone ({error.strerror}): {REMEDY}") from None

    def _answer(self) -> dict[str, Any]:
        try:
            return unpack(parse_json(self._receive()))
        except (ValueError, KeyError, TypeError) as error:
            raise ServiceUnavailable(
                f"the feed agent of this node gave no answer of ours ({error!r}): {REMEDY}"
            ) from None
        except ServiceUnavailable as error:
            raise ServiceUnavailable(str(error) if REMEDY in str(error) else f"{error}: {REMEDY}") from None

    def _receive(self) -> bytes:
        began = time.monotonic()
        try:
            if not self._connection.poll(min(STILL_WAITING_S, self._timeout_s)):
                logger.warning("still waiting for rows of the feed actor (limit %g s)", self._timeout_s)
                if not self._connection.poll(self._timeout_s + BACKSTOP_S):
                    waited = time.monotonic() - began
                    raise ServiceUnavailable(f"the feed agent of this node gave no answer within {waited:.0f} s")
            return self._connection.recv_bytes()
        except (EOFError, OSError):
            raise ServiceUnavailable(f"the feed agent of this node has ended: {REMEDY}") from None


class ServedStore(TokenStore):
    """The token store of other nodes. `folder` holds its manifest and tokenizer only.

    Asks are gathered into calls of `TOKENS_PER_CALL` tokens or more, two of them ahead, as far as `prefetch_steps` go.
    When rows stop coming and `local_folder` holds the same store, reading goes on there.
    """

    def __init__(
        self, folder: Path, asking: Line, gathering: Line, *, local_folder: Path, rows_per_ask: int, prefetch_steps: int
    ) -> None:
        super().__init__(folder, read_manifest(folder))
        self._asking, self._gathering, self._local_folder = asking, gathering, local_folder
        asks_per_call = -(-TOKENS_PER_CALL // max(1, rows_per_ask * self.row_width))
        self.ask_ahead = min(2 * asks_per_call, prefetch_steps - 1)
        self.asks_per_call = max(1, min(asks_per_call, (self.ask_ahead + 1) // 2))
        if self.asks_per_call < asks_per_call:
            logger.info(
                "calls of %d tokens to the feed actor; mixing.prefetch_steps of %d would make them %d",
                self.asks_per_call * rows_per_ask * self.row_width, 2 * asks_per_call + 1, TOKENS_PER_CALL,
            )  # fmt: skip
        self._local: TokenStore | None = None
        self._unsent: list[_Ask] = []
        self._sent: deque[list[_Ask]] = deque()

    def gather(self, domain_n: NDArray[Any], row_n: NDArray[Any], split: str = "train") -> NDArray[Any]:
        """As TokenStore.gather; raises ServiceUnavailable when the rows do not come."""
        if self._local is None:
            try:
                self._gathering.ask(split, domain_n, row_n)
                return self._gathering.take()
            except ServiceUnavailable as error:
                self._go_on_locally(error)
        assert self._local is not None
        return self._local.gather(domain_n, row_n, split)

    def ask(self, domain_n: NDArray[Any], row_n: NDArray[Any]) -> Callable[[], NDArray[Any]]:
        """As TokenStore.ask. One thread asks and takes."""
        ask = _Ask(domain_n, row_n)
        self._unsent.append(ask)
        if len(self._unsent) >= self.asks_per_call:
            self._send()
        return lambda: self._take(ask)

    def _send(self) -> None:
        call, self._unsent = self._unsent, []
        self._sent.append(call)
        if self._local is None:
            try:
                domain_n, row_n = (np.concatenate(part) for part in zip(*(ask.refs for ask in call), strict=True))
                self._asking.ask("train", domain_n, row_n)
            except ServiceUnavailable as error:
                self._go_on_locally(error)

    def _take(self, ask: _Ask) -> NDArray[Any]:
        if ask in self._unsent:
            self._send()
        while ask.rows is None:
            call = self._sent.popleft()
            rows_nS = self._rows_of(call)
            for one, rows in zip(
                call, np.split(rows_nS, np.cumsum([len(one.refs[1]) for one in call])[:-1]), strict=True
            ):
                one.rows = rows
        return ask.rows

    def _rows_of(self, call: list[_Ask]) -> NDArray[Any]:
        if self._local is None:
            try:
                return self._asking.take()
            except ServiceUnavailable as error:
                self._go_on_locally(error)
        assert self._local is not None
        return np.concatenate([self._local.gather(*ask.refs) for ask in call])

    def _go_on_locally(self, error: ServiceUnavailable) -> None:
        """Read the rows on this node if they are here; raises the error if they are not."""
        try:
            local = TokenStore.open(self._local_folder)
        except MixingError:
            raise error from None
        if local.fingerprint != self.fingerprint:
            raise StoreChanged(f"{error}; {self._local_folder} is another store") from None
        logger.warning("%s; going on with %s on this node", error, self._local_folder)
        self._local = local


class _Ask:
    """Rows that were asked for, and the rows themselves once they are there."""

    def __init__(self, domain_n: NDArray[Any], row_n: NDArray[Any]) -> None:
        self.refs = (domain_n, row_n)
        self.rows: NDArray[Any] | None = None


@contextlib.contextmanager
def served_store(
    run_dir: Path, store_folder: Path, address: str | None, *, rows_per_ask: int, prefetch_steps: int, timeout_s: float
) -> Iterator[ServedStore]:
    """The store as the Ray cluster at `address` (default: RAY_ADDRESS) serves it. Every rank of a node calls this.

    Local rank 0 starts the node's agent and ends it. Raises ServiceUnavailable.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if not address or address == "local":
        raise ServiceUnavailable(
            "mixing.feed: actor needs a Ray cluster: set mixing.address or RAY_ADDRESS to HOST:PORT"
        )
    with contextlib.ExitStack() as stack:
        socket_path = agent_socket(run_dir)
        log_path = run_dir / "logs" / f"feed-{os.uname().nodename}.log"
        process = None
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            process = stack.enter_context(agent_process(socket_path, log_path, store_folder, address, timeout_s))
        lines = [
            stack.enter_context(contextlib.closing(connect(socket_path, process, log_path, timeout_s))) for _ in "ab"
        ]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mixwright-feed-")))
        write_description(folder, lines[0].describe())
        yield ServedStore(
            folder, *lines, local_folder=store_folder, rows_per_ask=rows_per_ask, prefetch_steps=prefetch_steps
        )


def agent_socket(run_dir: Path) -> Path:
    """Where the ranks of this node find their agent: named by the run and by the launcher that started them all."""
    key = hashlib.sha256(f"{run_dir.resolve()} {os.getppid()} {os.getuid()}".encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"mixwright-feed-{key}" / "s"


@contextlib.contextmanager
def agent_process(
    socket_path: Path, log_path: Path, store_folder: Path, address: str, timeout_s: float
) -> Iterator[subprocess.Popen[bytes]]:
    """The node's agent; it ends with this process, whose end of the pipe to it is closed then."""
    command = [
        sys.executable, "-m", AGENT_MODULE, "--socket", str(socket_path), "--store", str(store_folder.resolve()),
        "--address", address, "--timeout", str(timeout_s),
    ]  # fmt: skip
    log_path.parent.mkdir(parents=True, exist_ok=True)
    socket_path.parent.mkdir(mode=0o700, exist_ok=True)
    socket_path.unlink(missing_ok=True)
    with log_path.open("ab") as log:
        # A session of its own: Ctrl-C in the trainer's terminal is not for the agent.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
        socket_path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            socket_path.parent.rmdir()


def connect(socket_path: Path, process: subprocess.Popen[bytes] | None, log_path: Path, timeout_s: float) -> Line:
    """A line to the agent once it serves; raises ServiceUnavailable when it ends first or takes too long."""
    began, told = time.monotonic(), False
    while True:
        with contextlib.suppress(OSError):
            return Line.open(socket_path, timeout_s)
        waited = time.monotonic() - began
        if process is not None and process.poll() is not None:
            raise ServiceUnavailable(f"the feed agent cannot start: {_last_line(log_path)}")
        if waited > START_TIMEOUT_S:
            raise ServiceUnavailable(
                f"the feed agent of this node does not serve after {waited:.0f} s (see {log_path})"
            )
        if waited > STILL_WAITING_S and not told:
            told = True
            logger.warning("still waiting for the feed agent of this node (limit %g s)", START_TIMEOUT_S)
        time.sleep(0.05)


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """Manifest and tokenizer of the served store, so that `folder` can be read as a store without rows."""
    (folder / MANIFEST).write_text(description["manifest"])
    (folder / "tokenizer").mkdir()
    for name, content in description["tokenizer"].items():
        (folder / "tokenizer" / Path(name).name).write_bytes(base64.b64decode(content))


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "nothing in its log")
