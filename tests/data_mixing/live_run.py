"""A run in one process: real journal, leader, feeders and controller, with losses from a formula instead of a model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.control import MixingController
from mixwright.data_mixing.entries import DomainLoss, Genesis, Report
from mixwright.data_mixing.feeder import Feeder
from mixwright.data_mixing.journal import Entry, Journal, read_entries
from mixwright.data_mixing.leader import Leader, open_run
from mixwright.data_mixing.plan import chain_digest
from mixwright.data_mixing.store import TokenStore

ROWS = 12


def genesis_of(store: TokenStore, num_steps: int) -> Genesis:
    """A run of `num_steps` steps of ROWS rows."""
    return Genesis(run="live", seed=9, sequence_length=16, rows_per_step=ROWS, num_steps=num_steps,
                   store_fingerprint=store.fingerprint, domains=store.domains())  # fmt: skip


@dataclass
class LiveRun:
    """Ranks in turn, one step after another. `losses(step)` are nats per token of each domain [G], from a formula."""

    folder: Path
    store: TokenStore
    num_steps: int
    policy: dict[str, Any]
    num_ranks: int = 1
    report_every: int = 10
    attempt: int = 0
    digests: list[int] = field(default_factory=list)
    digest: int = 0

    def __post_init__(self) -> None:
        self.genesis = genesis_of(self.store, self.num_steps)

    def losses(self, step: int) -> np.ndarray:
        """Falls with the step; the first domain falls fastest."""
        rate_G = 1.0 / np.arange(1, len(self.genesis.domains) + 1)
        return 3.0 + 2.0 * np.exp(-rate_G * step / 50)

    def run(self, start_step: int = 0, end_step: int | None = None) -> None:
        """Train steps [start_step, end_step); the digests of the global batches are kept."""
        journal = Journal(self.folder, writer="leader")
        history, _ = open_run(journal, self.genesis, accept(self.policy, self.genesis))
        leader = Leader(journal, history, start_step=start_step, lead_steps=8, prefetch_steps=2)
        feeders = [self._feeder(rank, start_step) for rank in range(self.num_ranks)]
        with leader:
            for feeder in feeders:
                feeder.__enter__()
            try:
                self._steps(leader, feeders, range(start_step, end_step or self.num_steps))
            finally:
                for feeder in feeders:
                    feeder.__exit__(None, None, None)

    def _feeder(self, rank: int, start_step: int) -> Feeder:
        return Feeder(
            self.folder, self.store, rank=rank, num_ranks=self.num_ranks, start_step=start_step, prefetch_steps=2
        )

    def _steps(self, leader: Leader, feeders: list[Feeder], steps: range) -> None:
        window_start = steps.start
        self._boundary(leader, feeders, steps.start)
        for step in steps:
            leader.begin_step(step)
            announced = leader.announced_lsn
            rows = [feeder.next() for feeder in feeders]
            digest = sum(part.digest for part in rows) % (1 << 64)
            assert digest == feeders[0].plan.digest(step)
            self.digests.append(digest)
            self.digest = chain_digest(self.digest, digest)
            if feeders[0].plan.mark(step + 1) or (step + 1) % self.report_every == 0 or step == steps[-1]:
                leader.write(self.report("train", window_start, step))
                window_start = step + 1
            for feeder in feeders:
                feeder.follow(announced)
            if step + 1 < self.num_steps and step != steps[-1]:
                self._boundary(leader, feeders, step + 1)

    def _boundary(self, leader: Leader, feeders: list[Feeder], step: int) -> None:
        found = feeders[0].plan.mark(step)
        if found is None:
            return
        if found[1].evaluate:
            leader.write(self.report("validation", step - 1, step - 1))
        if found[1].decide == "sync":
            announced = leader.await_decision(step, found[1].timeout_s)
            for feeder in feeders:
                feeder.follow(announced)

    def report(self, kind: str, first_step: int, last_step: int) -> Report:
        """What the ranks would have measured."""
        losses = {
            domain.name: DomainLoss(loss_sum=100 * loss, loss_square_sum=100 * loss**2, num_tokens=100, num_rows=4)
            for domain, loss in zip(self.genesis.domains, self.losses(last_step + 1).tolist(), strict=True)
        }
        return Report(
            kind=kind, first_step=first_step, last_step=last_step, domains=losses, attempt=self.attempt,
            learning_rate=1e-3 if kind == "train" else None,
        )  # fmt: skip

    def entries(self, type_: str) -> list[Entry]:
        """The journal's entries of one type, in order."""
        return [entry for entry in read_entries(self.folder) if entry.type == type_]


def wait_until(condition: Callable[[], object], timeout_s: float = 60) -> None:
    """Until `condition()` holds; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not so within {timeout_s:g} s"
        time.sleep(0.05)


class ControllerThread:
    """A controller that decides, until the block ends."""

    def __init__(self, folder: Path, holder: str = "controller-a") -> None:
        self.controller = MixingController(folder, holder)
        self.failure: BaseException | None = None
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> ControllerThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        if self.failure is not None:
            raise self.failure

    def call(self, verb: str, *arguments: Any, **named: Any) -> Any:
        """One verb, between two looks for due decisions."""
        with self._lock:
            return getattr(self.controller, verb)(*arguments, **named)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                with self._lock:
                    self.controller.advance()
            except Exception as error:
                self.failure = error
                return
            time.sleep(0.01)
