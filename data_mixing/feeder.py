"""What a training rank holds: batches of the plan, prepared ahead by a thread, and commits applied at their step.

Needs neither Ray nor torch. A rank follows the journal only as far as the leader has announced it
(`follow`), so that all ranks switch at exactly the effective step.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.entries import Genesis
from mixwright.data_mixing.errors import JournalError, StoreChanged
from mixwright.data_mixing.plan import Plan, rank_positions, rows_digest
from mixwright.data_mixing.snapshot import resume
from mixwright.data_mixing.store import TokenStore

logger = logging.getLogger(__name__)

VISIBLE_TIMEOUT_S = 60.0
"""How long an announced journal entry may take to become visible on this rank's file system."""


@dataclass(frozen=True)
class StepRows:
    """One rank's rows of one step, in order: tokens int64 [n, T+1], domains [n] in catalogue order, digest share.

    `row_n` [n] are the rows' numbers in their domains.
    """

    step: int
    tokens_nS: NDArray[np.int64]
    domain_n: NDArray[np.int64]
    digest: int
    row_n: NDArray[np.int64]


class Feeder:
    """Batches of one rank from `start_step` on. Use as a context manager: leaving it ends the thread."""

    def __init__(
        self,
        journal_folder: Path,
        store: TokenStore,
        *,
        rank: int,
        num_ranks: int,
        start_step: int,
        prefetch_steps: int,
    ) -> None:
        self._journal, self._history = resume(journal_folder, f"rank-{rank}")
        self.genesis: Genesis = self._history.genesis
        self._store = store
        self._store_index = store_order(self.genesis, store)
        self._positions = rank_positions(self.genesis.rows_per_step, rank, num_ranks)
        self._plan = self._history.plan()
        self._news = threading.Condition()
        self._next_step = start_step
        # Steps asked for ahead and steps that lie ready are `prefetch_steps` together: leaders count on that.
        self._ask_ahead = min(store.ask_ahead, prefetch_steps - 1)
        self._ready: queue.Queue[StepRows | BaseException] = queue.Queue(maxsize=prefetch_steps - self._ask_ahead)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._prepare, name="feeder", daemon=True)
        self.wait_seconds = 0.0

    def __enter__(self) -> Feeder:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join(timeout=10.0)

    @property
    def plan(self) -> Plan:
        """The plan as far as the leader has announced commits."""
        return self._plan

    @property
    def committed_lsn(self) -> int:
        """Entry of the newest commit (or pass) that this rank follows."""
        return self._history.last_ruling_lsn

    def next(self) -> StepRows:
        """The next step's rows; raises DomainExhausted when the plan ends, and whatever broke the thread."""
        started = time.perf_counter()
        item = self._ready.get()
        self.wait_seconds += time.perf_counter() - started
        if isinstance(item, BaseException):
            raise item
        return item

    def follow(self, lsn: int) -> None:
        """Apply commits up to journal entry `lsn`, which the leader announced. Cheap when nothing is new."""
        if lsn <= self.committed_lsn:
            return
        known = self._history.num_commits
        self._read_up_to(lsn)
        with self._news:
            for commit in self._history.commits[known:]:
                self._check_in_time(lsn, commit.effective_step)
            self._plan = self._history.plan()
            self._news.notify_all()

    def _read_up_to(self, lsn: int) -> None:
        deadline = time.monotonic() + VISIBLE_TIMEOUT_S
        while self.committed_lsn < lsn:
            if time.monotonic() > deadline:
                raise JournalError(
                    f"commit entry {lsn} was announced but is not visible here after {VISIBLE_TIMEOUT_S:g} s: "
                    "is the run folder on a file system that all nodes share?"
                )
            if not self._read_journal(lsn):
                time.sleep(0.02)

    def _check_in_time(self, lsn: int, effective_step: int) -> None:
        if effective_step < self._next_step:
            raise JournalError(
                f"commit entry {lsn} takes effect at step {effective_step}, but step {self._next_step - 1} is "
                "already prepared on this rank: mixing.lead_steps is too small"
            )

    def _read_journal(self, last_lsn: int) -> int:
        entries = self._journal.poll(last_lsn)
        for entry in entries:
            self._history.apply(entry)
        return len(entries)

    def _prepare(self) -> None:
        """Thread: prepare steps in order until told to stop."""
        asked: deque[Callable[[], StepRows]] = deque()
        try:
            while not self._stopping.is_set():
                self._ask(asked)
                if asked:
                    self._offer(asked.popleft()())
        except Exception as error:  # handed to the training thread, which raises it
            self._offer(error)

    def _ask(self, asked: deque[Callable[[], StepRows]]) -> None:
        """Ask for the rows of further steps. What is wrong with a step is said when those before it are delivered."""
        try:
            while len(asked) <= self._ask_ahead and (step_rows := self._ask_next(can_wait=not asked)):
                asked.append(step_rows)
        except Exception:
            if not asked:
                raise

    def _ask_next(self, can_wait: bool) -> Callable[[], StepRows] | None:
        """The next step's rows, to come, once no decision can change them any more; None before that."""
        with self._news:
            while self._plan.is_waiting(self._next_step, self._history.passes):
                if not can_wait or self._stopping.is_set():
                    return None
                self._news.wait(timeout=0.2)
            step, refs = self._next_step, self._plan.rows(self._next_step, self._positions)
            self._next_step += 1
        rows = self._store.ask(self._store_index[refs.domain_n], refs.row_n)
        digest = rows_digest(self.genesis, step, refs)
        return lambda: StepRows(step, rows().astype(np.int64), refs.domain_n, digest, refs.row_n)

    def _offer(self, item: StepRows | BaseException) -> None:
        while not self._stopping.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                return
            except queue.Full:
                continue


def store_order(genesis: Genesis, store: TokenStore) -> NDArray[np.int64]:
    """Index in the store of each domain of the run; raises StoreChanged when the store is another one."""
    if store.fingerprint != genesis.store_fingerprint:
        raise StoreChanged(
            f"{store.folder}: the token store has fingerprint {store.fingerprint}, but the run was started on "
            f"{genesis.store_fingerprint}: restore the old store or start a new run"
        )
    names = store.names
    return np.array([names.index(domain.name) for domain in genesis.domains], dtype=np.int64)


Arrays = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def micro_batches(rows: StepRows, num_rows: int) -> Iterator[Arrays]:
    """Consecutive pieces of `num_rows` rows: tokens [b, T+1], domains [b], numbers in their domains [b]."""
    for first in range(0, len(rows.domain_n), num_rows):
        part = slice(first, first + num_rows)
        yield rows.tokens_nS[part], rows.domain_n[part], rows.row_n[part]
