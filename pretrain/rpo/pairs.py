"""Preference pairs of a run: tokenised once, into a folder named by what decides them, then mapped from disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.manifest import fingerprint
from mixwright.data_mixing.staging import exclusive
from mixwright.pretrain.rpo.building import Progress, Work, build_pairs
from mixwright.pretrain.rpo.config import PairDataConfig
from mixwright.pretrain.rpo.groups import Group
from mixwright.pretrain.rpo.pair_counts import PairCounts
from mixwright.pretrain.rpo.pair_files import (
    FORMAT_VERSION,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    open_index,
    open_tokens,
    read_manifest,
)
from mixwright.pretrain.rpo.reading import Source, open_source
from mixwright.pretrain.rpo.templates import load_tokenizer, tokenizer_fingerprint

Say = Callable[[str], None]

_KEY_LENGTH = 12
_ELSEWHERE = {"train", "evaluation", "split", "evaluation_split", "folder"}
"""Settings that say where pairs are, not what they are: their content decides."""


class PairSet:
    """Pairs on disk, in order. `lengths` int64 [n, 3]: tokens of prompt, chosen and rejected of each.

    `fingerprint` identifies their tokens. What `group` gives are read-only views of the mapped file.
    """

    def __init__(
        self, tokens: NDArray[np.int32], index_n4: NDArray[np.int64], fingerprint: str, tokenizer_folder: Path
    ) -> None:
        self._tokens, self._index_n4 = tokens, index_n4
        self.fingerprint, self.tokenizer_folder = fingerprint, tokenizer_folder
        self.lengths = np.ascontiguousarray(index_n4[:, 1:])

    def __len__(self) -> int:
        return len(self._index_n4)

    def group(self, i: int) -> Group:
        """Prompt, chosen and rejected of pair i; raises IndexError when there is no such pair."""
        if not 0 <= i < len(self):
            raise IndexError(f"pair {i} of {len(self)}")
        start, *lengths = self._index_n4[i].tolist()
        parts = []
        for length in lengths:
            parts.append(self._tokens[start : start + length])
            start += length
        prompt, chosen, rejected = parts
        return Group(i, prompt, (chosen, rejected))

    def prompt_text(self, i: int) -> str:
        """The prompt of pair i, with the special tokens that it has."""
        return self._decode(self.group(i).prompt)

    def texts(self, i: int) -> tuple[str, str, str]:
        """Prompt, chosen and rejected of pair i as text, with the special tokens that they have."""
        group = self.group(i)
        prompt, chosen, rejected = map(self._decode, (group.prompt, *group.completions))
        return prompt, chosen, rejected

    def _decode(self, ids: NDArray[np.int32]) -> str:
        text: str = self._tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
        return text

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(str(self.tokenizer_folder), None)


@dataclass(frozen=True)
class PreparedPairs:
    """The pairs of a run. `fingerprint` is of everything that decided them, those of the sets are of their tokens."""

    folder: Path
    fingerprint: str
    counts: PairCounts
    train: PairSet
    evaluation: PairSet


def prepare_pairs(
    config: PairDataConfig,
    *,
    model_folder: str,
    chat_template: Path | None,
    folder: Path,
    seed: int,
    say: Say,
    progress: Progress,
) -> PreparedPairs:
    """Tokenise the pairs of `config` into `folder`/pairs-KEY, or open that folder when it is complete.

    KEY is of the settings, the content of the sources, the tokenizer with its chat template, and, where pairs are held
    out, the seed. `say` gets the counts. Raises DataError for unusable sources, templates that cannot be trained for,
    nothing left to train on or to evaluate on, and (a BadPair) for the first bad pair when `on_bad_pair` is `error`;
    nothing is left behind then.
    """
    tokenizer = load_tokenizer(model_folder, chat_template)
    sources = _open_sources(config)
    decided_by = _decided_by(config, sources, tokenizer_fingerprint(tokenizer), seed)
    key = fingerprint(decided_by)
    place = folder / f"pairs-{key[:_KEY_LENGTH]}"
    if not (place / MANIFEST).is_file():
        with exclusive(place):
            if not (place / MANIFEST).is_file():  # another process may have just made it
                say(f"tokenising {' and '.join(source.name for source in sources)} into {place}")
                build_pairs(Work(config, sources, tokenizer, seed, progress), place, key, decided_by)
    prepared = open_pairs(place)
    _tell(prepared.counts, place, say)
    return prepared


def open_pairs(folder: Path) -> PreparedPairs:
    """Pairs that `prepare_pairs` wrote; raises DataError when there are none, or they are damaged."""
    manifest = read_manifest(folder)
    tokens = open_tokens(folder, manifest)
    train, evaluation = (
        PairSet(tokens, open_index(folder, split, manifest), manifest.splits[split], folder / TOKENIZER)
        for split in SPLITS
    )
    return PreparedPairs(folder, manifest.fingerprint, manifest.counts, train, evaluation)


def _open_sources(config: PairDataConfig) -> list[Source]:
    """The source to train on, and the one to evaluate on if there is one."""
    sources = [open_source(config.train, config.split, config.columns)]
    if config.evaluation is not None:
        sources.append(open_source(config.evaluation, config.evaluation_split, config.columns))
    return sources


def _decided_by(config: PairDataConfig, sources: Sequence[Source], tokenizer: str, seed: int) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "config": config.model_dump(mode="json", exclude=_ELSEWHERE),
        "sources": [source.fingerprint for source in sources],
        "tokenizer": tokenizer,
        "seed": seed if config.held_out_pairs else None,
    }


def _tell(counts: PairCounts, place: Path, say: Say) -> None:
    say(f"pairs in {place}")
    for name, value in counts.rows():
        say(f"  {name}: {value}")
    for example in counts.examples:
        say(f"  for example {example}")
    if counts.shared_prompts:
        shared = f"{counts.shared_prompts:,} of {counts.evaluation:,}"
        say(f"warning: {shared} evaluation pairs have a prompt that is trained on")
