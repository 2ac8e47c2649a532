"""The reports that online policies still need: a bounded number, however long no decision comes.

Reports pile up between two decisions: for a round, and without end while no controller decides. When they are too many,
neighbours are added up, two into one, never across a mark: a decision then sees the same tokens and the same losses in
the same intervals.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet

from mixwright.data_mixing.entries import DomainLoss, Report

MAX_LOSSES = 1 << 15
"""Losses of single domains in all reports together; one takes 0.6 to 0.9 kB."""
MIN_REPORTS = 64


def max_reports(num_domains: int) -> int:
    """How many reports are kept apart in a run with so many domains."""
    return max(MAX_LOSSES // num_domains, MIN_REPORTS)


def with_report(
    measured: list[Report], report: Report, num_domains: int, marks: Callable[[int], AbstractSet[int]]
) -> list[Report]:
    """`measured` and `report`; `marks` are the boundaries from a step on, asked for only when it gets too long."""
    longer = [*_before(measured, report), report]
    return longer if len(longer) <= max_reports(num_domains) else thinned(longer, marks(longer[0].first_step))


def still_needed(measured: list[Report], since: int | None) -> list[Report]:
    """The reports that tell of step `since` and later, and of the boundary before it; none without such a step."""
    return [] if since is None else [report for report in measured if report.last_step >= since - 1]


def thinned(measured: Sequence[Report], marks: AbstractSet[int]) -> list[Report]:
    """About half as many: training reports joined in pairs, every other validation left out, none of it at `marks`."""
    validations = [r.last_step + 1 for r in measured if r.kind == "validation" and r.last_step + 1 not in marks]
    left_out = set(validations[1::2])
    fixed = marks | set(validations[::2])
    kept: list[Report] = []
    is_joined = False
    for report in measured:
        if report.kind == "validation" and report.last_step + 1 in left_out:
            continue
        if kept and not is_joined and _are_neighbours(kept[-1], report) and report.first_step not in fixed:
            kept[-1], is_joined = _joined(kept[-1], report), True
        else:
            kept.append(report)
            is_joined = False
    return kept


def add_up(reports: Iterable[Report]) -> dict[str, DomainLoss]:
    """Sums over several reports, by domain."""
    total: dict[str, DomainLoss] = {}
    for name, loss in itertools.chain.from_iterable(report.domains.items() for report in reports):
        known = total.get(name)
        total[name] = loss if known is None else _sum(known, loss)
    return total


def mean_learning_rate(reports: Iterable[Report]) -> float | None:
    """Mean over the steps of the reports that know theirs; None when none does."""
    rates = [(r.learning_rate, r.last_step - r.first_step + 1) for r in reports if r.learning_rate is not None]
    num_steps = sum(steps for _, steps in rates)
    return sum(rate * steps for rate, steps in rates) / num_steps if rates else None


def _before(measured: list[Report], report: Report) -> list[Report]:
    """What remains true of `measured` when `report` comes: a run that was resumed does steps again."""
    return [known for known in measured if known.kind != report.kind or known.last_step < report.first_step]


def _are_neighbours(one: Report, other: Report) -> bool:
    return one.kind == other.kind == "train" and one.last_step + 1 == other.first_step


def _joined(one: Report, other: Report) -> Report:
    both = (one, other)
    changed = {"first_step": one.first_step, "domains": add_up(both), "learning_rate": mean_learning_rate(both)}
    return other.model_copy(update=changed)


def _sum(one: DomainLoss, other: DomainLoss) -> DomainLoss:
    return DomainLoss(
        loss_sum=one.loss_sum + other.loss_sum,
        loss_square_sum=one.loss_square_sum + other.loss_square_sum,
        num_tokens=one.num_tokens + other.num_tokens,
        num_rows=one.num_rows + other.num_rows,
    )
