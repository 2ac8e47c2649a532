"""Noise and copies among the training rows of a proxy run, a pure function of the row. Held-out rows stay whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mixwright.data_mixing.config_file import StrictModel
from mixwright.data_mixing.permutation import mix_key, splitmix64
from mixwright.data_mixing.plan import RowRefs

COPIED_ROWS = 16
"""Rows of each domain that stand in for the duplicated ones."""

NOISED_PART = 0.5
"""Part of the tokens of a noised row that are replaced by others, drawn alike from the vocabulary."""

_DUPLICATED, _NOISED, _COPY, _TOKEN, _WHICH = range(1, 6)


class Damage(StrictModel):
    """Parts of the training rows, 0..1: `duplicated` ones are copies of a few, `noised` ones half wrong.

    Both depend on (domain index, row) alone: the same row is always damaged in the same way, whoever reads it.
    """

    noised: float = Field(default=0.0, ge=0, le=1)
    duplicated: float = Field(default=0.0, ge=0, le=1)

    def redirect(self, refs: RowRefs) -> RowRefs:
        """The rows that are read instead."""
        if not self.duplicated:
            return refs
        is_copy_n = _chance(_DUPLICATED, refs) < self.duplicated
        copied_n = (_hash(_COPY, refs) % np.uint64(COPIED_ROWS)).astype(np.int64)
        return replace(refs, row_n=np.where(is_copy_n, copied_n, refs.row_n))

    def spoil(self, tokens_nS: NDArray[np.int64], refs: RowRefs, vocab_size: int) -> NDArray[np.int64]:
        """The rows' tokens [n, S] as they are trained on."""
        if not self.noised:
            return tokens_nS
        is_noised_n = _chance(_NOISED, refs) < self.noised
        place_S = np.arange(tokens_nS.shape[1], dtype=np.uint64)
        drawn_nS = splitmix64(_hash(_TOKEN, refs)[:, None] + place_S)
        replaced_nS = _unit(splitmix64(_hash(_WHICH, refs)[:, None] + place_S)) < NOISED_PART
        spoilt_nS = (drawn_nS % np.uint64(vocab_size)).astype(np.int64)
        return np.where(is_noised_n[:, None] & replaced_nS, spoilt_nS, tokens_nS)


def _hash(purpose: int, refs: RowRefs) -> NDArray[np.uint64]:
    """64 bits for each row and purpose."""
    row_n = (refs.domain_n.astype(np.uint64) << np.uint64(40)) + refs.row_n.astype(np.uint64)
    hashed: NDArray[np.uint64] = splitmix64(splitmix64(row_n) ^ np.uint64(mix_key(purpose)))
    return hashed


def _unit(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Uniform within 0..1."""
    return (bits >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def _chance(purpose: int, refs: RowRefs) -> NDArray[np.float64]:
    return _unit(_hash(purpose, refs))
