"""Limits on every decision: a floor under each share, and a bound on how far one decision may go.

Shares are float64 [K] with sum 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mixwright.data_mixing.online import Guard

Shares = NDArray[np.float64]


def normalised(numbers: ArrayLike, num_arms: int) -> Shares:
    """`numbers` as shares [num_arms]; raises ValueError when they are not finite, negative, too few or all zero."""
    share_K = np.asarray(numbers, dtype=np.float64)
    if share_K.shape != (num_arms,):
        raise ValueError(f"expected {num_arms} shares, found an array of shape {share_K.shape}")
    if not np.isfinite(share_K).all():
        raise ValueError(f"share of arm {int(np.argmin(np.isfinite(share_K)))} is not finite")
    if share_K.min() < 0:
        raise ValueError(f"share of arm {int(share_K.argmin())} is {share_K.min():g}; expected a number >= 0")
    if share_K.max() == 0:
        raise ValueError("all shares are zero; at least one must be positive")
    scaled_K = share_K / share_K.max()
    return np.asarray(scaled_K / scaled_K.sum(), dtype=np.float64)


def with_floor(share_K: Shares, floor: float) -> Shares:
    """The nearest mixture on the line to uniform in which every share is >= `floor`; floor * K must be <= 1."""
    smallest, uniform = float(share_K.min()), 1.0 / len(share_K)
    if smallest >= floor or smallest >= uniform:
        return share_K
    towards = min(1.0, (floor - smallest) / (uniform - smallest))
    raised_K = np.maximum((1 - towards) * share_K + towards * uniform, floor)
    return np.asarray(raised_K / raised_K.sum(), dtype=np.float64)


def within_reach(current_K: Shares, wanted_K: Shares, max_l1_change: float) -> Shares:
    """The point nearest to `wanted_K` on the line from `current_K` whose shares change by at most that in sum."""
    distance = float(np.abs(wanted_K - current_K).sum())
    if distance <= max_l1_change:
        return wanted_K
    return np.asarray(current_K + (wanted_K - current_K) * (max_l1_change / distance), dtype=np.float64)


def guarded(current_K: Shares, wanted_K: Shares, guard: Guard) -> Shares:
    """`wanted_K` with the floor, as far as one decision may go from `current_K`."""
    return within_reach(current_K, with_floor(wanted_K, guard.floor), guard.max_l1_change)
