"""Teachers' predictions on disk: for every token of every training row the k likeliest ids and the mass of the others.

    <folder>/cache.json                       whose predictions of what these are; written first
    <folder>/<domain>/ids-00000.npy           uint16 or uint32 [rows, T, k]
    <folder>/<domain>/log_p-00000.npy         float32 [rows, T, k]
    <folder>/<domain>/log_tail-00000.npy      float32 [rows, T], written last: the chunk is complete

The mass of the others is summed over them, not taken to be what rounding leaves; nothing is normalised again. Source:
spec/posttraining.md 5.3.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixwright.data_mixing.manifest import fingerprint
from mixwright.data_mixing.plain_data import read_json_object
from mixwright.data_mixing.staging import atomic_file, exclusive, is_complete
from mixwright.data_mixing.store import TokenStore
from mixwright.kernels.ensemble_kl import Pooling
from mixwright.pretrain.ensemble.member import Member, check_together
from mixwright.pretrain.ensemble.pooling import pool
from mixwright.pretrain.ensemble.spool import SpooledMember, spans, spool
from mixwright.pretrain.errors import EnsembleError

CACHE = "cache.json"
CHUNK_TOKENS = 1 << 17
"""Tokens of a chunk: what is done again after a kill, and how often members are loaded."""

OPEN_CHUNKS = 64
"""Chunks that stay open, three file descriptors each: processes may have 1024, a cache thousands of chunks."""

Progress = Callable[[int, int], None]
"""Called with the rows that are done, and all rows."""


@dataclass(frozen=True)
class CacheKey:
    """What a cache depends on, as it is noted in cache.json; `domains` are fingerprints of training tokens by name.

    `document_masks`: the teachers saw each token's own document only.
    """

    members: tuple[str, ...]
    pooling: str
    temperature: float
    tokenizer_hash: str
    sequence_length: int
    domains: dict[str, str]
    document_masks: bool

    @classmethod
    def of(
        cls,
        members: Sequence[Member],
        store: TokenStore,
        pooling: Pooling,
        temperature: float,
        document_masks: bool,
    ) -> CacheKey:
        manifest = store.manifest
        return cls(
            members=tuple(member.fingerprint for member in members),
            pooling=pooling,
            temperature=temperature,
            tokenizer_hash=manifest.tokenizer_hash,
            sequence_length=manifest.sequence_length,
            domains={domain.name: domain.fingerprint for domain in manifest.domains},
            document_masks=document_masks,
        )

    def tree(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**asdict(self), "members": list(self.members)}


def write_cache(
    members: Sequence[Member],
    store: TokenStore,
    *,
    pooling: Pooling,
    temperature: float,
    top_k: int,
    folder: Path,
    document_masks: bool = False,
    progress: Progress | None = None,
) -> TopKCache:
    """Predictions of `members` at `temperature` for all training rows of `store`; goes on where it was interrupted.

    Members are run one after the other over a chunk of rows, so memory does not grow with their number;
    `document_masks` keeps the documents of a row apart. Raises EnsembleError for a folder that holds another cache, and
    for more classes than there are.
    """
    check_together(members)
    if not 0 < top_k <= members[0].vocab_size:
        raise EnsembleError(f"top_k is {top_k}, expected 1 to the vocabulary of {members[0].vocab_size}")
    key, chunk_rows = CacheKey.of(members, store, pooling, temperature, document_masks), _chunk_rows(store)
    document_end = store.manifest.eos_id if document_masks else None
    predict = functools.partial(_predict, members, pooling, temperature, top_k, folder / "spool", document_end)
    total = sum(domain.num_rows for domain in store.domains())
    done = 0
    with exclusive(folder):
        _claim(folder, key, top_k, chunk_rows)
        for domain in store.domains():
            for first in range(0, domain.num_rows, chunk_rows):
                row_n = np.arange(first, min(first + chunk_rows, domain.num_rows))
                if not _is_whole(folder, domain.name, first // chunk_rows):
                    rows_nS = np.asarray(store.gather(np.full(len(row_n), store.index(domain.name)), row_n))
                    _write_chunk(folder, domain.name, first // chunk_rows, predict(rows_nS.astype(np.int64)))
                    shutil.rmtree(folder / "spool")
                    if progress is not None:
                        progress(done + len(row_n), total)
                done += len(row_n)
    return TopKCache.open(
        folder, store, members=members, pooling=pooling, temperature=temperature, document_masks=document_masks
    )


Chunk = tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float32]]
"""ids [n, T, k], log-probabilities [n, T, k], log of the others' mass [n, T]."""


class TopKCache:
    """A complete cache, opened for the `domains` of a store, in the store's order; chunks are opened when read."""

    def __init__(self, folder: Path, domains: Sequence[str], chunk_rows: int, top_k: int) -> None:
        self._domains, self._chunk_rows, self.top_k = tuple(domains), chunk_rows, top_k
        self._chunk = functools.lru_cache(maxsize=OPEN_CHUNKS)(functools.partial(_open_chunk, folder))

    @classmethod
    def open(
        cls,
        folder: Path,
        store: TokenStore,
        *,
        members: Sequence[Member],
        pooling: Pooling,
        temperature: float,
        document_masks: bool = False,
    ) -> TopKCache:
        """Raises EnsembleError when it is not complete, or of other teachers or data, naming what differs."""
        tree = _read(folder)
        _check_same(folder, tree["key"], CacheKey.of(members, store, pooling, temperature, document_masks))
        chunk_rows = int(tree["chunk_rows"])
        for domain in store.domains():
            numbers = range(-(-domain.num_rows // chunk_rows))
            missing = [number for number in numbers if not _is_whole(folder, domain.name, number)]
            if missing:
                raise EnsembleError(
                    f"{folder}: not complete, {len(missing)} of {len(numbers)} chunks of domain {domain.name!r} are "
                    "missing; run the command that makes it again"
                )
        return cls(folder, [domain.name for domain in store.domains()], chunk_rows, int(tree["top_k"]))

    def take(
        self, domain_n: NDArray[np.int64], row_n: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """ids [n, T, k], log-probabilities [n, T, k] and log of the others' mass [n, T] of rows, in their order."""
        found = [self._row(int(domain), int(row)) for domain, row in zip(domain_n, row_n, strict=True)]
        ids, log_p, log_tail = (np.stack(parts) for parts in zip(*found, strict=True))
        return ids.astype(np.int64), log_p, log_tail

    def _row(self, domain: int, row: int) -> tuple[NDArray[Any], ...]:
        chunk = self._chunk(self._domains[domain], row // self._chunk_rows)
        # Copies: a view would keep its chunk open.
        return tuple(np.array(part[row % self._chunk_rows]) for part in chunk)


def bytes_per_token(top_k: int, vocab_size: int) -> int:
    """What one token takes on disk."""
    return top_k * (_id_dtype(vocab_size).itemsize + 4) + 4


def _predict(
    members: Sequence[Member],
    pooling: Pooling,
    temperature: float,
    top_k: int,
    spool_folder: Path,
    document_end: int | None,
    rows_nS: NDArray[np.int64],
) -> Chunk:
    spooled = spool(members, rows_nS, spool_folder, document_end)
    vocab_size, num_tokens = members[0].vocab_size, len(rows_nS) * (rows_nS.shape[1] - 1)
    parts = [_top(spooled, span, pooling, temperature, top_k) for span in spans(num_tokens, vocab_size, len(members))]
    ids_Nk, log_p_Nk, log_tail_N = (torch.cat(column) for column in zip(*parts, strict=True))
    shape = (len(rows_nS), rows_nS.shape[1] - 1)
    return (
        ids_Nk.numpy().astype(_id_dtype(vocab_size)).reshape(*shape, top_k),
        log_p_Nk.numpy().reshape(*shape, top_k),
        log_tail_N.numpy().reshape(shape),
    )


def _top(
    spooled: Sequence[SpooledMember], span: slice, pooling: Pooling, temperature: float, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """ids, log-probabilities and log of the others' mass of a block of tokens."""
    scores_mV = pool([one.logits(span) for one in spooled], pooling).div_(temperature)
    log_p_mV = torch.log_softmax(scores_mV, dim=1)
    top = log_p_mV.topk(top_k, dim=1)
    log_tail_m = torch.logsumexp(log_p_mV.scatter(1, top.indices, -torch.inf), dim=1)
    return top.indices, top.values, log_tail_m


def _chunk_rows(store: TokenStore) -> int:
    return max(CHUNK_TOKENS // store.manifest.sequence_length, 1)


def _id_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _claim(folder: Path, key: CacheKey, top_k: int, chunk_rows: int) -> None:
    """Note what the folder holds, or refuse it when it holds another cache."""
    tree = {"key": key.tree(), "top_k": top_k, "chunk_rows": chunk_rows}
    if not (folder / CACHE).is_file():
        with atomic_file(folder / CACHE) as file:
            file.write(json.dumps(tree, indent=1).encode())
        return
    found = _read(folder)
    _check_same(folder, found["key"], key)
    if (found["top_k"], found["chunk_rows"]) != (top_k, chunk_rows):
        raise EnsembleError(
            f"{folder}: holds a cache of the {found['top_k']} likeliest classes in chunks of {found['chunk_rows']} "
            f"rows, not of {top_k} in {chunk_rows}; choose another folder, or remove it"
        )


def _read(folder: Path) -> dict[str, Any]:
    try:
        tree = read_json_object(folder / CACHE, strict=True)
        return {name: tree[name] for name in ("key", "top_k", "chunk_rows")}
    except (OSError, ValueError, KeyError):
        raise EnsembleError(
            f"{folder}: no cache of teachers (expected {CACHE}); make it with `mixwright distill prepare`"
        ) from None


def _check_same(folder: Path, found: dict[str, Any], key: CacheKey) -> None:
    found = {"document_masks": False, **found}  # caches of before there was a choice
    expected = key.tree()
    if fingerprint(found) == fingerprint(expected):
        return
    differing = [name for name in expected if found.get(name) != expected[name]]
    pairs = [f"{name}: {_short(found.get(name))} there, {_short(expected[name])} here" for name in differing]
    raise EnsembleError(f"{folder}: holds other predictions than are asked for ({'; '.join(pairs)})")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _write_chunk(folder: Path, domain: str, number: int, chunk: Chunk) -> None:
    for name, array in zip(("ids", "log_p", "log_tail"), chunk, strict=True):
        path = _part(folder, domain, name, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            np.save(file, array)


def _is_whole(folder: Path, domain: str, number: int) -> bool:
    return all(is_complete(_part(folder, domain, name, number)) for name in ("ids", "log_p", "log_tail"))


def _open_chunk(folder: Path, domain: str, number: int) -> Chunk:
    ids, log_p, log_tail = (
        np.load(_part(folder, domain, name, number), mmap_mode="r") for name in ("ids", "log_p", "log_tail")
    )
    return ids, log_p, log_tail


def _part(folder: Path, domain: str, name: str, number: int) -> Path:
    return folder / domain / f"{name}-{number:05d}.npy"
