"""A run in figures, followed from its journal: what a live view draws and what a Prometheus endpoint answers."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.entries import PROPORTION_TOTAL, Commit, Decision, DomainLoss, Pass, Reject, Report
from mixwright.data_mixing.entry_file import Entry
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.journal import read_entries
from mixwright.data_mixing.plan import Exhaustion, Plan
from mixwright.data_mixing.run_status import RunStatus, run_status
from mixwright.data_mixing.snapshot import resume
from mixwright.data_mixing.timeline import Catalogue

RECENT_ENTRIES = 64
"""Entries whose times are read when a run is opened: enough for its pace and its newest commits."""
PACE_REPORTS = 16
STALL = 10
RECENT_COMMITS = 16


@dataclass(frozen=True)
class DomainFigures:
    """One domain: what was asked for and what came of it.

    requested: its proportion in the mixture in force; realised: its share of the rows since that mixture took
    effect, None before the first; rows_off: rows that it got beyond what it was promised so far, never more than a few;
    loss, loss_error: newest mean cross-entropy and its standard error (nats per token); exhaustion: where it reaches
    its cap under the commits so far.
    """

    name: str
    requested: float
    realised: float | None
    rows_off: float
    num_tokens: int
    epochs: float
    loss: float | None
    loss_error: float | None
    exhaustion: Exhaustion | None


@dataclass(frozen=True)
class NewCommit:
    """A COMMIT with its time (seconds since 1970), and how many steps after the last reported one it took effect."""

    time: float
    policy_lsn: int
    effective_step: int
    lead_steps: int


@dataclass(frozen=True)
class RunFigures:
    """A run at one moment. `loss` is the mean of the newest report, over all tokens; `entry_time` the newest entry's.

    `tokens_per_s` and `seconds_left` are None until two reports of one attempt tell the pace.
    """

    status: RunStatus
    domains: tuple[DomainFigures, ...]
    commits: tuple[NewCommit, ...]
    loss: float | None
    tokens_per_s: float | None
    seconds_left: float | None
    entry_time: float


class Pace:
    """Steps per second by the times at which reports were written; a job that was started again begins anew.

    Intervals that are negative, or STALL times as long as is usual, are left out: the clock was set, or nobody trained.
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[int, float, int]] = deque(maxlen=PACE_REPORTS)

    def add(self, time: float, report: Report) -> None:
        """Take in the next training report."""
        if self._seen and (self._seen[-1][0] != report.attempt or self._seen[-1][2] >= report.last_step):
            self._seen.clear()
        self._seen.append((report.attempt, time, report.last_step))

    @property
    def steps_per_s(self) -> float | None:
        """None until two reports are known."""
        intervals = [(last - first, ended - began) for (_, began, first), (_, ended, last) in pairwise(self._seen)]
        s_per_step = sorted(seconds / steps for steps, seconds in intervals if seconds > 0)
        if not s_per_step:
            return None
        longest = STALL * s_per_step[(len(s_per_step) - 1) // 2]
        counted = [(steps, seconds) for steps, seconds in intervals if 0 < seconds <= longest * steps]
        return sum(steps for steps, _ in counted) / sum(seconds for _, seconds in counted)


class RunFollower:
    """The history of the run in `folder` (its journal), with what only the entries' times tell. Raises JournalError."""

    def __init__(self, folder: Path) -> None:
        self._journal, self.history = resume(folder, writer="reader")
        self.pace = Pace()
        self.commits: deque[NewCommit] = deque(maxlen=RECENT_COMMITS)
        self.entry_time = 0.0
        self._reported_step = -1
        for entry in read_entries(folder, max(self.history.last_lsn + 1 - RECENT_ENTRIES, 0)):
            if entry.lsn <= self.history.last_lsn:
                self._note(entry)

    def poll(self) -> list[Entry]:
        """Read what is new; the entries, in order."""
        entries = self._journal.poll()
        for entry in entries:
            self.history.apply(entry)
            self._note(entry)
        return entries

    def _note(self, entry: Entry) -> None:
        self.entry_time = entry.time
        match entry.body:
            case Report(kind="train"):
                self.pace.add(entry.time, entry.body)
                self._reported_step = entry.body.last_step
            case Commit():
                lead = entry.body.effective_step - self._reported_step - 1
                self.commits.append(NewCommit(entry.time, entry.body.policy_lsn, entry.body.effective_step, lead))

    def figures(self) -> RunFigures:
        """The run as it stands now. Raises JournalError when it has no GENESIS entry."""
        genesis, status, speed = self.history.genesis, run_status(self.history), self.pace.steps_per_s
        losses = newest_losses(self.history)
        num_tokens = sum(loss.num_tokens for loss in losses.values())
        return RunFigures(
            status=status,
            domains=domain_figures(self.history, losses) if self.history.commits else (),
            commits=tuple(self.commits),
            loss=sum(loss.loss_sum for loss in losses.values()) / num_tokens if num_tokens else None,
            tokens_per_s=None if speed is None else speed * genesis.rows_per_step * genesis.sequence_length,
            seconds_left=None if not speed else (genesis.num_steps - status.next_step) / speed,
            entry_time=self.entry_time,
        )


def newest_losses(history: RunHistory) -> Mapping[str, DomainLoss]:
    """Loss sums by domain of the newest training report."""
    return next((report.domains for report in reversed(history.reports) if report.kind == "train"), {})


def domain_figures(history: RunHistory, losses: Mapping[str, DomainLoss]) -> tuple[DomainFigures, ...]:
    """Every domain of a run that has a committed policy, in catalogue order."""
    genesis, plan, step = history.genesis, history.plan(), history.last_step + 1
    shown_step = min(step, genesis.num_steps - 1)
    requested_G, cursor_G = plan.proportions(shown_step), plan.cursors(step)
    realised_G = _realised(plan, shown_step, step, cursor_G)
    credit_G = Catalogue(genesis).in_catalogue_order(plan.state(step).credit_G) / PROPORTION_TOTAL
    # A later commit may raise a cap: the last event of a domain is the one that counts.
    exhaustions = {event.domain: event for event in plan.exhaustion()}
    return tuple(
        DomainFigures(
            name=domain.name,
            requested=float(requested_G[index]),
            realised=None if realised_G is None else float(realised_G[index]),
            rows_off=-float(credit_G[index]),
            num_tokens=int(cursor_G[index]) * genesis.sequence_length,
            epochs=int(cursor_G[index]) / domain.num_rows,
            loss=_mean(losses.get(domain.name)),
            loss_error=_error(losses.get(domain.name)),
            exhaustion=exhaustions.get(domain.name),
        )
        for index, domain in enumerate(genesis.domains)
    )


def _realised(plan: Plan, shown_step: int, step: int, cursor_G: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """Shares [G] of the rows since the mixture in force took effect; None when there is no such row yet."""
    lsn = plan.policy_lsn(shown_step)
    commit = max((one for one in plan.commits if one.lsn == lsn), key=lambda one: one.effective_step)
    origin = commit.policy.origin(commit.effective_step)
    starts = [origin + segment.start_step for segment in commit.policy.program]
    since = max(commit.effective_step, *(start for start in starts if start <= shown_step))
    drawn_G = cursor_G - plan.cursors(since)
    total = int(drawn_G.sum())
    return drawn_G / total if step > since and total else None


def _mean(loss: DomainLoss | None) -> float | None:
    return loss.loss_sum / loss.num_tokens if loss is not None and loss.num_tokens else None


def _error(loss: DomainLoss | None) -> float | None:
    """Standard error of the mean, tokens taken as independent (they are not: a lower bound)."""
    if loss is None or not loss.num_tokens:
        return None
    mean = loss.loss_sum / loss.num_tokens
    return math.sqrt(max(loss.loss_square_sum / loss.num_tokens - mean**2, 0.0) / loss.num_tokens)


@dataclass
class Refusals:
    """How often in the run something that was asked of the mixture did not happen, by kind.

    reject: a policy was refused; hold, fallback: an online policy failed or was not sound, and the mixture was kept or
    replaced; pass: no decision came in time.
    """

    reject: int = 0
    hold: int = 0
    fallback: int = 0
    pass_: int = 0

    def add(self, entries: Sequence[Entry]) -> None:
        """Count the next entries."""
        for entry in entries:
            match entry.body:
                case Reject():
                    self.reject += 1
                case Pass():
                    self.pass_ += 1
                case Decision(action="hold", proposal=proposal) if proposal:  # people's own holds compute nothing
                    self.hold += 1
                case Decision(action="fallback"):
                    self.fallback += 1

    def by_kind(self) -> dict[str, int]:
        """Counts by the kind's name."""
        return {"reject": self.reject, "hold": self.hold, "fallback": self.fallback, "pass": self.pass_}
