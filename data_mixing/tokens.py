"""Second pass over the documents: tokens of each task, by split, in the order of the documents."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.errors import DataError
from mixwright.data_mixing.manifest import SPLITS
from mixwright.data_mixing.scan import Task, usable_texts
from mixwright.data_mixing.selection import DROPPED, identity_of
from mixwright.data_mixing.staging import atomic_file
from mixwright.data_mixing.tokenizer import TextTokenizer, load_tokenizer

_BATCH_CHARS = 1 << 20


@dataclass(frozen=True)
class TokenTask:
    """Tokenise the documents of `task` that `split_n` (int8 [n], DROPPED for none) selects.

    `identity_n2` are the documents' identities in the first pass; the second must meet the same ones.
    """

    task: Task
    split_n: NDArray[np.int8]
    identity_n2: NDArray[np.uint64]
    tokenizer_folder: Path
    tokenizer_hash: str
    result: Path

    @property
    def work(self) -> int:
        return self.task.num_bytes


@dataclass(frozen=True)
class TokenFile:
    """Tokens of one task, the splits one after the other: `num_tokens` of each, in the order of SPLITS."""

    path: Path
    dtype: str
    num_tokens: tuple[int, ...]

    def read(self, split_index: int, start: int, stop: int) -> NDArray[Any]:
        """Tokens start .. stop - 1 of a split."""
        first = sum(self.num_tokens[:split_index]) + start
        return np.fromfile(self.path, self.dtype, stop - start, offset=first * np.dtype(self.dtype).itemsize)


def run_tokens(token_task: TokenTask) -> None:
    """Write the tokens of a task, then a small file with their numbers, whose presence says that it is done."""
    tokenizer = _tokenizer(token_task.tokenizer_folder, token_task.tokenizer_hash)
    blocks: dict[int, list[NDArray[Any]]] = {index: [] for index in range(len(SPLITS))}
    for split_index, texts in _batches(token_task):
        blocks[split_index].append(tokenizer.encode_documents(texts))
    num_tokens = [sum(map(len, blocks[index])) for index in range(len(SPLITS))]
    with atomic_file(token_task.result.with_suffix(".bin"), durable=True) as file:
        for index in range(len(SPLITS)):
            file.writelines(block.data for block in blocks[index])
    with atomic_file(token_task.result) as file:
        file.write(json.dumps({"dtype": tokenizer.dtype, "num_tokens": num_tokens}).encode())


def read_token_file(result: Path) -> TokenFile:
    """The TokenFile that `run_tokens` wrote for this `result`."""
    summary = json.loads(result.read_bytes())
    return TokenFile(result.with_suffix(".bin"), summary["dtype"], tuple(summary["num_tokens"]))


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: Path, _hash: str) -> TextTokenizer:
    """A large vocabulary takes a second to load: once per process rather than once per task."""
    return load_tokenizer(folder)


def _batches(token_task: TokenTask) -> Iterator[tuple[int, list[str]]]:
    """(split index, texts) of the selected documents; texts of one split stay in order."""
    waiting: dict[int, list[str]] = {index: [] for index in range(len(SPLITS))}
    num_chars = dict.fromkeys(waiting, 0)
    for split_index, text in _selected(token_task):
        waiting[split_index].append(text)
        num_chars[split_index] += len(text)
        if num_chars[split_index] >= _BATCH_CHARS:
            yield split_index, waiting[split_index]
            waiting[split_index], num_chars[split_index] = [], 0
    yield from ((index, texts) for index, texts in waiting.items() if texts)


def _selected(token_task: TokenTask) -> Iterator[tuple[int, str]]:
    identities = token_task.identity_n2.tobytes()
    number = -1
    for number, text in enumerate(usable_texts(token_task.task)):
        if identities[16 * number : 16 * number + 16] != identity_of(text.encode()):
            break
        if (split_index := int(token_task.split_n[number])) != DROPPED:
            yield split_index, text
    else:
        if number + 1 == len(token_task.split_n):
            return
    first, last = token_task.task.units[0].path, token_task.task.units[-1].path
    raise DataError(f"{first} ... {last}: changed while the store was being made; run the same command again")


@dataclass(frozen=True)
class ExcerptTask:
    """Take the first take_n[i] bytes of document i of a task."""

    task: Task
    take_n: NDArray[np.int64]


def read_excerpts(excerpt_task: ExcerptTask) -> list[str]:
    """The excerpts, in order; a character that is cut through is left out."""
    return [
        text.encode()[:take].decode(errors="ignore")
        for text, take in zip(usable_texts(excerpt_task.task), excerpt_task.take_n.tolist(), strict=True)
        if take
    ]
