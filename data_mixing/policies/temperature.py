"""`temperature`: proportions p ~ rows**(1/T). T = 1 is proportional to size, a large T is close to uniform.

The sampling of multilingual models (Devlin et al. 2018, Conneau et al. 2020: T = 1 / alpha).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from mixwright.data_mixing.entries import Genesis, Segment
from mixwright.data_mixing.mixture import assign, segments
from mixwright.data_mixing.policy import PolicyDocument


class Document(PolicyDocument):
    """`temperature` is T > 0; `domains` are names or globs of the domains that take part (default: all)."""

    kind: Literal["temperature"]
    temperature: float = Field(gt=0)
    domains: tuple[str, ...] = Field(default=("*",), min_length=1)


def compile_program(document: Document, genesis: Genesis) -> tuple[Segment, ...]:
    """One segment. Raises PolicyRejected."""
    patterns = tuple(dict.fromkeys(document.domains))
    chosen = [index for members in assign(patterns, genesis.domains, "domains").values() for index in members]
    log_rows = np.log([genesis.domains[index].num_rows for index in chosen])
    # Relative to the largest, so that a small T overflows nothing; a domain that takes part keeps a positive share.
    scaled = np.maximum(np.exp((log_rows - log_rows.max()) / document.temperature), np.finfo(np.float64).tiny)
    share_G = np.zeros(len(genesis.domains))
    share_G[chosen] = scaled / scaled.sum()
    return segments([(0, share_G)])
