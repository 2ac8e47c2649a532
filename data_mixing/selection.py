"""Which documents a store holds, and in which split: exact duplicates, size limits, held-out documents.

All three are decided from the documents' contents alone, so they do not depend on file names, on the order of
reading or on the number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.corpora import DomainSource, SplitFractions

DROPPED = -1
_PERSON = b"mixwright.cut"


@dataclass(frozen=True)
class Scan:
    """What is known of a task's documents: identity uint64 [n, 2], rank uint64 [n], num_bytes int64 [n].

    `identity` is a 128-bit hash of the UTF-8 text, `rank` a seeded hash of it that orders documents at random.
    `per_unit` int64 [units] counts the documents of each unit. `num_short` documents were left out for their
    length, `num_bad` were unusable, and `bad` tells of the first of these.
    """

    identity_n2: NDArray[np.uint64]
    rank_n: NDArray[np.uint64]
    num_bytes_n: NDArray[np.int64]
    per_unit: NDArray[np.int64]
    num_short: int
    num_bad: int
    bad: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rank_n)


@dataclass(frozen=True)
class Selection:
    """One domain's documents: split_n int8 [n] is an index into SPLITS, or DROPPED."""

    split_n: NDArray[np.int8]
    num_duplicate: int
    num_over_limit: int


def identity_of(text: bytes) -> bytes:
    """128-bit hash of a document's UTF-8 text."""
    return hashlib.blake2b(text, digest_size=16).digest()


def rank_of(identity: bytes, seed: int) -> int:
    """64-bit seeded hash of an identity."""
    digest = hashlib.blake2b(identity, digest_size=8, key=seed.to_bytes(8, "little"), person=_PERSON).digest()
    return int.from_bytes(digest, "little")


def select(scans: Sequence[Scan], sources: Sequence[DomainSource], split: SplitFractions) -> list[Selection]:
    """Decide on every document; of equal documents the first of the first listed domain stays."""
    duplicate_n = find_duplicates(np.concatenate([scan.identity_n2 for scan in scans]))
    edges = np.cumsum([0, *map(len, scans)])
    return [
        _select_domain(scan, duplicate_n[start:stop], source, split)
        for scan, source, start, stop in zip(scans, sources, edges[:-1], edges[1:], strict=True)
    ]


def find_duplicates(identity_n2: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """bool [n]: an equal identity stands earlier."""
    order = np.lexsort((identity_n2[:, 0], identity_n2[:, 1]))  # stable: equal ones stay in their order
    same = (identity_n2[order[1:]] == identity_n2[order[:-1]]).all(axis=1)
    duplicate_n = np.zeros(len(order), bool)
    duplicate_n[order[1:]] = same
    return duplicate_n


def _select_domain(
    scan: Scan, duplicate_n: NDArray[np.bool_], source: DomainSource, split: SplitFractions
) -> Selection:
    within_n = ~duplicate_n
    if source.max_bytes is not None:
        within_n = seeded_cut(scan.rank_n, scan.num_bytes_n, ~duplicate_n, source.max_bytes)
    split_n = np.full(len(scan), DROPPED, np.int8)
    split_n[within_n] = assign_splits(scan.identity_n2[within_n], split)
    return Selection(split_n, int(duplicate_n.sum()), int((~duplicate_n & ~within_n).sum()))


def seeded_cut(
    rank_n: NDArray[np.uint64], num_bytes_n: NDArray[np.int64], candidate_n: NDArray[np.bool_], max_bytes: int
) -> NDArray[np.bool_]:
    """bool [n]: candidates in the order of their rank, until the next would exceed `max_bytes` in total.

    A document that is larger than `max_bytes` on its own is passed over.
    """
    fitting = np.flatnonzero(candidate_n & (num_bytes_n <= max_bytes))
    order = fitting[np.argsort(rank_n[fitting], kind="stable")]
    kept_n = np.zeros(len(rank_n), bool)
    kept_n[order[np.cumsum(num_bytes_n[order]) <= max_bytes]] = True
    return kept_n


def excerpt_bytes(
    rank_n: NDArray[np.uint64], num_bytes_n: NDArray[np.int64], candidate_n: NDArray[np.bool_], max_bytes: int
) -> NDArray[np.int64]:
    """How many bytes to take of each document, int64 [n]: candidates by rank, the last one cut to `max_bytes`."""
    order = np.flatnonzero(candidate_n)
    order = order[np.argsort(rank_n[order], kind="stable")]
    before = np.cumsum(num_bytes_n[order]) - num_bytes_n[order]
    take_n = np.zeros(len(rank_n), np.int64)
    take_n[order] = np.clip(max_bytes - before, 0, num_bytes_n[order])
    return take_n


def assign_splits(identity_n2: NDArray[np.uint64], split: SplitFractions) -> NDArray[np.int8]:
    """int8 [n] of distinct documents, by their hash alone: the same document is in the same split of every store.

    The exception are domains of few documents, in which a split would be empty: with three or more every split
    gets one, with fewer all are for training.
    """
    position_n = identity_n2[:, 0] / 2.0**64
    held_out_n = np.where(position_n < split.validation, 1, 2)
    split_n = np.where(position_n < split.validation + split.test, held_out_n, 0).astype(np.int8)
    held_out = [index for index, share in ((1, split.validation), (2, split.test)) if share > 0]
    if len(split_n) <= len(held_out):
        return np.zeros_like(split_n)
    if not np.isin([0, *held_out], split_n).all():
        order = np.argsort(position_n)
        split_n[order[-1]] = 0
        split_n[order[: len(held_out)]] = held_out
    return split_n


def concatenate(scans: Iterable[Scan]) -> Scan:
    """The scans of a domain's tasks as one."""
    parts = list(scans)
    return Scan(
        identity_n2=np.concatenate([part.identity_n2 for part in parts]),
        rank_n=np.concatenate([part.rank_n for part in parts]),
        num_bytes_n=np.concatenate([part.num_bytes_n for part in parts]),
        per_unit=np.concatenate([part.per_unit for part in parts]),
        num_short=sum(part.num_short for part in parts),
        num_bad=sum(part.num_bad for part in parts),
        bad=tuple(where for part in parts for where in part.bad),
    )
