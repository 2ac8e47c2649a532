"""What the journal tells, folded entry by entry: the run's history, curves of fixed size, and events.

`RunHistory` interprets the entries; here is only what it does not keep: what happened when, and curves. G domains.
"""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.entries import (
    Cancel,
    Checkpoint,
    Commit,
    Decision,
    End,
    Genesis,
    Lease,
    Pass,
    Pause,
    PolicyEntry,
    Reject,
    Report,
)
from mixwright.data_mixing.entry_file import Entry, canonical_json
from mixwright.data_mixing.errors import MixingError
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.plan import Exhaustion, Plan
from mixwright.data_mixing.rollback import rollback_document
from mixwright.launch.dashboard.series import Buckets
from mixwright.launch.dashboard.tails import JournalTail
from mixwright.launch.mix_tables import summary

Lane = Literal["proposal", "shadow", "decision", "reject", "cancel", "commit", "rollback", "hold", "run"]
LANES: tuple[Lane, ...] = ("proposal", "shadow", "decision", "reject", "cancel", "commit", "rollback", "hold", "run")

MAX_EVENTS = 50_000
MAX_DECISIONS = 256
LOOK_AHEAD_EVERY = 256
MAX_SAMPLED_STEPS = 32
"""Steps of a report's window at which the requested mixture is looked at, when it changes within the window."""


@dataclass(frozen=True, slots=True)
class Event:
    """One entry on the timeline. `step`: where it takes effect, or how far the run was when it was written."""

    lsn: int
    time: float
    lane: Lane
    step: int
    author: str
    text: str


@dataclass(frozen=True, slots=True)
class Window:
    """Steps of a training report and rows that were read in them."""

    first_step: int
    last_step: int
    rows: int


@dataclass(frozen=True)
class DecisionNote:
    """What is shown of a decision: K arms. `diagnostics` are the policy's figures, as it journaled them."""

    lsn: int
    step: int
    decision: int
    action: str
    reason: str
    arms: tuple[str, ...]
    shares: tuple[float, ...]
    diagnostics: dict[str, Any]


class JournalView:
    """Feed it with `advance`. `problem` says why nothing more is read; everything before it stays."""

    def __init__(self, run_dir: Path) -> None:
        self.history = RunHistory()
        self.events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self.decisions: dict[int, deque[DecisionNote]] = {}
        self.problem = ""
        self.newest_time: float | None = None
        self.num_reports = self.num_events = self.num_decisions = 0
        self.requested = self.realised = self.train = self.validation = Buckets(1)
        self.plan: Plan | None = None
        self.exhaustions: tuple[Exhaustion, ...] = ()
        self._looked_ahead_at = (-1, -1)
        self._waiting: deque[Window] = deque()
        self._read: dict[str, list[tuple[int, NDArray[np.float64]]]] = {"train": [], "validation": []}
        self._tail = JournalTail(run_dir / "journal")
        self._index: dict[str, int] = {}
        self._lsn_of_document: dict[bytes, int] = {}

    def advance(self, limit: int) -> bool:
        """Take in up to `limit` entries; whether there were any."""
        if self.problem:
            return False
        before = self.history.last_lsn
        try:
            for entry in self._tail.read(limit):
                self.history.apply(entry)
                self._take(entry)
        except MixingError as error:
            self.problem = str(error)
        self._add_reports()
        return self.history.last_lsn > before

    def num_left(self) -> int:
        """About how many entries are still to be read."""
        return 0 if self.problem else self._tail.num_left()

    def derive(self, limit: int) -> bool:
        """Ask the plan about up to `limit` reports' steps; whether there were any.

        Called once everything that was written is read: a plan that knows when a mixture ends derives it ten times
        faster than one that learns of each commit after the other.
        """
        if self.problem and not self._waiting:
            return False
        try:
            return self._derive(limit)
        except MixingError as error:
            self.problem = str(error)
            return False

    def _derive(self, limit: int) -> bool:
        self._catch_up_plan()
        windows = [self._waiting.popleft() for _ in range(min(limit, len(self._waiting)))]
        if windows:
            rows_n1 = np.array([[float(window.rows)] for window in windows])
            share_nG = np.stack([self._requested(window) for window in windows])
            steps = np.array([window.last_step + 1 for window in windows], np.int64)
            self.requested.add_many(steps, share_nG * rows_n1, rows_n1)
        if not self._waiting:
            self._look_ahead()
        return bool(self._waiting)

    def _catch_up_plan(self) -> None:
        """The plan of all commits. Not `history.plan()`, which also audits each commit (`mix log --verify` does)."""
        commits = self.history.commits
        if self.plan is None:
            self.plan = Plan(self.history.genesis, commits) if commits else None
            return
        for commit in commits[len(self.plan.commits) :]:
            self.plan = self.plan.extended(commit)

    def _look_ahead(self) -> None:
        """Which domains have run out under the policy in force, or will, and when."""
        genesis, now = self.history.genesis, self.history.last_step + 1
        at = (self.history.num_commits, now // LOOK_AHEAD_EVERY)
        if self.plan is None or at == self._looked_ahead_at:
            return
        lsn = self.plan.policy_lsn(min(now, genesis.num_steps - 1))
        in_force = next(commit for commit in reversed(self.history.commits) if commit.lsn == lsn)
        self.exhaustions = self.plan.exhaustion(from_step=in_force.effective_step)
        self._looked_ahead_at = at

    def _take(self, entry: Entry) -> None:
        self.newest_time = entry.time
        match entry.body:
            case Report():
                self._take_report(entry.body)
                return
            case Genesis():
                self._begin(entry.body)
            case Decision():
                self._take_decision(entry.lsn, entry.body)
        self._note(entry)

    def _begin(self, genesis: Genesis) -> None:
        self._index = {domain.name: index for index, domain in enumerate(genesis.domains)}
        size = len(genesis.domains)
        self.requested, self.realised = Buckets(size), Buckets(size)
        self.train, self.validation = Buckets(size), Buckets(size)

    def _take_report(self, report: Report) -> None:
        self.num_reports += 1
        table_4G = np.zeros((4, len(self._index)))
        for name, loss in report.domains.items():
            if name in self._index:
                numbers = (loss.loss_sum, loss.num_tokens, loss.loss_square_sum, loss.num_rows)
                table_4G[:, self._index[name]] = numbers
        self._read[report.kind].append((report.last_step + 1, table_4G))
        if report.kind == "train":
            self._waiting.append(Window(report.first_step, report.last_step, int(table_4G[3].sum())))

    def _add_reports(self) -> None:
        """The reports that were read, to their curves; together, because one addition costs as much as many."""
        for kind, curve in (("train", self.train), ("validation", self.validation)):
            reports, self._read[kind] = self._read[kind], []
            if not reports:
                continue
            step_n = np.array([step for step, _ in reports], np.int64)
            total_nG, tokens_nG, square_nG, rows_nG = np.stack([table_4G for _, table_4G in reports], axis=1)
            curve.add_many(step_n, total_nG, tokens_nG, square_nG)
            if kind == "train":
                self.realised.add_many(step_n, rows_nG, rows_nG.sum(axis=1, keepdims=True))

    def _requested(self, report: Window) -> NDArray[np.float64]:
        """The mixture [G] that the plan asks for, mean over the steps of the report."""
        if self.plan is None:
            return np.full(len(self._index), np.nan)
        first, last = report.first_step, report.last_step
        first_G, last_G = self.plan.proportions(first), self.plan.proportions(last)
        if np.array_equal(first_G, last_G):
            return first_G
        steps = np.unique(np.linspace(first, last, MAX_SAMPLED_STEPS).astype(int))
        share_SG = np.stack([self.plan.proportions(int(step)) for step in steps])
        mean_G: NDArray[np.float64] = share_SG.mean(axis=0)
        return mean_G

    def _take_decision(self, lsn: int, decision: Decision) -> None:
        self.num_decisions += 1
        notes = self.decisions.setdefault(decision.policy_lsn, deque(maxlen=MAX_DECISIONS))
        arms = tuple(map(str, decision.window.get("arms", notes[-1].arms if notes else ())))
        diagnostics = decision.proposal.get("diagnostics") or {}
        notes.append(
            DecisionNote(
                lsn,
                decision.step,
                decision.decision,
                decision.action,
                decision.reason,
                arms,
                decision.shares,
                diagnostics,
            )
        )

    def _note(self, entry: Entry) -> None:
        if isinstance(entry.body, PolicyEntry) and entry.body.root is not None:
            return  # carries out a DECISION, which is on the timeline
        lane, step, author, text = self._event(entry)
        self.num_events += 1
        self.events.append(Event(entry.lsn, entry.time, lane, step, author, text))

    def _event(self, entry: Entry) -> tuple[Lane, int, str, str]:
        """Lane, step, author and text of an entry on the timeline."""
        now, text = self.history.last_step + 1, summary(entry.body)
        match entry.body:
            case PolicyEntry() as policy:
                return self._policy_event(entry.lsn, policy)
            case Reject():
                kind = entry.body.document.get("kind") if isinstance(entry.body.document, dict) else None
                return "reject", now, entry.body.author, f"{kind or 'a document'}: {entry.body.reason}"
            case Cancel():
                return "cancel", now, entry.body.author, text
            case Commit() as commit:
                policy = self.history.policies[commit.policy_lsn]
                why = f": {policy.why}" if policy.why else ""
                kind = policy.document.get("kind", "?")
                return "commit", commit.effective_step, policy.author, f"policy {commit.policy_lsn}, {kind}{why}"
            case Decision() as decision:
                lane: Lane = "shadow" if decision.shadow else "decision"
                return lane, decision.step, "", text
            case Pass():
                return "hold", entry.body.step, "", text
            case Pause():
                return "hold", now, entry.body.author, text
            case Checkpoint() | End():
                return "run", entry.body.step, "", text
            case Lease() | Genesis():
                return "run", now, "", text
        return "run", now, "", text

    def _policy_event(self, lsn: int, policy: PolicyEntry) -> tuple[Lane, int, str, str]:
        now, text = self.history.last_step + 1, summary(policy)
        key = hashlib.sha256(canonical_json(rollback_document(self.history, lsn))).digest()
        earlier = self._lsn_of_document.setdefault(key, lsn)
        if policy.shadow:
            return "shadow", now, policy.author, text
        if policy.why.startswith("rollback to policy") or earlier != lsn:
            back = "" if earlier == lsn else f"; the document of policy {earlier} again"
            return "rollback", now, policy.author, text + back
        return "proposal", now, policy.author, text
