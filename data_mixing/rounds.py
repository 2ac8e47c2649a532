"""The rounds of online policies in a run: from stretches to journal entries, and from the journal back to a Window.

A round lasts from one decision to the next. Its steps count from the effective step of the POLICY that carries it, and
its boundaries are marks, so that every rank knows them from the journal alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixwright.data_mixing.arms import Arms, arms_of
from mixwright.data_mixing.decide import Decided, decide, first_stretches
from mixwright.data_mixing.entries import Decision, DomainLoss, Genesis, Mark, PolicyEntry, Report, Segment
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.measured import add_up, mean_learning_rate
from mixwright.data_mixing.mixture import segments
from mixwright.data_mixing.online import Interval, Losses, OnlineDocument, OnlineKind, Stretch, Window
from mixwright.data_mixing.permutation import mix_key
from mixwright.data_mixing.plan import Plan

_ROUNDS = 0x0051


@dataclass(frozen=True)
class Round:
    """An online policy as this run has it."""

    kind: OnlineKind
    document: OnlineDocument
    genesis: Genesis
    arms: Arms

    @classmethod
    def of(cls, kind: OnlineKind, document: OnlineDocument, genesis: Genesis) -> Round:
        """Raises PolicyRejected when the document's arms do not fit the run's domains."""
        return cls(kind, document, genesis, arms_of(document, genesis.domains))

    def key(self, decision: int) -> int:
        """Seeds the permutations of the round that follows decision `decision - 1`."""
        return mix_key(_ROUNDS, self.genesis.seed, decision)

    def column(self, losses: Mapping[str, DomainLoss], field: str) -> list[float]:
        """One figure of every domain [G], 0 where there is none."""
        return [getattr(losses[d.name], field) if d.name in losses else 0 for d in self.genesis.domains]

    def mean_losses(self, losses: Mapping[str, DomainLoss]) -> Losses:
        """Mean loss of each arm [K]."""
        return self.arms.pool_losses(self.column(losses, "loss_sum"), self.column(losses, "num_tokens"))

    def first_program(self) -> tuple[tuple[Segment, ...], tuple[Mark, ...]]:
        """Program and marks up to the first decision. Raises PolicyRejected."""
        stretches = first_stretches(self.kind, self.document, self.arms, self.key(0))
        return self.program(stretches, self.arms.initial_K)

    def program(
        self, stretches: Sequence[Stretch], share_K: Sequence[float]
    ) -> tuple[tuple[Segment, ...], tuple[Mark, ...]]:
        """Segments and marks of the stretches; after the last one the mixture is `share_K` for good."""
        ends = list(itertools.accumulate(stretch.num_steps for stretch in stretches))
        starts = [0, *ends]
        shares = [*(stretch.shares for stretch in stretches), share_K]
        program = segments((start, self.arms.expand(share)) for start, share in zip(starts, shares, strict=True))
        marks = [Mark(step=0, evaluate=stretches[0].evaluate)]
        marks += [
            Mark(step=end, evaluate=stretch.evaluate, is_perturbation=stretch.is_perturbation)
            for end, stretch in zip(ends, stretches, strict=True)
        ]
        due = {"decide": self.document.decide, "timeout_s": self.document.guard.timeout_s}
        return program, (*marks[:-1], marks[-1].model_copy(update=due))

    def decide(self, window: Window, state: Mapping[str, Any]) -> Decided:
        """The decision at the end of `window`; never raises for bad numbers."""
        key = self.key(window.decision + 1)
        return decide(self.kind, self.document, window, state, key, self.arms.fallback_K)

    def next_policy(self, root_lsn: int, root: PolicyEntry, decision_lsn: int, decision: Decision) -> PolicyEntry:
        """What carries a decision on: the round that follows it, or its mixture for good while decisions are held."""
        if decision.stretches:
            stretches = [Stretch.model_validate(stretch) for stretch in decision.stretches]
            program, marks = self.program(stretches, decision.shares)
        else:
            program, marks = segments([(0, self.arms.expand(decision.shares))]), ()
        return PolicyEntry(
            document=root.document,
            program=program,
            counts_from_commit=True,
            marks=marks,
            root=root_lsn,
            decision_lsn=decision_lsn,
            caps=root.caps,
            at_step=decision.step,
            shadow=root.shadow,
            author=root.author,
            why=f"decision {decision.decision} of policy {root_lsn}",
            request_id=f"decision-{decision_lsn}",
        )


def due_step(history: RunHistory) -> int | None:
    """The boundary whose decision is due: the round in force is over and everything about it is reported."""
    if not history.commits:
        return None
    newest = history.commits[-1]
    mark = newest.policy.marks[-1] if newest.policy.marks else None
    if mark is None or not mark.decide:
        return None
    step = newest.policy.origin(newest.effective_step) + mark.step
    wanted = {"train", "validation"} if mark.evaluate else {"train"}
    reported = {report.kind for report in history.measured if report.last_step == step - 1}
    return step if wanted <= reported and step < history.genesis.num_steps else None


def due_shadow_step(history: RunHistory, root: int) -> int | None:
    """The boundary of a shadow's next decision, once steps as many as a round has are reported."""
    known = history.decisions.get(root)
    if known is None:
        num_steps = history.policies[root].marks[-1].step
    else:
        num_steps = sum(int(stretch["num_steps"]) for stretch in known[1].stretches)
    wanted = history.measures_from[root] + max(num_steps, 1)
    ends = [report.last_step + 1 for report in history.measured if report.kind == "train"]
    return next((end for end in ends if wanted <= end < history.genesis.num_steps), None)


def window_of(round_: Round, history: RunHistory, root: int, step: int) -> Window:
    """What online policy `root` may look at for its decision at the boundary before `step`."""
    genesis, arms = round_.genesis, round_.arms
    known = history.decisions.get(root)
    first_step = history.measures_from[root]
    if history.policies[root].shadow:
        boundaries = _reported(history, first_step, step)
    else:
        boundaries = _marked(history.plan(), first_step, step)
    return Window(
        step=step,
        decision=known[1].decision + 1 if known else 0,
        arms=arms.names,
        shares=known[1].shares if known else arms.initial_K,
        intervals=tuple(_intervals(round_, history, boundaries)),
        rows_available=arms.rows_K,
        num_steps=genesis.num_steps,
        tokens_per_row=genesis.sequence_length,
        target=arms.target_K,
    )


def _intervals(round_: Round, history: RunHistory, boundaries: Mapping[int, bool]) -> Iterator[Interval]:
    """Steps between neighbouring boundaries, in order; those of which nothing was reported are left out."""
    for first, end in itertools.pairwise(boundaries):
        reports = [r for r in history.measured if r.kind == "train" and first <= r.last_step < end]
        if reports:
            yield _interval(round_, history, first, end, reports, boundaries[end])


def _marked(plan: Plan, first_step: int, last_step: int) -> dict[int, bool]:
    """Boundaries that a policy in force has set, and whether the steps before each were a perturbation."""
    found = {step: plan.mark(step) for step in range(first_step + 1, last_step + 1)}
    return {first_step: False} | {step: mark[1].is_perturbation for step, mark in found.items() if mark}


def _reported(history: RunHistory, first_step: int, last_step: int) -> dict[int, bool]:
    """Boundaries of a shadow, which sets none: where there was a validation, else where reports end."""
    for kind in ("validation", "train"):
        steps = {r.last_step + 1 for r in history.measured if r.kind == kind and first_step <= r.last_step < last_step}
        if len(steps) > 1:
            break
    return dict.fromkeys([first_step, *sorted(steps | {last_step})], False)


def _interval(
    round_: Round, history: RunHistory, first: int, end: int, reports: Sequence[Report], is_perturbation: bool
) -> Interval:
    """Steps [first, end), given the training reports of them."""
    arms, plan = round_.arms, history.plan()
    sums = add_up(reports)
    return Interval(
        first_step=first,
        last_step=end - 1,
        rows=arms.sum(plan.cursors(end) - plan.cursors(first)),
        before=round_.mean_losses(_validation(history, first)),
        after=round_.mean_losses(_validation(history, end)),
        train_loss=round_.mean_losses(sums),
        train_tokens=arms.sum(round_.column(sums, "num_tokens")),
        learning_rate=mean_learning_rate(reports),
        is_perturbation=is_perturbation,
    )


def _validation(history: RunHistory, step: int) -> Mapping[str, DomainLoss]:
    """Validation sums by domain at the boundary before `step`; empty where there was none."""
    found = (r.domains for r in reversed(history.measured) if r.kind == "validation" and r.last_step == step - 1)
    return next(found, {})
