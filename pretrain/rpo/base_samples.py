"""One completion of the reference model per training prompt: the base distribution that is not the chosen completions.

Sampled once, in parts that are complete or absent, each with a seed of its own, beside the reference log-probabilities.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.manifest import fingerprint
from mixwright.data_mixing.permutation import mix_key
from mixwright.data_mixing.staging import atomic_file, is_complete
from mixwright.pretrain.errors import TrainingError
from mixwright.pretrain.ranks import Ranks
from mixwright.pretrain.rpo.pairs import PairSet, PreparedPairs
from mixwright.pretrain.rpo.policy import PolicyModel
from mixwright.pretrain.rpo.reference import PART_PAIRS, Progress, ReferenceKey
from mixwright.pretrain.rpo.sampling import SamplingSettings, sample_completions

_BASE = 0x5250_4F03


class BaseSamples:
    """Completions by index of the training pair; `lengths` int64 [n]."""

    def __init__(self, completions: list[NDArray[np.int32]]) -> None:
        self._completions = completions
        self.lengths = np.array([len(completion) for completion in completions], np.int64)

    def completion(self, index: int) -> NDArray[np.int32]:
        return self._completions[index]


def base_samples(
    prepared: PreparedPairs,
    key: ReferenceKey,
    model: PolicyModel,
    settings: SamplingSettings,
    seed: int,
    ranks: Ranks,
    progress: Progress,
) -> BaseSamples:
    """Samples for all training prompts; missing parts are drawn from `model`. Collective. Raises TrainingError."""
    pairs = prepared.train
    decides = {
        **key.tree(),
        "seed": seed,
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
    }
    folder = prepared.folder / f"base-samples-{fingerprint(decides)[:12]}"
    starts = range(0, len(pairs), PART_PAIRS)
    missing = [start for start in starts if not is_complete(_part(folder, start))]
    ranks.barrier()
    for start in missing[ranks.rank :: ranks.size]:
        _draw(_part(folder, start), pairs, start, model, settings, seed)
        progress("samples of the reference", min(start + PART_PAIRS, len(pairs)), len(pairs))
    ranks.barrier()
    return BaseSamples([one for start in starts for one in _read(_part(folder, start), pairs, start)])


def _part(folder: Path, start: int) -> Path:
    return folder / f"part-{start // PART_PAIRS:06d}.npz"


def _draw(path: Path, pairs: PairSet, start: int, model: PolicyModel, settings: SamplingSettings, seed: int) -> None:
    prompts = [pairs.group(index).prompt for index in range(start, min(start + PART_PAIRS, len(pairs)))]
    drawn = sample_completions(model, prompts, settings, mix_key(_BASE, seed, start) >> 1)
    # Without a prompt the first token of a completion is given, not learned: it must not be the only one.
    drawn = [
        np.repeat(one, 2) if len(one) < 2 and not len(prompt) else one
        for one, prompt in zip(drawn, prompts, strict=True)
    ]
    content = io.BytesIO()
    np.savez(content, tokens=np.concatenate(drawn), lengths=np.array([len(one) for one in drawn], np.int64))
    with atomic_file(path) as file:
        file.write(content.getvalue())


def _read(path: Path, pairs: PairSet, start: int) -> list[NDArray[np.int32]]:
    try:
        with np.load(path, allow_pickle=False) as part:
            tokens, lengths = part["tokens"], part["lengths"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise TrainingError(f"{path}: cannot be read ({error}); remove it, it is drawn again") from None
    if len(lengths) != min(PART_PAIRS, len(pairs) - start) or lengths.sum() != len(tokens):
        raise TrainingError(f"{path}: does not hold one sample for each of its pairs; remove it, it is drawn again")
    return np.split(tokens, np.cumsum(lengths)[:-1])
