"""How many of the first n rows each domain gets: a nested divisor method, in integers and in closed form.

The domains are the leaves of a balanced binary tree. At every node Webster's divisor rule divides the node's rows
between its two halves, counted from the start of a segment:

    left(n) = floor(n * p + c + 1/2), within 0..n     p = left proportion / node proportion
                                                      c = left credit - p * node credit

and the right half gets n - left(n). A domain's credit is what it was promised so far less what it got. Four properties
follow, which no flat divisor method and no largest-remainder method has together (docs/decisions/002-plan.md):

- exact and house-monotone: counts sum to n, and no domain's count ever decreases as n grows;
- bounded: a node hands on the share p <= 1 of its error and adds at most half a row of its own, so that in one mixture
  no domain is ever more than depth / 2 rows from its promise (7 rows for 10,000 domains);
- memoryless: changes of the mixture add nothing up, because credit is carried per domain and measured against what was
  promised, not against what an earlier rounding made of it (at most 4.4 rows in 400 extreme changes);
- a domain with proportion 0 is never drawn. Its credit rests until the domain is asked for again.

Everything is int64. Proportions are integers with sum 2**31, credits are in rows * 2**31, n is below 2**30.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.entries import PROPORTION_TOTAL

MAX_ROWS = 1 << 30
"""Rows that one Apportionment counts at most; the products of `counts` then stay below 2**62."""

MAX_DOMAINS = 1 << 15

_SHIFT = PROPORTION_TOTAL.bit_length() - 1

Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class _Level:
    """One level of the tree, all nodes from left to right: [number of nodes] each."""

    left: Int64s  # proportion of the left half
    total: Int64s  # proportion of both halves, at least 1
    offset: Int64s  # floor((c + 1/2) * total)


class Apportionment:
    """The counts of a segment with one mixture.

    proportions int64 [G], non-negative with sum 2**31; credits int64 [G] in rows * 2**31 at the segment's start.
    """

    def __init__(self, proportions: Int64s, credits: Int64s) -> None:
        self.proportions, self.credits = proportions, credits
        self._levels = _tree(proportions, credits)

    def counts(self, num_rows: int) -> Int64s:
        """Rows of each domain [G] among the first `num_rows` of the segment, 0 to 2**30. O(G)."""
        if not 0 <= num_rows <= MAX_ROWS:
            raise ValueError(f"num_rows={num_rows} must be between 0 and {MAX_ROWS}")
        count_n = np.array([num_rows], dtype=np.int64)
        for level in self._levels:
            left_n = (count_n * level.left + level.offset) // level.total
            np.minimum(np.maximum(left_n, 0, out=left_n), count_n, out=left_n)
            count_n = np.stack((left_n, count_n - left_n), axis=1).ravel()
        count_G: Int64s = count_n[: len(self.proportions)]
        return count_G

    def carried(self, num_rows: int, count_G: Int64s) -> Int64s:
        """Credits [G] after `num_rows` rows, of which `counts` gives `count_G`: what the next segment starts with."""
        return self.credits + num_rows * self.proportions - count_G * PROPORTION_TOTAL


def _tree(proportions: Int64s, credits: Int64s) -> tuple[_Level, ...]:
    """Levels from the root to the parents of the leaves; leaves are padded with proportion 0 to a power of two."""
    num_leaves = 1 << (len(proportions) - 1).bit_length()
    share, credit = np.zeros((2, num_leaves), dtype=np.int64)
    share[: len(proportions)] = proportions
    # The credit of a domain that rests is no concern of the others: they divide among themselves in proportion.
    credit[: len(credits)] = np.where(proportions > 0, credits, 0)
    levels = []
    while len(share) > 1:
        left, right = share[0::2], share[1::2]
        offset = _offset(credit[0::2], left, credit[1::2], right)
        levels.append(_Level(left, np.maximum(left + right, 1), offset))
        share, credit = left + right, credit[0::2] + credit[1::2]
    return tuple(reversed(levels))


def _offset(credit_left: Int64s, left: Int64s, credit_right: Int64s, right: Int64s) -> Int64s:
    """floor((c + 1/2) * (left + right)) of each node, with c as above.

    By c = (credit_left * right - credit_right * left) / (left + right) / 2**31. The products exceed 64 bits, so whole
    and fractional rows of the credits are multiplied apart, which is exact.
    """
    low_mask = PROPORTION_TOTAL - 1
    part = (credit_left & low_mask) * right - (credit_right & low_mask) * left + ((left + right) << (_SHIFT - 1))
    offset: Int64s = (credit_left >> _SHIFT) * right - (credit_right >> _SHIFT) * left + (part >> _SHIFT)
    return offset


def integer_proportions(weights: Sequence[float] | NDArray[np.float64] | Int64s) -> Int64s:
    """Weights as integers [G] with sum 2**31 by largest remainder, exactly; of equal remainders the first wins.

    Every positive weight gets at least 1, so that rounding loses no domain. Raises ValueError for weights that are
    negative, not finite or all zero, and for more than 2**15 of them.
    """
    exact = _common_integers(weights)
    total = sum(exact)
    if total == 0:
        raise ValueError(f"all {len(exact)} weights are zero; at least one must be positive")
    if len(exact) > MAX_DOMAINS:
        raise ValueError(f"{len(exact)} weights; at most {MAX_DOMAINS} domains are possible")
    shares, remainders = zip(*(divmod(weight * PROPORTION_TOTAL, total) for weight in exact), strict=True)
    share_G = np.array(shares, dtype=np.int64)
    missing = PROPORTION_TOTAL - int(share_G.sum())
    share_G[sorted(range(len(exact)), key=lambda index: -remainders[index])[:missing]] += 1
    lost_G = (share_G == 0) & np.array([weight > 0 for weight in exact])
    share_G[lost_G] = 1
    share_G[np.argmax(share_G)] -= int(lost_G.sum())
    return share_G


def _common_integers(weights: Sequence[float] | NDArray[np.float64] | Int64s) -> list[int]:
    """Weights times one common power of two, which makes integers of them."""
    numbers: list[float] = np.asarray(weights).tolist()
    for index, number in enumerate(numbers):
        if not math.isfinite(number) or number < 0:
            raise ValueError(f"weight {index} is {number}; expected a finite number >= 0")
    ratios = [number.as_integer_ratio() for number in numbers]
    scale = max((denominator for _, denominator in ratios), default=1)
    return [numerator * (scale // denominator) for numerator, denominator in ratios]


def without(proportions: Int64s, excluded: NDArray[np.bool_]) -> Int64s | None:
    """`proportions` [G] with the share of `excluded` [G] given to the others in proportion; None when none is left."""
    kept = np.where(excluded, 0, proportions)
    total = int(kept.sum())
    if total == 0:
        return None
    scaled = kept * PROPORTION_TOTAL
    share, remainder = scaled // total, scaled % total
    missing = PROPORTION_TOTAL - int(share.sum())
    share[np.argsort(-remainder, kind="stable")[:missing]] += 1
    return np.asarray(share, dtype=np.int64)
