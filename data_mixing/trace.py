"""Where a row was, or will be, read: the plan asked backwards."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

from mixwright.data_mixing.plan import Plan


@dataclass(frozen=True)
class RowUse:
    """The row stands at `position` of the global batch of `step`, in this epoch of its domain."""

    step: int
    position: int
    epoch: int


def trace(plan: Plan, domain: int, row: int, until_step: int) -> Iterator[RowUse]:
    """Uses of `row` of the domain at this index of genesis.domains in steps [0, until_step), in order.

    A row is read once in each epoch, by the draw that the permutation of the epoch, turned round, says; the step of a
    draw is found by bisection, because cursors never decrease.
    """
    num_drawn = int(plan.cursors(until_step)[domain])
    for epoch in range(-(-num_drawn // plan.genesis.domains[domain].num_rows)):
        draw = plan.draw_of(domain, row, epoch)
        if draw < num_drawn:
            step = bisect.bisect_right(range(until_step), draw, key=lambda step: int(plan.cursors(step + 1)[domain]))
            yield RowUse(step, _position(plan, step, domain, row, epoch), epoch)


def _position(plan: Plan, step: int, domain: int, row: int, epoch: int) -> int:
    refs = plan.rows(step)
    here_n = (refs.domain_n == domain) & (refs.row_n == row) & (refs.epoch_n == epoch)
    return int(refs.position_n[here_n][0])
