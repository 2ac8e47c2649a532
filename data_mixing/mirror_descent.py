"""Mirror descent on the simplex with negative entropy: exponentiated gradient, and its optimistic form.

Scores are gains: larger is better (a score is minus the gradient of the loss). All arrays are float64 [K].
Source: Chen et al., optimistic online mirror descent in the SEA model; spec/methods.md 15.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def exponentiated(shares: ArrayLike, scores: ArrayLike, eta: float) -> NDArray[np.float64]:
    """p_j exp(eta s_j) / sum, in log space; a share of 0 stays 0 and no score overflows."""
    share_K = np.asarray(shares, dtype=np.float64)
    positive_K = share_K > 0
    grown_K = np.zeros_like(share_K)
    log_A = np.log(share_K[positive_K]) + eta * np.asarray(scores, dtype=np.float64)[positive_K]
    grown_K[positive_K] = np.exp(log_A - log_A.max())
    return np.asarray(grown_K / grown_K.sum(), dtype=np.float64)


def step_size(num_arms: int, variation: float, bound: float = 1.0, delta: float = 0.01) -> float:
    """eta = D / sqrt(delta + 4 G^2 + V) with D^2 = ln K: G bounds the scores, V = sum of |score - hint|_inf^2."""
    return math.sqrt(math.log(num_arms)) / math.sqrt(delta + 4 * bound * bound + variation)


def surprise(scores: ArrayLike, hint: ArrayLike) -> float:
    """|score - hint|_inf^2, what one round adds to V; the dual norm of entropy's."""
    return float(np.abs(np.asarray(scores, dtype=np.float64) - np.asarray(hint, dtype=np.float64)).max() ** 2)
