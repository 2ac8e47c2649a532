"""From sources to a folder of tokenised pairs.

Rows are read, encoded and written batch by batch, so memory does not grow with their text. Pairs keep the order of
their source.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.errors import DataError
from mixwright.data_mixing.selection import rank_of
from mixwright.data_mixing.staging import atomic_file
from mixwright.pretrain.rpo.config import PairDataConfig
from mixwright.pretrain.rpo.pair_counts import BadPair, PairCounts, Tally, caught
from mixwright.pretrain.rpo.pair_files import TOKENS, PairWriter, Split, finish
from mixwright.pretrain.rpo.raw_pairs import MessagePair, TextPair, read_pair
from mixwright.pretrain.rpo.reading import Row, Source
from mixwright.pretrain.rpo.templates import EncodedPair, PairEncoder
from mixwright.pretrain.rpo.truncation import FittedPair, fit

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and all of it."""

_BATCH_PAIRS, _BATCH_CHARACTERS = 1000, 1 << 20


@dataclass(frozen=True)
class _Kept:
    """A pair that stays."""

    prompt_identity: bytes
    spells_special: bool
    fitted: FittedPair


@dataclass(frozen=True)
class Work:
    """The sources to tokenise, the first one to train on, and how."""

    config: PairDataConfig
    sources: Sequence[Source]
    tokenizer: Any
    seed: int
    progress: Progress

    def tokenise(self, source: Source, writer: PairWriter) -> Tally:
        """Append the pairs of a source; raises DataError when it has none."""
        tally, encoder = Tally(self.config.on_bad_pair), PairEncoder(self.tokenizer, end=self.config.end)
        for outcome in self._outcomes(source, encoder):
            if isinstance(outcome, BadPair):
                tally.drop(outcome)
                continue
            writer.add(outcome.fitted, outcome.prompt_identity)
            tally.keep(outcome.fitted.cut_prompt, outcome.fitted.cut_completions, outcome.spells_special)
        if not tally.kept:
            raise DataError(f"{source.name}: no usable pair: {tally.describe_dropped()}")
        return tally

    def _outcomes(self, source: Source, encoder: PairEncoder) -> Iterator[_Kept | BadPair]:
        """What becomes of each row, in order."""
        for batch, position in self._batches(source):
            encoded = iter(encoder.encode([pair for pair in batch if not isinstance(pair, BadPair)]))
            for pair in batch:
                yield pair if isinstance(pair, BadPair) else self._kept(pair, next(encoded))
            self.progress(f"tokenising {source.name}", position, source.size)

    def _kept(self, pair: TextPair | MessagePair, encoded: EncodedPair | BadPair) -> _Kept | BadPair:
        if isinstance(encoded, BadPair):
            return encoded
        fitted = caught(lambda: fit(encoded, self.config))
        if isinstance(fitted, BadPair):
            return fitted
        return _Kept(pair.prompt_identity, encoded.spells_special, fitted)

    def _batches(self, source: Source) -> Iterator[tuple[list[TextPair | MessagePair | BadPair], int]]:
        """Pairs of some rows, and the position in the source after them."""
        batch: list[TextPair | MessagePair | BadPair] = []
        num_characters = position = 0
        for row in source.rows():
            pair = row if isinstance(row, BadPair) else self._read(row)
            batch.append(pair)
            position = position if isinstance(row, BadPair) else row.position
            num_characters += 0 if isinstance(pair, BadPair) else pair.num_characters
            if len(batch) >= _BATCH_PAIRS or num_characters >= _BATCH_CHARACTERS:
                yield batch, position
                batch, num_characters = [], 0
        yield batch, source.size

    def _read(self, row: Row) -> TextPair | MessagePair | BadPair:
        return caught(lambda: read_pair(row, self.config.columns))

    def split(self, writer: PairWriter, num_training: int) -> dict[Split, NDArray[np.int64]]:
        """Places of the pairs of each set. Raises DataError when all would be held out."""
        is_out_n = np.arange(len(writer)) >= num_training
        if wanted := self.config.held_out_pairs:
            is_out_n = hold_out(writer.prompt_n2, wanted, self.seed)
        if is_out_n.all():
            raise DataError(
                f"data.held_out_pairs = {wanted:,} leaves nothing to train on: {self.sources[0].name} has "
                f"{len(writer):,} usable pairs, and all pairs with one prompt are on one side"
            )
        return {"train": np.flatnonzero(~is_out_n), "evaluation": np.flatnonzero(is_out_n)}


def build_pairs(work: Work, place: Path, key: str, decided_by: dict[str, Any]) -> None:
    """Write the whole folder, its manifest last; what was begun is removed when that fails."""
    try:
        with atomic_file(place / TOKENS, durable=True) as file:
            writer = PairWriter(file)
            tally, *others = (work.tokenise(source, writer) for source in work.sources)
        splits = work.split(writer, tally.kept)
        counts = _count(writer, sum(others, tally), splits)
        finish(place, writer, splits, tokenizer=work.tokenizer, counts=counts, key=key, decided_by=decided_by)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise


def hold_out(prompt_n2: NDArray[np.uint64], num_pairs: int, seed: int) -> NDArray[np.bool_]:
    """Which pairs are held out, [n]: whole prompts in the order of a seeded hash, until there are `num_pairs`.

    `prompt_n2` are identities of prompts.
    """
    identities, prompt_n, count_p = np.unique(prompt_n2, axis=0, return_inverse=True, return_counts=True)
    rank_p = np.array([rank_of(identity.tobytes(), seed) for identity in identities], np.uint64)
    order_p = np.argsort(rank_p, kind="stable")
    before_p = np.cumsum(count_p[order_p]) - count_p[order_p]
    is_out_p = np.empty(len(order_p), np.bool_)
    is_out_p[order_p] = before_p < num_pairs
    return is_out_p[prompt_n.reshape(-1)]


def _count(writer: PairWriter, tally: Tally, splits: dict[Split, NDArray[np.int64]]) -> PairCounts:
    prompt_n, train_n, evaluation_n = writer.prompt_n2, splits["train"], splits["evaluation"]
    # 64 of the 128 bits will do for a count.
    shared = np.isin(prompt_n[evaluation_n, 0], prompt_n[train_n, 0])
    mean_prompt, mean_chosen, mean_rejected = writer.index_n4[train_n, 1:].mean(axis=0).round(2).tolist()
    return PairCounts(
        read=tally.kept + tally.dropped.total(),
        train=len(train_n),
        evaluation=len(evaluation_n),
        dropped=dict(sorted(tally.dropped.items())),
        examples=tuple(tally.examples),
        cut_prompts=tally.cut_prompts,
        cut_completions=tally.cut_completions,
        spelt_special=tally.spelt_special,
        shared_prompts=int(shared.sum()),
        mean_prompt=mean_prompt,
        mean_chosen=mean_chosen,
        mean_rejected=mean_rejected,
    )
