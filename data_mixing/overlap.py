"""How much of the held-out text also stands in the training text, as runs of n tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.manifest import Split
from mixwright.data_mixing.permutation import splitmix64
from mixwright.data_mixing.store import TokenStore

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Overlap:
    """Of the `total` n-grams of a split, `shared` stand in the training text too."""

    split: Split
    n: int
    shared: int
    total: int


def shared_ngrams(store: TokenStore, split: Split, n: int) -> Overlap:
    """Compare n-grams of a split with those of the training rows of all domains, by 64-bit hashes.

    Rows of a domain stand one after the other, as the text did; 16 bytes of memory for each token.
    """
    trained = np.concatenate([_hashes(store, domain.name, "train", n) for domain in store.domains()])
    trained.sort()
    held_out = np.concatenate([_hashes(store, domain.name, split, n) for domain in store.domains()])
    place_n = np.minimum(np.searchsorted(trained, held_out), max(len(trained) - 1, 0))
    shared = int((trained[place_n] == held_out).sum()) if len(trained) else 0
    return Overlap(split, n, shared, len(held_out))


def _hashes(store: TokenStore, domain: str, split: Split, n: int) -> NDArray[np.uint64]:
    """One hash for each run of n tokens, in order."""
    num_rows = store.num_rows(domain, split)
    if not num_rows:
        return np.zeros(0, dtype=np.uint64)
    rows_nS = store.gather(np.full(num_rows, store.index(domain)), np.arange(num_rows), split)
    mixed = splitmix64(np.asarray(rows_nS).reshape(-1).astype(np.uint64))
    total = np.zeros(max(len(mixed) - n + 1, 0), dtype=np.uint64)
    for place in range(n):  # Horner's rule modulo 2**64
        total = total * _MULTIPLIER + mixed[place : place + len(total)]
    return total
