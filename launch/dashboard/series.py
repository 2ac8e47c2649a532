"""Curves over steps in a fixed amount of memory: buckets of equal width that merge in pairs when they run out.

P buckets, C columns (domains, figures, bins).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

MAX_BUCKETS = 1024
MAX_CELLS = 1 << 20
"""Buckets times columns of one curve: 42 MB at most."""


@dataclass(frozen=True, eq=False)
class Curve:
    """What is drawn: per bucket its last step [P], and per column weighted mean, extremes, standard error [P, C].

    A cell that nothing was added to is NaN.
    """

    step_P: NDArray[np.int64]
    mean_PC: Floats
    low_PC: Floats
    high_PC: Floats
    stderr_PC: Floats
    weight_PC: Floats


class Buckets:
    """Weighted means of C columns over steps. A bucket covers `width` steps, 1 at first, doubled when needed."""

    def __init__(self, num_columns: int, max_buckets: int = MAX_BUCKETS) -> None:
        self._capacity = max(min(max_buckets, MAX_CELLS // max(num_columns, 1)), 16) // 2 * 2
        self.width = 1
        self._last_step = -1
        self._step_P = np.full(self._capacity, -1, np.int64)
        shape = (self._capacity, num_columns)
        # Filled, not np.zeros: memory that is taken at once does not look like a leak later.
        self._weight_PC, self._total_PC, self._square_PC = (np.full(shape, 0.0) for _ in range(3))
        self._low_PC, self._high_PC = np.full(shape, np.inf), np.full(shape, -np.inf)

    @property
    def last_step(self) -> int:
        """The last step that was added, -1 when there is none."""
        return self._last_step

    def add(self, step: int, total_C: ArrayLike, weight_C: ArrayLike = 1.0, square_C: ArrayLike | None = None) -> None:
        """Sums [C] over what was measured at `step`: weighted values, weights, weighted squares (default: of the mean).

        Columns of weight 0, and values that are not finite, add nothing. A step at or before the last one replaces
        what was added from it on: a run that was resumed does steps again.
        """
        square_1C = None if square_C is None else np.atleast_2d(square_C)
        self.add_many(np.array([step]), np.atleast_2d(total_C), np.atleast_2d(weight_C), square_1C)

    def add_many(
        self,
        step_n: NDArray[np.int64],
        total_nC: ArrayLike,
        weight_nC: ArrayLike = 1.0,
        square_nC: ArrayLike | None = None,
    ) -> None:
        """`add` for steps [n], each with its row, one after the other."""
        total, weight = np.broadcast_arrays(np.asarray(total_nC, np.float64), np.asarray(weight_nC, np.float64))
        square = None if square_nC is None else np.asarray(square_nC, np.float64)
        cuts = [0, *(np.flatnonzero(np.diff(step_n) <= 0) + 1).tolist(), len(step_n)]
        for first, last in itertools.pairwise(cuts):
            if first < last:
                part = slice(first, last)
                self._add_rising(step_n[part], total[part], weight[part], None if square is None else square[part])

    def _add_rising(self, step_n: NDArray[np.int64], total: Floats, weight: Floats, square_nC: Floats | None) -> None:
        """Rows of steps that rise."""
        if step_n[0] <= self._last_step:
            self.rewind(int(step_n[0]))
        self._last_step = int(step_n[-1])
        while self._last_step // self.width >= self._capacity:
            self._merge_pairs()
        used = np.isfinite(total) & (weight > 0)
        mean = np.divide(total, weight, out=np.zeros(total.shape), where=used)
        square = total * mean if square_nC is None else square_nC
        bucket_n = step_n // self.width
        starts = np.flatnonzero(np.diff(bucket_n, prepend=-1))
        at = bucket_n[starts]
        self._step_P[at] = np.maximum.reduceat(step_n, starts)
        for sums_PC, values in ((self._weight_PC, weight), (self._total_PC, total), (self._square_PC, square)):
            sums_PC[at] += np.add.reduceat(np.where(used, values, 0.0), starts)
        low, high = np.where(used, mean, np.inf), np.where(used, mean, -np.inf)
        self._low_PC[at] = np.minimum(self._low_PC[at], np.minimum.reduceat(low, starts))
        self._high_PC[at] = np.maximum(self._high_PC[at], np.maximum.reduceat(high, starts))

    def rewind(self, step: int) -> None:
        """Forget everything from `step` on. The bucket that `step` divides goes as a whole: its parts are not kept."""
        first = step // self.width
        self._last_step = min(self._last_step, step - 1)
        if first >= self._capacity:
            return
        self._step_P[first:] = -1
        for sums_PC in (self._weight_PC, self._total_PC, self._square_PC):
            sums_PC[first:] = 0.0
        self._low_PC[first:], self._high_PC[first:] = np.inf, -np.inf

    def curve(self, points: int) -> Curve:
        """The curve with at most `points` points."""
        filled = int(np.flatnonzero(self._step_P >= 0).max(initial=-1)) + 1
        step_P, weight_PC, total_PC = self._step_P[:filled], self._weight_PC[:filled], self._total_PC[:filled]
        square_PC, low_PC, high_PC = self._square_PC[:filled], self._low_PC[:filled], self._high_PC[:filled]
        used_P = step_P >= 0
        group = -(-int(used_P.sum()) // max(points, 1)) or 1
        starts = np.arange(0, int(used_P.sum()), group)
        if not len(starts):
            empty = np.zeros((0, self._weight_PC.shape[1]))
            return Curve(np.zeros(0, np.int64), empty, empty, empty, empty, empty)
        weight_PC = np.add.reduceat(weight_PC[used_P], starts)
        total_PC = np.add.reduceat(total_PC[used_P], starts)
        square_PC = np.add.reduceat(square_PC[used_P], starts)
        with np.errstate(divide="ignore", invalid="ignore"):
            mean_PC = total_PC / weight_PC
            stderr_PC = np.sqrt(np.maximum(square_PC / weight_PC - mean_PC**2, 0.0) / weight_PC)
        low_PC = np.minimum.reduceat(low_PC[used_P], starts)
        high_PC = np.maximum.reduceat(high_PC[used_P], starts)
        low_PC[~np.isfinite(low_PC)], high_PC[~np.isfinite(high_PC)] = np.nan, np.nan
        return Curve(np.maximum.reduceat(step_P[used_P], starts), mean_PC, low_PC, high_PC, stderr_PC, weight_PC)

    def _merge_pairs(self) -> None:
        self.width *= 2
        self._step_P = _pairs(np.maximum, self._step_P, -1)
        self._weight_PC = _pairs(np.add, self._weight_PC, 0.0)
        self._total_PC = _pairs(np.add, self._total_PC, 0.0)
        self._square_PC = _pairs(np.add, self._square_PC, 0.0)
        self._low_PC = _pairs(np.minimum, self._low_PC, np.inf)
        self._high_PC = _pairs(np.maximum, self._high_PC, -np.inf)


def _pairs(join: np.ufunc, values_PX: NDArray[Any], empty: float) -> NDArray[Any]:
    """Neighbours joined; the second half is empty."""
    joined = np.full_like(values_PX, empty)
    joined[: len(values_PX) // 2] = join(values_PX[0::2], values_PX[1::2])
    return joined


def plain(values: ArrayLike, digits: int = 5) -> Any:
    """An array as JSON lists: `digits` significant digits, null where a value is not finite."""
    array = np.asarray(values, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        magnitude = np.where(array != 0, np.floor(np.log10(np.abs(array))), 0.0)
    scale = 10.0 ** np.clip(digits - 1 - np.nan_to_num(magnitude, posinf=0, neginf=0), -300, 300)
    rounded = np.round(array * scale) / scale
    is_finite = np.isfinite(array)
    if is_finite.all():
        return rounded.tolist()
    nullable = rounded.astype(object)
    nullable[~is_finite] = None
    return nullable.tolist()
