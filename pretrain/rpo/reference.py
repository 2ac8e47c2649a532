"""Log-probabilities of the reference model: computed once, kept beside the tokenised pairs, refused when stale.

A cache belongs to (parameters, dtype, pairs); its folder is named by what decides it, and says so inside. Parts are
files, complete or absent, so any number of ranks shares the work and an interrupted pass goes on. The policy before its
first step is the reference, so no second model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixwright.data_mixing.manifest import fingerprint
from mixwright.data_mixing.permutation import mix_key, permute
from mixwright.data_mixing.plain_data import read_json_object
from mixwright.data_mixing.staging import atomic_file, is_complete
from mixwright.pretrain.errors import TrainingError
from mixwright.pretrain.ranks import Ranks
from mixwright.pretrain.rpo.config import Layout, ReferenceConfig
from mixwright.pretrain.rpo.layout import lay_out
from mixwright.pretrain.rpo.pairs import PairSet, PreparedPairs
from mixwright.pretrain.rpo.policy import PolicyModel

ABOUT = "reference.json"
PART_PAIRS = 64
SPLITS = ("train", "evaluation")

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, what is done of it, and all of it."""


@dataclass(frozen=True)
class ReferenceKey:
    """What decides reference log-probabilities: hash of the parameters, dtype, fingerprint of the tokenised pairs."""

    parameters: str
    dtype: str
    pairs: str

    def tree(self) -> dict[str, Any]:
        return {"parameters": self.parameters, "dtype": self.dtype, "pairs": self.pairs}


@dataclass(frozen=True)
class ReferenceLogProbs:
    """Sums of log-probabilities of chosen and rejected completions, nats, float32 [n, 2] per split."""

    train_n2: NDArray[np.float32]
    evaluation_n2: NDArray[np.float32]

    def of(self, split: str) -> NDArray[np.float32]:
        return self.train_n2 if split == "train" else self.evaluation_n2


@dataclass(frozen=True)
class Pass:
    """A model, how it reads pairs, and on which rank this is."""

    model: PolicyModel
    layout: Layout
    micro_batch_pairs: int
    ranks: Ranks

    @torch.no_grad()
    def log_probs(self, pairs: PairSet, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Sums of log-probabilities [n, 2] of the pairs `indices` [n]."""
        size = self.micro_batch_pairs
        found: list[Tensor] = []
        with _evaluating(self.model):
            for start in range(0, len(indices), size):
                groups = [pairs.group(int(index)) for index in indices[start : start + size]]
                packed = lay_out(groups, self.layout).to(self.ranks.device)
                found.append(self.model(packed).logp_PC[:, :2].float().cpu())
        return np.asarray(torch.cat(found).numpy(), dtype=np.float32)


def reference_folder(prepared: PreparedPairs, key: ReferenceKey, config: ReferenceConfig) -> Path:
    return config.cache or prepared.folder / f"reference-{fingerprint(key.tree())[:12]}"


def reference_log_probs(
    prepared: PreparedPairs, key: ReferenceKey, config: ReferenceConfig, how: Pass, progress: Progress
) -> ReferenceLogProbs:
    """The reference's log-probabilities of all pairs; what is missing is computed with `how.model`. Collective.

    Raises TrainingError for a folder that belongs to another model or other pairs, and when kept values differ from
    what the model says of `verify_pairs` of them.
    """
    folder = reference_folder(prepared, key, config)
    if how.ranks.is_leader:
        _claim(folder, key)
    how.ranks.barrier()
    _check_same(folder, key)
    was_complete = all(is_complete(part) for split in SPLITS for part, _ in _parts(folder, prepared, split))
    how.ranks.barrier()
    for split in SPLITS:
        _compute(folder, prepared, split, how, progress)
    how.ranks.barrier()
    found = ReferenceLogProbs(*(_read(folder, prepared, split) for split in SPLITS))
    if was_complete and config.verify_pairs:
        _verify(folder, found, prepared.train, config, key.dtype, how)
    return found


def _compute(folder: Path, prepared: PreparedPairs, split: str, how: Pass, progress: Progress) -> None:
    """This rank's share of the parts that are missing."""
    parts = _parts(folder, prepared, split)
    missing = [(path, indices) for path, indices in parts if not is_complete(path)]
    total = sum(len(indices) for _, indices in parts)
    done = total - sum(len(indices) for _, indices in missing)
    for path, indices in missing[how.ranks.rank :: how.ranks.size]:
        found = how.log_probs(_split(prepared, split), indices)
        with atomic_file(path) as file:
            np.save(file, found)
        done = min(done + len(indices) * how.ranks.size, total)
        progress(f"reference log-probabilities ({split})", done, total)


def _verify(
    folder: Path, found: ReferenceLogProbs, pairs: PairSet, config: ReferenceConfig, dtype: str, how: Pass
) -> None:
    """Compute a few again: a cache can be damaged, and a machine can compute otherwise than the one before it."""
    tolerance = config.tolerance_in(dtype)
    num = min(config.verify_pairs, len(pairs))
    indices = permute(np.arange(num), len(pairs), mix_key(num, len(pairs)))
    per_token = np.abs(how.log_probs(pairs, indices) - found.train_n2[indices]) / pairs.lengths[indices, 1:3]
    worst = int(per_token.max(axis=1).argmax())
    if not per_token.max() <= tolerance:
        raise TrainingError(
            f"{folder}: the reference log-probabilities of pair {indices[worst]} differ by "
            f"{per_token[worst].max():.3g} nats per token from what the model says now "
            f"(reference.tolerance: {tolerance:g}); remove the folder"
        )


def _claim(folder: Path, key: ReferenceKey) -> None:
    if not (folder / ABOUT).is_file():
        with atomic_file(folder / ABOUT) as file:
            file.write(json.dumps(key.tree(), indent=1).encode())


def _check_same(folder: Path, key: ReferenceKey) -> None:
    try:
        found = read_json_object(folder / ABOUT, strict=True)
    except (OSError, ValueError) as error:
        raise TrainingError(f"{folder / ABOUT}: cannot be read: {error}") from None
    expected = key.tree()
    differing = [name for name in expected if found.get(name) != expected[name]]
    if differing:
        shown = ", ".join(f"{name} ({_short(found, name)} there, {expected[name][:12]} here)" for name in differing)
        raise TrainingError(
            f"reference.cache: {folder} is stale, it holds log-probabilities of other {shown}: leave reference.cache "
            "out, or name the cache of this model and these pairs"
        )


def _short(found: Mapping[str, Any], name: str) -> str:
    return str(found.get(name))[:12]


def _parts(folder: Path, prepared: PreparedPairs, split: str) -> list[tuple[Path, NDArray[np.int64]]]:
    num_pairs = len(_split(prepared, split))
    return [
        (folder / split / f"part-{start // PART_PAIRS:06d}.npy", np.arange(start, min(start + PART_PAIRS, num_pairs)))
        for start in range(0, num_pairs, PART_PAIRS)
    ]


def _read(folder: Path, prepared: PreparedPairs, split: str) -> NDArray[np.float32]:
    parts: list[NDArray[np.float32]] = []
    for path, indices in _parts(folder, prepared, split):
        try:
            part = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise TrainingError(f"{path}: cannot be read ({error}); remove it, it is computed again") from None
        if part.shape != (len(indices), 2) or part.dtype != np.float32:
            raise TrainingError(
                f"{path}: holds {part.dtype} {part.shape}, expected float32 ({len(indices)}, 2); remove it"
            )
        parts.append(part)
    return np.concatenate(parts) if parts else np.zeros((0, 2), np.float32)


def _split(prepared: PreparedPairs, split: str) -> PairSet:
    return prepared.train if split == "train" else prepared.evaluation


@contextmanager
def _evaluating(model: PolicyModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
