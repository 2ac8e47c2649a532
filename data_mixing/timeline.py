"""The stretches of a plan: runs of steps with one apportionment, derived from commits in order, kept sparsely.

A stretch ends where the next mixture begins (a commit, or a segment of the policy's program), where a domain reaches
its cap, or after 2**30 rows, where counting starts afresh so that products stay within 64 bits. The last kind changes
no row: the credit that is carried makes the next stretch count on exactly.

Arrays are [G] in order of domain id.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.apportion import MAX_ROWS, Apportionment, without
from mixwright.data_mixing.domain import Cap, OnExhaust
from mixwright.data_mixing.entries import Genesis, Mark, PolicyEntry
from mixwright.data_mixing.errors import MixingError, nearest

NO_LIMIT = int(np.iinfo(np.int64).max)
NO_END = 1 << 62
_RECENT_STRETCHES = 32
_KEPT_BYTES = 64 << 20
_MAX_KEPT = 1024

Int64s = NDArray[np.int64]
Bools = NDArray[np.bool_]
Number = TypeVar("Number", np.int64, np.uint64)


@dataclass(frozen=True)
class CommittedPolicy:
    """The policy of journal entry `lsn` (the POLICY) holds from `effective_step` on."""

    effective_step: int
    lsn: int
    policy: PolicyEntry


@dataclass(frozen=True)
class Exhaustion:
    """A domain reaches its cap: `step` is the first whose rows would exceed it. `stop` ends the plan there."""

    domain: str
    step: int
    max_epochs: float
    action: OnExhaust


@dataclass(frozen=True, eq=False)
class PlanState:
    """Rows drawn before `step` and credits (rows * 2**31) at it, int64 [G] each, in order of domain id.

    `exhausted_G` marks domains that the policy in force leaves out; a new commit asks them again.
    """

    step: int
    cursor_G: Int64s
    credit_G: Int64s
    exhausted_G: Bools


class Catalogue:
    """The domains of a run in order of their id, and the way back to the order of genesis.domains."""

    def __init__(self, genesis: Genesis) -> None:
        if genesis.rows_per_step > MAX_ROWS:
            raise ValueError(f"rows_per_step={genesis.rows_per_step} is more than {MAX_ROWS}")
        id_G = np.array([domain.id for domain in genesis.domains], dtype=np.uint64)
        self.genesis = genesis
        self.index_G = np.argsort(id_G)
        self.id_G = id_G[self.index_G]
        if np.any(self.id_G[1:] == self.id_G[:-1]):
            raise ValueError("two domain names have the same 64-bit id; rename one of them")
        self.domains = [genesis.domains[index] for index in self.index_G]
        self.num_rows_G = np.array([domain.num_rows for domain in self.domains], dtype=np.int64)
        self.limit_G = np.array([limit(domain.cap, domain.num_rows) for domain in self.domains], dtype=np.int64)

    def in_id_order(self, values: tuple[int, ...]) -> Int64s:
        """Values [G] that stand in catalogue order, in order of domain id."""
        return np.array(values, dtype=np.int64)[self.index_G]

    def in_catalogue_order(self, value_G: NDArray[Number]) -> NDArray[Number]:
        """Values [G] that stand in order of domain id, in catalogue order."""
        restored = np.empty_like(value_G)
        restored[self.index_G] = value_G
        return restored


def limit(cap: Cap, num_rows: int) -> int:
    """Rows that may be drawn of a domain with `num_rows` rows in the whole run."""
    if cap.max_epochs is None or cap.on_exhaust == "allow":
        return NO_LIMIT
    # The decimal that the user wrote, not its binary neighbour: 0.3 epochs of 10 rows are 3 rows.
    return min(int(Fraction(repr(cap.max_epochs)) * num_rows), NO_LIMIT)


def check_fits(genesis: Genesis, lsn: int, policy: PolicyEntry) -> None:
    """Raise ValueError when a policy is not one for the domains of the run."""
    names = {domain.name for domain in genesis.domains} if policy.caps else set()
    for name in policy.caps:
        if name not in names:
            raise ValueError(f"policy {lsn}: caps name {name!r}, which is no domain of the run{nearest(name, names)}")
    for segment in policy.program:
        if len(segment.proportions) != len(genesis.domains):
            raise ValueError(
                f"policy {lsn}: the segment at step {segment.start_step} has {len(segment.proportions)} proportions, "
                f"the run has {len(genesis.domains)} domains"
            )


@dataclass(frozen=True)
class Regime:
    """What one commit asks for. Raises ValueError when its policy does not fit the catalogue."""

    catalogue: Catalogue
    commit: CommittedPolicy

    def __post_init__(self) -> None:
        check_fits(self.catalogue.genesis, self.commit.lsn, self.commit.policy)

    @property
    def start_step(self) -> int:
        return self.commit.effective_step

    @cached_property
    def limit_G(self) -> Int64s:
        """Rows of each domain that may be drawn in the whole run while this policy is in force."""
        limit_G = self.catalogue.limit_G.copy()
        caps = self.commit.policy.caps
        for position, domain in enumerate(self.catalogue.domains if caps else ()):
            if domain.name in caps:
                limit_G[position] = limit(caps[domain.name], domain.num_rows)
        return limit_G

    def mixture_at(self, step: int) -> tuple[Int64s, int]:
        """Proportions [G] of the program at `step`, and the first step of the program's next segment."""
        program, origin = self.commit.policy.program, self.commit.policy.origin(self.start_step)
        index = bisect.bisect_right(program, step - origin, key=lambda segment: segment.start_step)
        next_start = origin + program[index].start_step if index < len(program) else NO_END
        return self.catalogue.in_id_order(program[index - 1].proportions), next_start

    def mark(self, step: int) -> tuple[int, Mark | None]:
        """The policy's entry, and its mark at the boundary before training step `step`, if it has one."""
        marks, wanted = self.commit.policy.marks, step - self.commit.policy.origin(self.start_step)
        index = bisect.bisect_left(marks, wanted, key=lambda mark: mark.step)
        return self.commit.lsn, marks[index] if index < len(marks) and marks[index].step == wanted else None

    def exhaustions(self, reached_G: Bools, step: int) -> tuple[Exhaustion, ...]:
        """The events that the domains marked in `reached_G` cannot fill `step`, in order of domain id."""
        domains = [self.catalogue.domains[position] for position in np.flatnonzero(reached_G)]
        caps = [self.commit.policy.caps.get(domain.name, domain.cap) for domain in domains]
        return tuple(
            Exhaustion(domain.name, step, cap.max_epochs or 0.0, cap.on_exhaust)
            for domain, cap in zip(domains, caps, strict=True)
        )


@dataclass(frozen=True, eq=False)
class Stretch:
    """Steps [start.step, end_step) with one apportionment; None where the plan has ended, by `ended_by`.

    `exhaustions` are the domains that reach their cap at the stretch's first step; `exhausted_G` marks all that are
    left out.
    """

    start: PlanState
    end_step: int
    rows_per_step: int
    exhausted_G: Bools
    exhaustions: tuple[Exhaustion, ...]
    apportionment: Apportionment | None
    ended_by: Exhaustion | None = None

    def covers(self, step: int) -> bool:
        """Whether `step` lies in the stretch."""
        return self.start.step <= step < self.end_step

    def cursors(self, step: int) -> Int64s:
        """Rows drawn before `step` [G], start.step <= step <= end_step."""
        if self.apportionment is None:
            return self.start.cursor_G
        return self.start.cursor_G + self.apportionment.counts((step - self.start.step) * self.rows_per_step)

    def state(self, step: int) -> PlanState:
        """The state at `step`, start.step <= step <= end_step."""
        if step == self.start.step:
            return self.start
        if self.apportionment is None:
            return replace(self.start, step=step, exhausted_G=self.exhausted_G)
        num_rows = (step - self.start.step) * self.rows_per_step
        count_G = self.apportionment.counts(num_rows)
        credit_G = self.apportionment.carried(num_rows, count_G)
        return PlanState(step, self.start.cursor_G + count_G, credit_G, self.exhausted_G)


class Timeline:
    """Finds the stretch of a step by deriving forward from the nearest state that is known. Not safe for threads.

    A commit supersedes those before it in the sequence from its effective step on.
    """

    def __init__(
        self, catalogue: Catalogue, commits: tuple[CommittedPolicy, ...], known: tuple[PlanState, ...]
    ) -> None:
        self.catalogue, self.commits = catalogue, commits
        self._regimes: list[Regime] = []
        self._weighting_regimes: list[Regime | None] = []
        for commit in commits:
            self._supersede(Regime(catalogue, commit))
        self._known = {state.step: state for state in known}
        self._recent: list[Stretch] = []

    def _supersede(self, regime: Regime) -> None:
        while self._regimes and self._regimes[-1].start_step >= regime.start_step:
            self._regimes.pop()
            self._weighting_regimes.pop()
        self._regimes.append(regime)
        # A policy that says nothing of weighting leaves it as it is.
        before = self._weighting_regimes[-1] if self._weighting_regimes else None
        self._weighting_regimes.append(before if regime.commit.policy.loss_weighting is None else regime)

    def extended(self, commit: CommittedPolicy) -> Timeline:
        """This timeline with one more commit; nothing up to its effective step is derived again."""
        timeline = Timeline(self.catalogue, (), ())
        timeline.commits, timeline._regimes = (*self.commits, commit), list(self._regimes)
        timeline._weighting_regimes = list(self._weighting_regimes)
        timeline._supersede(Regime(self.catalogue, commit))
        end = commit.effective_step
        timeline._known = {step: state for step, state in self._known.items() if step <= end}
        before = (stretch for stretch in self._recent if stretch.start.step < end)
        timeline._recent = [replace(stretch, end_step=min(stretch.end_step, end)) for stretch in before]
        return timeline

    def regime_at(self, step: int) -> Regime:
        """What is in force at `step`; raises MixingError when nothing is."""
        return self._regimes[self._index_at(step)]

    def weighting_regime_at(self, step: int) -> Regime | None:
        """The newest commit in force at `step` or before it whose policy says how samples are weighted."""
        return self._weighting_regimes[self._index_at(step)]

    def _index_at(self, step: int) -> int:
        index = bisect.bisect_right(self._regimes, step, key=lambda regime: regime.start_step)
        if index == 0:
            starts = [f"the first takes effect at step {regime.start_step}" for regime in self._regimes]
            raise MixingError(f"no policy is in force at step {step}: {(*starts, 'none is committed')[0]}")
        return index - 1

    def regimes_around(self, step: int) -> list[Regime]:
        """What is in force right before `step`, and what begins there."""
        ended = [self.regime_at(step - 1)] if self._regimes and step > self._regimes[0].start_step else []
        regime = self.regime_at(step)
        return [*ended, regime] if regime.start_step == step else ended

    def at(self, step: int) -> Stretch:
        """The stretch that covers `step`."""
        for stretch in reversed(self._recent):
            if stretch.covers(step):
                return stretch
        state = self._nearest_state(step)
        while True:
            stretch = self._derive(state)
            self._remember(state, stretch)
            if stretch.covers(step):
                return stretch
            state = stretch.state(stretch.end_step)

    def state_at(self, step: int) -> PlanState:
        """The state at `step`."""
        return self.at(step).state(step)

    def exhaustions(self, before_step: int, from_step: int = 0) -> Iterator[Exhaustion]:
        """Events before `before_step` in order of step, from the stretch that covers `from_step` on."""
        step = max(self._regimes[0].start_step, from_step) if self._regimes else before_step
        while step < before_step:
            stretch = self.at(step)
            yield from stretch.exhaustions
            step = stretch.end_step

    def _nearest_state(self, step: int) -> PlanState:
        """The latest state at or before `step` that is known or ends a recent stretch."""
        self.regime_at(step)
        ends = [stretch for stretch in self._recent if stretch.end_step <= step]
        latest = max(ends, key=lambda stretch: stretch.end_step, default=None)
        known = max((known for known in self._known if known <= step), default=-1)
        if latest is not None and latest.end_step > known:
            return latest.state(latest.end_step)
        if known >= 0:
            return self._known[known]
        size = len(self.catalogue.domains)
        zeros = np.zeros(size, dtype=np.int64)
        return PlanState(self._regimes[0].start_step, zeros, zeros, np.zeros(size, dtype=np.bool_))

    def _remember(self, state: PlanState, stretch: Stretch) -> None:
        """Keep the state that `stretch` was derived from: with its exhaustions in it they would not be found again."""
        self._recent = [*self._recent, stretch][-_RECENT_STRETCHES:]
        self._known[state.step] = state
        bytes_per_state = 17 * len(self.catalogue.domains)
        if len(self._known) > min(_MAX_KEPT, max(64, _KEPT_BYTES // bytes_per_state)):
            self._known = {step: self._known[step] for step in sorted(self._known)[::2]}

    def _derive(self, start: PlanState) -> Stretch:
        """The stretch that begins at `start`, with the domains left out that reach their cap at its first step."""
        regime = self.regime_at(start.step)
        proportion_G, next_segment = regime.mixture_at(start.step)
        next_commit = self._next_start(start.step)
        rows_per_step = self.catalogue.genesis.rows_per_step
        end = min(next_segment, next_commit, start.step + MAX_ROWS // rows_per_step)
        exhausted_G = np.zeros_like(start.exhausted_G) if start.step == regime.start_step else start.exhausted_G
        events: tuple[Exhaustion, ...] = ()
        while True:
            share_G = without(proportion_G, exhausted_G)
            if share_G is None:
                spent = events or regime.exhaustions((proportion_G > 0) & exhausted_G, start.step)
                ended_by = replace(spent[-1], action="stop")
                return Stretch(start, next_commit, rows_per_step, exhausted_G, (*events, ended_by), None, ended_by)
            apportionment = Apportionment(share_G, start.credit_G)
            stretch = Stretch(start, end, rows_per_step, exhausted_G, events, apportionment)
            event_step = _first_step_over(stretch, regime.limit_G)
            if event_step is None or event_step > start.step:
                return replace(stretch, end_step=end if event_step is None else event_step)
            reached_G = _is_over(stretch, event_step + 1, regime.limit_G)
            reached = regime.exhaustions(reached_G, start.step)
            events, exhausted_G = events + reached, exhausted_G | reached_G
            stops = [event for event in reached if event.action == "stop"]
            if stops:
                return Stretch(start, next_commit, rows_per_step, exhausted_G, events, None, stops[0])

    def _next_start(self, step: int) -> int:
        index = bisect.bisect_right(self._regimes, step, key=lambda regime: regime.start_step)
        return self._regimes[index].start_step if index < len(self._regimes) else NO_END


def _is_over(stretch: Stretch, step: int, limit_G: Int64s) -> Bools:
    """Domains [G] that are still drawn in the stretch and have had more rows than their limit before `step`."""
    assert stretch.apportionment is not None
    return (stretch.cursors(step) > limit_G) & (stretch.apportionment.proportions > 0)


def _first_step_over(stretch: Stretch, limit_G: Int64s) -> int | None:
    """First step of the stretch whose rows would exceed a limit. Bisection: cursors never decrease."""

    def is_over(step: int) -> bool:
        return bool(_is_over(stretch, step + 1, limit_G).any())

    if not np.any(limit_G < NO_LIMIT) or not is_over(stretch.end_step - 1):
        return None
    return bisect.bisect_left(range(stretch.end_step), True, lo=stretch.start.step, key=is_over)
