"""What a proxy run reads: the plan of its policy, extended at every decision of an online one.

The same plan, stretches and decisions as in a job; only the journal between them is left out. G domains, K arms.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.arms import arms_of
from mixwright.data_mixing.config_file import StrictModel
from mixwright.data_mixing.decide import Decided, decide, first_stretches
from mixwright.data_mixing.domain import Cap
from mixwright.data_mixing.entries import Genesis, PolicyEntry
from mixwright.data_mixing.mixture import assign, segments
from mixwright.data_mixing.online import Interval, Losses, OnlineDocument, OnlineKind, Stretch, Window
from mixwright.data_mixing.permutation import mix_key
from mixwright.data_mixing.plan import CommittedPolicy, Plan
from mixwright.data_mixing.policy import PolicyDocument, parse

_ROUNDS = 0x0051
_LOSS_SUM, _NUM_TOKENS = 0, 2  # columns of DomainSums


class MixturePoint(StrictModel):
    """From `step` on, this share of each domain."""

    step: int
    shares: dict[str, float]
    is_perturbation: bool = False


class DecisionNote(StrictModel):
    """What an online policy decided at the boundary before `step`: shares by arm, and why not what it wanted."""

    step: int
    shares: dict[str, float]
    action: str
    reason: str


class Steering:
    """A policy whose program is known from the start."""

    def __init__(self, genesis: Genesis, document: PolicyDocument, plan: Plan) -> None:
        self.genesis, self.plan = genesis, plan
        self._document = document

    def begin(self, sums_GC: NDArray[np.float64]) -> None:
        """Validation sums [G, 4] (as DomainSums has them) before step 0."""

    def note_rate(self, rate: float) -> None:
        """The learning rate of the step just done."""

    def mark_after(self, step: int) -> Stretch | None:
        """The stretch that ends with `step`, if one does."""
        return None

    def measure(self, step: int, train_GC: NDArray[np.float64], validation_GC: NDArray[np.float64] | None) -> None:
        """Sums [G, 4] of the stretch that ends before `step`: of its training rows, and of the validation after it."""

    def points(self) -> tuple[MixturePoint, ...]:
        """The mixtures that were read."""
        starts = {segment.start_step for commit in self.plan.commits for segment in commit.policy.program}
        starts |= {event.step for event in self.plan.exhaustion()}
        return tuple(self._point(step) for step in sorted(starts) if step < self.genesis.num_steps)

    def decisions(self) -> tuple[DecisionNote, ...]:
        """Decisions in order."""
        return ()

    def _point(self, step: int, is_perturbation: bool = False) -> MixturePoint:
        share_G = self.plan.proportions(step).tolist()
        named = {domain.name: share for domain, share in zip(self.genesis.domains, share_G, strict=True)}
        return MixturePoint(step=step, shares=named, is_perturbation=is_perturbation)


def steering(policy: dict[str, Any], genesis: Genesis) -> Steering:
    """What a policy document makes a proxy run read; raises PolicyRejected."""
    document, kind = parse(policy)
    if isinstance(document, OnlineDocument):
        return OnlineSteering(genesis, document, cast(OnlineKind, kind))
    program = kind.compile_program(document, genesis)
    entry = PolicyEntry(
        document=_recorded(document),
        program=program,
        caps=_caps(document, genesis),
        loss_weighting=document.loss_weighting,
    )
    return Steering(genesis, document, Plan(genesis, [CommittedPolicy(0, 1, entry)]))


class OnlineSteering(Steering):
    """An online policy: stretches, and a decision at the end of each round, made at once."""

    def __init__(self, genesis: Genesis, document: OnlineDocument, kind: OnlineKind) -> None:
        self._kind, self._online = kind, document
        self._arms, self._caps = arms_of(document, genesis.domains), _caps(document, genesis)
        self._shares: tuple[float, ...] = self._arms.initial_K
        self._state: dict[str, Any] = {}
        self._notes: list[DecisionNote] = []
        self._done: list[tuple[int, Stretch]] = []
        stretches = first_stretches(kind, document, self._arms, self._key(genesis, 0))
        super().__init__(genesis, document, Plan(genesis, [self._commit(0, stretches)]))
        self._begin_round(0, stretches)
        self._before: Losses = self._unknown
        self._rates: list[float] = []

    @property
    def _unknown(self) -> Losses:
        return (None,) * len(self._arms)

    def begin(self, sums_GC: NDArray[np.float64]) -> None:
        self._before = self._pool(sums_GC)

    def note_rate(self, rate: float) -> None:
        self._rates.append(rate)

    def mark_after(self, step: int) -> Stretch | None:
        return self._ending.get(step + 1)

    def measure(self, step: int, train_GC: NDArray[np.float64], validation_GC: NDArray[np.float64] | None) -> None:
        stretch = self._ending[step]
        self._intervals.append(self._interval(step, stretch, train_GC, validation_GC))
        self._before, self._rates = self._intervals[-1].after, []
        if step == max(self._ending) and step < self.genesis.num_steps:
            self._decide(step)

    def points(self) -> tuple[MixturePoint, ...]:
        events = {event.step for event in self.plan.exhaustion()}
        points = {step: self._point(step) for step in events if step < self.genesis.num_steps}
        points |= {step: self._point(step, stretch.is_perturbation) for step, stretch in self._done}
        return tuple(points[step] for step in sorted(points) if step < self.genesis.num_steps)

    def decisions(self) -> tuple[DecisionNote, ...]:
        return tuple(self._notes)

    def _decide(self, step: int) -> None:
        window = self._window(step)
        key = self._key(self.genesis, window.decision + 1)
        decided = decide(self._kind, self._online, window, self._state, key, self._arms.fallback_K)
        self._shares, self._state = decided.shares, dict(decided.proposal.state)
        self._notes.append(self._note(step, decided))
        self.plan = self.plan.extended(self._commit(step, decided.stretches))
        self._begin_round(step, decided.stretches)

    def _begin_round(self, step: int, stretches: Sequence[Stretch]) -> None:
        """What follows from `step` on; a stretch that the run's end cuts off is not measured."""
        ends = [step + steps for steps in itertools.accumulate(stretch.num_steps for stretch in stretches)]
        self._ending = dict(zip(ends, stretches, strict=True))
        self._done += zip([step, *ends], stretches, strict=False)
        self._intervals: list[Interval] = []

    def _commit(self, step: int, stretches: Sequence[Stretch]) -> CommittedPolicy:
        """The stretches from `step` on, then the chosen mixture."""
        ends = [step + steps for steps in itertools.accumulate(stretch.num_steps for stretch in stretches)]
        shares = [*(stretch.shares for stretch in stretches), self._shares]
        starts = [0, *ends]  # a program begins at step 0; it is clipped at the step of its commit
        program = segments((start, self._arms.expand(share)) for start, share in zip(starts, shares, strict=True))
        # The weighting of the first commit stays in force, as that of a job's root does.
        weighting = self._online.loss_weighting if step == 0 else None
        entry = PolicyEntry(
            document=_recorded(self._online), program=program, caps=self._caps, loss_weighting=weighting
        )
        return CommittedPolicy(step, 1 + len(self._notes), entry)

    def _interval(
        self, step: int, stretch: Stretch, train_GC: NDArray[np.float64], validation_GC: NDArray[np.float64] | None
    ) -> Interval:
        first = step - stretch.num_steps
        return Interval(
            first_step=first,
            last_step=step - 1,
            rows=self._arms.sum(self.plan.cursors(step) - self.plan.cursors(first)),
            before=self._before,
            after=self._unknown if validation_GC is None else self._pool(validation_GC),
            train_loss=self._pool(train_GC),
            train_tokens=self._arms.sum(train_GC[:, _NUM_TOKENS]),
            learning_rate=float(np.mean(self._rates)),
            is_perturbation=stretch.is_perturbation,
        )

    def _window(self, step: int) -> Window:
        return Window(
            step=step,
            decision=len(self._notes),
            arms=self._arms.names,
            shares=self._shares,
            intervals=tuple(self._intervals),
            rows_available=self._arms.rows_K,
            num_steps=self.genesis.num_steps,
            tokens_per_row=self.genesis.sequence_length,
            target=self._arms.target_K,
        )

    def _note(self, step: int, decided: Decided) -> DecisionNote:
        named = dict(zip(self._arms.names, decided.shares, strict=True))
        return DecisionNote(step=step, shares=named, action=decided.action, reason=decided.reason)

    def _pool(self, sums_GC: NDArray[np.float64]) -> Losses:
        return self._arms.pool_losses(sums_GC[:, _LOSS_SUM], sums_GC[:, _NUM_TOKENS])

    def _key(self, genesis: Genesis, decision: int) -> int:
        return mix_key(_ROUNDS, genesis.seed, decision)


def _recorded(document: PolicyDocument) -> dict[str, Any]:
    return document.model_dump(mode="json", exclude_unset=True)


def _caps(document: PolicyDocument, genesis: Genesis) -> dict[str, Cap]:
    """Caps of the document by domain name."""
    members = assign(document.caps, genesis.domains, "caps") if document.caps else {}
    return {genesis.domains[index].name: document.caps[name] for name, indices in members.items() for index in indices}
