"""Which rows were hard: the row log joined with the plan, one line for each row of the data, ranked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.errors import DataError
from mixwright.data_mixing.plan import Plan
from mixwright.pretrain.row_log import RowLog

Ranking = Literal["highest", "lowest", "down-weighted"]

_LIGHTER = 1 - 1e-5
"""A relative weight below this is less than uniform; above it, it is float32's rounding of 1."""


@dataclass(frozen=True, eq=False)
class LoggedRows:
    """Rows of a log and what they are, [n] each: domain (index in genesis.domains), epoch, row number, all int64.

    `num_seen_n`: how often the log has this row of the data.
    """

    log: RowLog
    domain_n: NDArray[np.int64]
    epoch_n: NDArray[np.int64]
    row_n: NDArray[np.int64]
    num_seen_n: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.log)

    def take(self, which_m: NDArray[Any]) -> LoggedRows:
        """The rows at these indices, or where this mask holds, in that order."""
        return LoggedRows(
            self.log.take(which_m),
            self.domain_n[which_m],
            self.epoch_n[which_m],
            self.row_n[which_m],
            self.num_seen_n[which_m],
        )


def identify(log: RowLog, plan: Plan) -> LoggedRows:
    """What each row of the log is, by the plan. One `plan.rows` for every step in the log.

    Raises DataError when the log has a step or position that the run has not.
    """
    genesis = plan.genesis
    outside_n = (log.step_n >= genesis.num_steps) | (log.position_n >= genesis.rows_per_step)
    if outside_n.any():
        at = int(outside_n.argmax())
        raise DataError(
            f"the row log has step {log.step_n[at]}, position {log.position_n[at]}, but run {genesis.run!r} has "
            f"{genesis.num_steps} steps of {genesis.rows_per_step} rows: it is the log of another run"
        )
    steps, starts = np.unique(log.step_n, return_index=True)
    columns_3n = np.empty((3, len(log)), np.int64)
    for step, start, stop in zip(steps.tolist(), starts, np.append(starts, len(log))[1:], strict=True):
        refs, position_m = plan.rows(step), log.position_n[start:stop]
        columns_3n[:, start:stop] = np.stack([refs.domain_n, refs.epoch_n, refs.row_n])[:, position_m]
    domain_n, epoch_n, row_n = columns_3n
    return LoggedRows(log, domain_n, epoch_n, row_n, np.ones(len(log), np.int64))


def last_readings(rows: LoggedRows) -> LoggedRows:
    """Each row of the data once, as it was read last, in order of that; `num_seen_n` counts its readings."""
    if len(rows) == 0:
        return rows
    key_n = rows.domain_n * (int(rows.row_n.max()) + 1) + rows.row_n
    _, index_k, count_k = np.unique(key_n[::-1], return_index=True, return_counts=True)
    last_k = len(key_n) - 1 - index_k
    order_k = np.argsort(last_k)
    taken = rows.take(last_k[order_k])
    return LoggedRows(taken.log, taken.domain_n, taken.epoch_n, taken.row_n, count_k[order_k])


def ranked(rows: LoggedRows, by: Ranking, count: int) -> LoggedRows:
    """The `count` rows of highest or lowest loss, or of the smallest weight below uniform; the hardest first.

    Among equals the one read first comes first. Losses that are not finite have no rank by loss.
    """
    value_n = rows.log.weight_n if by == "down-weighted" else rows.log.loss_n
    has_rank_n = value_n < _LIGHTER if by == "down-weighted" else np.isfinite(value_n)
    candidates = np.flatnonzero(has_rank_n)
    key_m = -value_n[candidates] if by == "highest" else value_n[candidates]
    return rows.take(candidates[np.argsort(key_m, kind="stable")[:count]])
