"""The rows that losses are compared on: always the same ones of every domain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mixwright.data_mixing.entries import Genesis
from mixwright.data_mixing.store import TokenStore


@dataclass(frozen=True)
class HeldOut:
    """At most `rows_per_domain` rows of every domain's `split`; tokens [n, T+1], domains [n].

    Always the same rows, spread evenly over the split: its first rows may all be of one long document.
    """

    split: str
    tokens_nS: np.ndarray
    domain_n: np.ndarray

    @classmethod
    def read(cls, store: TokenStore, genesis: Genesis, split: str, rows_per_domain: int) -> HeldOut:
        tokens, domains = [], []
        for index, domain in enumerate(genesis.domains):
            num_rows = store.num_rows(domain.name, split)
            count = min(rows_per_domain, num_rows)
            row_n = np.arange(count) * num_rows // max(count, 1)
            rows = store.gather(np.full(count, store.index(domain.name)), row_n, split)
            tokens.append(np.asarray(rows, dtype=np.int64))
            domains.append(np.full(count, index, dtype=np.int64))
        return cls(split, np.concatenate(tokens), np.concatenate(domains))
