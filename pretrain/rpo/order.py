"""Which pairs a step trains on: a pure function of (seed, number of pairs, step), whatever the ranks.

Every epoch is a permutation of all pairs of its own; a step takes the next pairs of that endless sequence, and may
reach over the end of an epoch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.permutation import fold_key, mix_key, permute, splitmix64

_ORDER, _DIGEST = 0x5250_4F01, 0x5250_4F02


def pairs_of_step(num_pairs: int, pairs_per_step: int, seed: int, step: int) -> NDArray[np.int64]:
    """Indices of the pairs of optimizer step `step` (0-based) in their order, int64 [pairs_per_step]."""
    place_S = np.arange(step * pairs_per_step, (step + 1) * pairs_per_step)
    epoch_S, within_S = np.divmod(place_S, num_pairs)
    key_S = fold_key(np.full(pairs_per_step, mix_key(_ORDER, seed), np.uint64), epoch_S.astype(np.uint64))
    return permute(within_S, num_pairs, key_S)


def num_steps(num_pairs: int, pairs_per_step: int, num_epochs: float) -> int:
    """Whole steps in `num_epochs` passes over the pairs, at least one."""
    return max(int(num_epochs * num_pairs / pairs_per_step), 1)


def order_digest(step: int, index_S: NDArray[np.int64], first_place: int = 0) -> int:
    """64-bit digest of pairs at consecutive places of a step; those of its slices add up to it, modulo 2**64."""
    place_S = np.arange(first_place, first_place + len(index_S)).astype(np.uint64)
    hash_S = fold_key(np.full(len(index_S), mix_key(_DIGEST, step), np.uint64), place_S)
    return int(splitmix64(fold_key(hash_S, index_S.astype(np.uint64))).sum(dtype=np.uint64))
