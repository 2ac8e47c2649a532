"""Full check of a token store against its manifest: every token is read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.errors import DataError
from mixwright.data_mixing.manifest import SPLITS, DomainManifest, RowFile, Split
from mixwright.data_mixing.store import TokenStore
from mixwright.data_mixing.summary import domain_fingerprint, store_fingerprint
from mixwright.data_mixing.tokenizer import tokenizer_hash

_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Check:
    """One thing that was checked, how many rows it covers, and what is wrong with it (None: nothing)."""

    what: str
    num_rows: int
    problem: str | None


def verify(store: TokenStore) -> Iterator[Check]:
    """Check tokenizer, fingerprints and every file, going on after a problem."""
    manifest = store.manifest
    found = tokenizer_hash(store.tokenizer_folder)
    yield Check("tokenizer", 0, _difference("hash", found, manifest.tokenizer_hash))
    width = manifest.sequence_length + 1
    found = store_fingerprint(manifest.domains, width, manifest.dtype, manifest.tokenizer_hash)
    yield Check("manifest", 0, _difference("fingerprint", found, manifest.fingerprint))
    for domain in manifest.domains:
        found = domain_fingerprint(domain.splits["train"].files)
        yield Check(domain.name, 0, _difference("fingerprint", found, domain.fingerprint))
        for split in SPLITS:
            yield from _verify_split(store, domain, split)


def _difference(name: str, found: str, recorded: str) -> str | None:
    return None if found == recorded else f"{name} is {found}, the manifest recorded {recorded}"


def _verify_split(store: TokenStore, domain: DomainManifest, split: Split) -> Iterator[Check]:
    first = 0
    for file in domain.splits[split].files:
        yield Check(f"{domain.name}/{file.name}", file.num_rows, _file_problem(store, domain.name, split, first, file))
        first += file.num_rows
    if first != domain.splits[split].num_rows:
        problem = f"files have {first} rows, the manifest says {domain.splits[split].num_rows}"
        yield Check(f"{domain.name}/{split}", 0, problem)


def _file_problem(store: TokenStore, name: str, split: Split, first: int, file: RowFile) -> str | None:
    digest, largest = hashlib.sha256(), 0
    try:
        for start in range(first, first + file.num_rows, _BLOCK_ROWS):
            rows_NW = store.rows(name, split, start, min(_BLOCK_ROWS, first + file.num_rows - start))
            digest.update(_little_endian(rows_NW))
            largest = max(largest, int(rows_NW.max()))
    except DataError as error:
        return str(error)
    if largest >= store.manifest.vocab_size:
        return f"token {largest} is outside the vocabulary of {store.manifest.vocab_size}"
    return _difference("content", digest.hexdigest(), file.sha256)


def _little_endian(rows_NW: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(rows_NW, dtype=rows_NW.dtype.newbyteorder("<")).tobytes()
