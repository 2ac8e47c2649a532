"""A keyed bijection of range(size): the order of a domain's rows in an epoch, and of a batch's rows in a step.

An alternating Feistel network over ceil(log2 size) bits whose round function is the SplitMix64 finaliser, with cycle
walking for sizes that are no power of two (spec/mixing.md 4.2). Nothing is stored and nothing has a state: the image
of one index costs the same as that of any other. The finaliser spreads every input bit over every output bit; a round
function that is affine modulo a power of two would keep the parity of the index (spec/mixing.md, finding 4).

All arithmetic is on unsigned 64-bit integers modulo 2**64. `plan_version` 1 fixes every constant of this file.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

NUM_ROUNDS = 8
SMALL_BITS = 5
NUM_ROUNDS_SMALL = 24
"""Up to 2**SMALL_BITS elements a round has so few functions to choose from that the permutations mix slowly."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_ONE = np.uint64(1)
_POWERS_OF_TWO = np.left_shift(_ONE, np.arange(63, dtype=np.uint64))

_ROUND_KEYS = np.arange(NUM_ROUNDS_SMALL, dtype=np.uint64) * _GOLDEN

UInt64s = NDArray[np.uint64]


def splitmix64(x: UInt64s) -> UInt64s:
    """One output of the SplitMix64 generator for each state in `x` [n] (Steele, Lea and Flood 2014)."""
    z = x + _GOLDEN
    z ^= z >> np.uint64(30)
    z *= _MIX_1
    z ^= z >> np.uint64(27)
    z *= _MIX_2
    z ^= z >> np.uint64(31)
    return z


def mix_key(*parts: int) -> int:
    """A 64-bit key from integers, each taken modulo 2**64; their order matters."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = fold_key(key, np.array([part % (1 << 64)], dtype=np.uint64))
    return int(key[0])


def fold_key(key_n: UInt64s, part_n: UInt64s) -> UInt64s:
    """Keys [n] with one more part each: `mix_key(*parts, part)` from `mix_key(*parts)`."""
    return splitmix64(key_n ^ part_n)


def permute(index_n: ArrayLike, size: ArrayLike, key: ArrayLike) -> NDArray[np.int64]:
    """Images of `index_n` under the permutation of range(size) that `key` names.

    index_n int64 [n] in [0, size); size int or int64 [n], 1 to 2**62; key int or uint64 [n]. Returns int64 [n].
    Raises ValueError when an index is out of range.
    """
    index_n, size_n = np.atleast_1d(np.asarray(index_n, np.int64)), np.atleast_1d(np.asarray(size, np.int64))
    outside_n = (index_n < 0) | (index_n >= size_n)
    if outside_n.any():
        worst = int(np.argmax(outside_n))
        raise ValueError(f"index {index_n[worst]} is outside range({np.broadcast_to(size_n, index_n.shape)[worst]})")
    limit_n, key_n = size_n.astype(np.uint64), np.atleast_1d(np.asarray(key, np.uint64))
    return _walk(_feistel, index_n.astype(np.uint64), limit_n, key_n)


def unpermute(image: int, size: int, key: int) -> int:
    """The index whose image `permute(index, size, key)` is."""
    if not 0 <= image < size:
        raise ValueError(f"image {image} is outside range({size})")
    image_1, limit_1, key_1 = (np.array([value], dtype=np.uint64) for value in (image, size, key))
    return int(_walk(_feistel_back, image_1, limit_1, key_1)[0])


def _walk(
    mapping: Callable[[UInt64s, UInt64s, UInt64s], UInt64s], x_n: UInt64s, limit_n: UInt64s, key_n: UInt64s
) -> NDArray[np.int64]:
    """Cycle walking: an image beyond the size is mapped again; fewer than 2 evaluations are expected for each index."""
    image_n = mapping(x_n, limit_n, key_n)
    walking = np.flatnonzero(image_n >= limit_n)
    while walking.size:
        limit_w = _pick(limit_n, walking)
        image_w = mapping(image_n[walking], limit_w, _pick(key_n, walking))
        image_n[walking] = image_w
        walking = walking[image_w >= limit_w]
    return image_n.astype(np.int64)


def _feistel(x_n: UInt64s, limit_n: UInt64s, key_n: UInt64s) -> UInt64s:
    """Bijection of range(2**bits), bits = ceil(log2 limit). `limit_n` and `key_n` are [n], or [1] for all alike."""
    bits_n = np.searchsorted(_POWERS_OF_TWO, limit_n).astype(np.uint64)
    low_bits_n = bits_n >> _ONE
    low_n, high_n = x_n & ((_ONE << low_bits_n) - _ONE), x_n >> low_bits_n
    low_n, high_n = _rounds(low_n, high_n, bits_n, key_n, range(NUM_ROUNDS))
    small = np.flatnonzero(np.broadcast_to(bits_n <= SMALL_BITS, x_n.shape))
    if small.size:
        more = range(NUM_ROUNDS, NUM_ROUNDS_SMALL)
        halves = _rounds(low_n[small], high_n[small], _pick(bits_n, small), _pick(key_n, small), more)
        low_n[small], high_n[small] = halves
    return (high_n << low_bits_n) | low_n


def _feistel_back(x_1: UInt64s, limit_1: UInt64s, key_1: UInt64s) -> UInt64s:
    """The inverse, one number at a time: each round undoes itself, so they come in reverse order."""
    bits_1 = np.searchsorted(_POWERS_OF_TWO, limit_1).astype(np.uint64)
    low_bits_1 = bits_1 >> _ONE
    num_rounds = NUM_ROUNDS_SMALL if bits_1[0] <= SMALL_BITS else NUM_ROUNDS
    low_1, high_1 = x_1 & ((_ONE << low_bits_1) - _ONE), x_1 >> low_bits_1
    low_1, high_1 = _rounds(low_1, high_1, bits_1, key_1, range(num_rounds - 1, -1, -1))
    return (high_1 << low_bits_1) | low_1


def _rounds(low_n: UInt64s, high_n: UInt64s, bits_n: UInt64s, key_n: UInt64s, rounds: range) -> tuple[UInt64s, UInt64s]:
    """The halves after `rounds`: they take turns at being masked with a keyed hash of the other."""
    low_bits_n = bits_n >> _ONE
    low_mask_n = (_ONE << low_bits_n) - _ONE
    high_mask_n = (_ONE << (bits_n - low_bits_n)) - _ONE
    for round_index in rounds:
        round_key_n = key_n + _ROUND_KEYS[round_index]
        if round_index % 2 == 0:
            high_n = high_n ^ (splitmix64(low_n ^ round_key_n) & high_mask_n)
        else:
            low_n = low_n ^ (splitmix64(high_n ^ round_key_n) & low_mask_n)
    return low_n, high_n


def _pick(values_n: UInt64s, index: NDArray[np.int64]) -> UInt64s:
    """`values_n[index]`, where [1] stands for a value that all share."""
    return values_n if values_n.size == 1 else values_n[index]
