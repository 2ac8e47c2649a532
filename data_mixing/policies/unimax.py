"""`unimax`: as uniform as repetition allows. No domain is read more than `max_epochs` times in the run.

Chung et al., "UniMax" (2304.09151): the rows of the run are dealt out from the smallest domain to the largest, each
getting an equal part of what is left, or `max_epochs` times its rows if that is less; the rest goes to the larger ones.
When all domains together have too few rows, each gets the same number of epochs.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mixwright.data_mixing.entries import Genesis, Segment
from mixwright.data_mixing.mixture import assign, segments
from mixwright.data_mixing.policy import PolicyDocument


class Document(PolicyDocument):
    """`max_epochs` over the whole run; `domains` are names or globs of the domains that take part (default: all)."""

    kind: Literal["unimax"]
    max_epochs: float = Field(default=4.0, gt=0)
    domains: tuple[str, ...] = Field(default=("*",), min_length=1)


def compile_program(document: Document, genesis: Genesis) -> tuple[Segment, ...]:
    """One segment. Raises PolicyRejected."""
    patterns = tuple(dict.fromkeys(document.domains))
    chosen = [index for members in assign(patterns, genesis.domains, "domains").values() for index in members]
    limit_n = document.max_epochs * np.array([genesis.domains[index].num_rows for index in chosen], dtype=np.float64)
    share_G = np.zeros(len(genesis.domains))
    share_G[chosen] = dealt_out(limit_n, float(genesis.num_steps * genesis.rows_per_step))
    return segments([(0, share_G / share_G.sum())])


def dealt_out(limit_n: NDArray[np.float64], budget: float) -> NDArray[np.float64]:
    """Rows of each domain [n], at most `limit_n`, as equal as can be, sum `budget` where the limits allow it."""
    rows_n = np.zeros(len(limit_n))
    for place, index in enumerate(np.argsort(limit_n, kind="stable")):
        rows_n[index] = min(limit_n[index], budget / (len(limit_n) - place))
        budget -= rows_n[index]
    return rows_n
