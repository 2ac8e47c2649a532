"""Looking at a policy: held-out pairs, what it writes, and how far it is from its reference on what it writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mixwright.data_mixing.permutation import mix_key, permute
from mixwright.pretrain.engine import Engine
from mixwright.pretrain.ranks import Ranks
from mixwright.pretrain.rpo.config import RpoConfig, RpoEvaluationConfig
from mixwright.pretrain.rpo.figures import PairWindow, standard_error
from mixwright.pretrain.rpo.groups import CompletionLogProbs
from mixwright.pretrain.rpo.layout import lay_out
from mixwright.pretrain.rpo.objective import Objective
from mixwright.pretrain.rpo.pairs import PairSet
from mixwright.pretrain.rpo.policy import PolicyModel
from mixwright.pretrain.rpo.preferences import Preferences
from mixwright.pretrain.rpo.sampling import (
    SamplingSettings,
    divergence_on_samples,
    end_ids,
    sample_completions,
)

SAMPLES = "samples.jsonl"
Completions = list[NDArray[np.int32]]

_PROMPTS, _KL, _GENERATIONS = 0x5250_4F04, 0x5250_4F05, 0x5250_4F06


@torch.no_grad()
def evaluate_pairs(
    engine: Engine, objective: Objective, preferences: Preferences, config: RpoConfig, ranks: Ranks
) -> dict[str, Any]:
    """Figures of all held-out pairs, over all ranks, and the entropy of predictions, nats per token. Collective."""
    window, training = PairWindow(), config.training
    entropy_and_tokens = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    with _evaluating(engine):
        for index_P, num_own in _batches(len(preferences.evaluation), training.micro_batch_pairs, ranks):
            groups = [preferences.evaluation.group(int(index)) for index in index_P]
            reference_P2 = torch.from_numpy(preferences.reference.evaluation_n2[index_P]).to(ranks.device)
            found: CompletionLogProbs = engine.forward(lay_out(groups, training.layout).to(ranks.device), True)
            window.add(objective.figures(found, reference_P2).first(num_own))
            assert found.entropy_PC is not None
            sums = [part_PC[:num_own].double().sum() for part_PC in (found.entropy_PC, found.length_PC)]
            entropy_and_tokens += torch.stack(sums)
    entropy, num_tokens = ranks.sum(entropy_and_tokens).tolist()
    return {**window.take(ranks), "entropy_per_token": entropy / num_tokens}


def _batches(num_pairs: int, size: int, ranks: Ranks) -> Iterator[tuple[NDArray[np.int64], int]]:
    """This rank's batches [size] and how many of each are its own: all ranks have as many, as ZeRO 3 demands."""
    own = np.arange(ranks.rank, num_pairs, ranks.size)
    for start in range(0, -(-num_pairs // ranks.size), size):
        batch = own[start : start + size]
        yield np.pad(batch, (0, size - len(batch))), len(batch)


@dataclass(frozen=True)
class SampleView:
    """What samples are drawn for: held-out pairs, how, and with which seed; the prompts are the same each time."""

    pairs: PairSet
    config: RpoEvaluationConfig
    tokenizer: Any
    seed: int

    def draw(self, policy: PolicyModel, num: int, temperature: float, key: int) -> tuple[list[int], Completions]:
        """Indices of pairs and a completion of each of their prompts; pairs come again where there are too few."""
        index_n = permute(np.arange(num) % len(self.pairs), len(self.pairs), mix_key(_PROMPTS, self.seed))
        settings = SamplingSettings(self.config.max_new_tokens, temperature, end_ids(policy, self.tokenizer))
        prompts = [self.pairs.group(int(index)).prompt for index in index_n]
        return index_n.tolist(), sample_completions(policy, prompts, settings, mix_key(key, self.seed) >> 1)


def divergence(policy: PolicyModel, reference: PolicyModel | None, view: SampleView) -> dict[str, float]:
    """KL(policy || reference) of completions, nats, on fresh samples of the policy, with its standard error."""
    indices, drawn = view.draw(policy, view.config.kl_samples, 1.0, _KL)
    prompts = [view.pairs.group(index).prompt for index in indices]
    found = divergence_on_samples(policy, reference, prompts, drawn)
    lengths = [len(completion) for completion in drawn]
    return {
        "kl": float(np.mean(found)),
        "kl_stderr": standard_error(found),
        "num_samples": len(found),
        "tokens": float(np.mean(lengths)),
    }


def write_generations(policy: PolicyModel, view: SampleView, step: int, run_dir: Path) -> list[dict[str, Any]]:
    """Samples after held-out prompts, appended to `samples.jsonl` and returned."""
    indices, drawn = view.draw(policy, view.config.generations, view.config.temperature, _GENERATIONS)
    records = [
        {"step": step, "pair": index, "prompt": view.pairs.prompt_text(index), "text": view.tokenizer.decode(one)}
        for index, one in zip(indices, drawn, strict=True)
    ]
    with (run_dir / SAMPLES).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return records


@contextmanager
def _evaluating(engine: Engine) -> Iterator[None]:
    engine.eval()
    try:
        yield
    finally:
        engine.train()
