"""Where a row was, or will be, read: the plan asked backwards."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mixwright.data_mixing.plan import Plan


@dataclass(frozen=True)
class RowUse:
    """The row stands at `position` of the global batch of `step`, in this epoch of its domain."""

    step: int
    position: int
    epoch: int


def trace(plan: Plan, domain: int, row: int, until_step: int) -> Iterator[RowUse]:
    """Uses of `row` of the domain at this index of genesis.domains in steps [0, until_step), in order.

    A row is read once in each epoch, so the steps of an epoch are searched only up to the hit: about as many rows are
    derived as the run reads in half an epoch of the domain, for every epoch.
    """
    num_rows = plan.genesis.domains[domain].num_rows
    num_drawn = int(plan.cursors(until_step)[domain])
    for epoch in range(-(-num_drawn // num_rows)):
        # The first step that draws beyond the epoch's first row.
        first_step = bisect.bisect_right(
            range(until_step), epoch * num_rows, key=lambda step: int(plan.cursors(step + 1)[domain])
        )
        use = _find(plan, domain, row, epoch, range(first_step, until_step))
        if use is not None:
            yield use


def _find(plan: Plan, domain: int, row: int, epoch: int, steps: range) -> RowUse | None:
    end_of_epoch = (epoch + 1) * plan.genesis.domains[domain].num_rows
    for step in steps:
        if int(plan.cursors(step)[domain]) >= end_of_epoch:
            return None
        refs = plan.rows(step)
        hits = np.flatnonzero((refs.domain_n == domain) & (refs.row_n == row) & (refs.epoch_n == epoch))
        if hits.size:
            return RowUse(step, int(refs.position_n[hits[0]]), epoch)
    return None
