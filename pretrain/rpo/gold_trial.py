"""A trial in the language with a gold reward: its reference, its preferences, a policy trained on them and measured.

P pairs of a step, C completions, R response tokens, V tokens of the vocabulary, B samples.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mixwright.data_mixing.config_file import StrictModel
from mixwright.pretrain.config import ModelConfig, Positive, ScheduleConfig, Share
from mixwright.pretrain.model import build_model
from mixwright.pretrain.rpo import gold_task
from mixwright.pretrain.rpo.gold_task import RESPONSE_TOKENS, Preferences
from mixwright.pretrain.rpo.groups import CHOSEN, REJECTED, CompletionLogProbs
from mixwright.pretrain.rpo.objective import Objective, StepScope
from mixwright.pretrain.rpo.order import pairs_of_step
from mixwright.pretrain.rpo.small_lm import divergence, predictions, response_logp, sample
from mixwright.pretrain.rpo.trial import CurvePoint, Trial, content_key, log_steps, write_whole
from mixwright.pretrain.schedules import learning_rate


class ReferenceTraining(StrictModel):
    """How the reference learns the behaviour: fresh responses at every step, the rate falls to 0 by a cosine."""

    num_steps: Positive = 1500
    responses_per_step: Positive = 64
    lr: float = Field(default=3e-3, gt=0)


class GoldConfig(StrictModel):
    """The world, the reference and the training. `num_samples` of the policy are drawn at every measurement, twice."""

    model: ModelConfig
    num_prompts: Positive = 8
    validity: Share = 0.975
    reference: ReferenceTraining = ReferenceTraining()
    bradley_terry_scale: float = Field(default=6.0, gt=0)
    num_pairs: Positive = 512
    lr: float = Field(default=5e-4, gt=0)
    schedule: ScheduleConfig = ScheduleConfig(kind="constant")
    pairs_per_step: Positive = 32
    num_steps: Positive = 1500
    num_points: int = Field(default=18, ge=2)
    num_samples: Positive = 1024


class GoldTrial(Trial):
    """One objective in one world."""

    kind: Literal["gold"] = "gold"
    world: GoldConfig


@dataclass(frozen=True)
class World:
    """The reference and preferences of a seed; held-out pairs are of the same kind and never trained on."""

    reference: Any
    training: Preferences
    held_out: Preferences


def make_world(config: GoldConfig, seed: int, folder: Path) -> World:
    """The world of a seed. The reference is read from `folder` when it is there, else trained and written."""
    reference = _new_model(config, seed)
    settings = config.model_dump(mode="json", include={"model", "num_prompts", "validity", "reference"})
    path = folder / f"reference-{content_key({'seed': seed, **settings})}.safetensors"
    try:
        reference.load_state_dict(load(path.read_bytes()))
    except (FileNotFoundError, SafetensorError):
        _train_reference(reference, config, seed)
        # Copies, since tied embeddings are one tensor under two names.
        write_whole(path, save({name: tensor.clone() for name, tensor in reference.state_dict().items()}))
    reference.eval().requires_grad_(False)
    chance = torch.Generator().manual_seed(seed + 1)
    training, held_out = (
        gold_task.draw_preferences(reference, config.num_pairs, config.num_prompts, config.bradley_terry_scale, chance)
        for _ in range(2)
    )
    return World(reference, training, held_out)


def _new_model(config: GoldConfig, seed: int) -> Any:
    size = gold_task.vocabulary(config.num_prompts)
    model = build_model(config.model, vocab_size=size, sequence_length=1 + RESPONSE_TOKENS, eos_id=0, seed=seed)
    return model.causal_lm


def _train_reference(model: Any, config: GoldConfig, seed: int) -> None:
    """Maximum likelihood of behaviour responses, in place."""
    settings, schedule = config.reference, ScheduleConfig(kind="cosine", final_ratio=0.0)
    chance = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0, fused=True)
    for step in range(settings.num_steps):
        prompt_B, response_BR = gold_task.behave(
            settings.responses_per_step, config.num_prompts, config.validity, chance
        )
        logp_BRV = predictions(model, torch.cat([prompt_B[:, None], response_BR], dim=1), 1)
        optimizer.zero_grad()
        (-response_logp(logp_BRV, response_BR).mean()).backward()  # type: ignore[no-untyped-call]
        optimizer.param_groups[0]["lr"] = learning_rate(schedule, settings.lr, step, settings.num_steps)
        optimizer.step()


def run_gold(trial: GoldTrial, folder: Path) -> tuple[CurvePoint, ...]:
    """Train a copy of the reference; figures at steps that are evenly spaced in the logarithm."""
    config, objective = trial.world, Objective(trial.objective)
    world = make_world(config, trial.seed, folder)
    policy = copy.deepcopy(world.reference).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
    meter = Meter(world, config, trial.seed)
    reference_N2 = pair_logp(world.reference, world.training, 2)
    scope = StepScope(config.pairs_per_step, config.pairs_per_step * RESPONSE_TOKENS)
    measured, points = set(log_steps(config.num_steps, config.num_points)), []
    for step in range(config.num_steps):
        if step in measured:
            points.append(CurvePoint(step=step, figures=meter.measure(policy, step)))
        pair_P = torch.from_numpy(pairs_of_step(config.num_pairs, config.pairs_per_step, trial.seed, step))
        part = Preferences(world.training.prompt_P[pair_P], world.training.response_P3R[pair_P])
        logp_PC = pair_logp(policy, part, objective.num_completions)
        found = CompletionLogProbs(logp_PC, torch.full_like(logp_PC, RESPONSE_TOKENS))
        loss, _ = objective(found, reference_N2[pair_P], scope)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.param_groups[0]["lr"] = learning_rate(config.schedule, config.lr, step, config.num_steps)
        optimizer.step()
    last = meter.measure(policy, config.num_steps)
    return (*points, CurvePoint(step=config.num_steps, figures=last))


def pair_logp(model: Any, pairs: Preferences, num_completions: int) -> Tensor:
    """Log-probabilities of the completions of all pairs, float32 [P, C]."""
    tokens_NS = pairs.sequences(num_completions)
    logp_N = response_logp(predictions(model, tokens_NS, 1), tokens_NS[:, 1:])
    return logp_N.view(-1, num_completions)


class Meter:
    """Measures policies of one world on samples that are drawn alike in all its trials."""

    def __init__(self, world: World, config: GoldConfig, seed: int) -> None:
        self._world, self._config, self._seed = world, config, seed
        self._reference_logp = [pair_logp(world.reference, pairs, 2) for pairs in (world.training, world.held_out)]

    @torch.no_grad()
    def measure(self, policy: Any, step: int) -> dict[str, float]:
        """Figures of `policy`; `selection_reward` is of samples of their own, to choose a step by without bias."""
        prompt_B, response_BR, logp_BRV = self._samples(policy, step, 0)
        tokens_BS = torch.cat([prompt_B[:, None], response_BR], dim=1)
        divergence_B = divergence(logp_BRV, predictions(self._world.reference, tokens_BS, 1))
        reward_B = gold_task.gold_reward(prompt_B, response_BR)
        others = self._samples(policy, step, 1)
        return {
            "reward": float(reward_B.mean()),
            "reward_error": float(reward_B.std() / len(reward_B) ** 0.5),
            "selection_reward": float(gold_task.gold_reward(*others[:2]).mean()),
            "validity": float(gold_task.is_valid(prompt_B, response_BR).float().mean()),
            "kl": float(divergence_B.mean()),
            "kl_error": float(divergence_B.std() / len(divergence_B) ** 0.5),
            **self._of_pairs(policy),
        }

    def _of_pairs(self, policy: Any) -> dict[str, float]:
        logp = [pair_logp(policy, pairs, 2) for pairs in (self._world.training, self._world.held_out)]
        ratios = [own_P2 - reference_P2 for own_P2, reference_P2 in zip(logp, self._reference_logp, strict=True)]
        accuracy, held_out_accuracy = (
            float((ratio_P2[:, CHOSEN] > ratio_P2[:, REJECTED]).float().mean()) for ratio_P2 in ratios
        )
        return {
            "chosen_logp": float(logp[0][:, CHOSEN].mean()),
            "rejected_logp": float(logp[0][:, REJECTED].mean()),
            "accuracy": accuracy,
            "held_out_accuracy": held_out_accuracy,
            "held_out_chosen_logp": float(logp[1][:, CHOSEN].mean()),
        }

    def _samples(self, policy: Any, step: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
        config, chance = self._config, torch.Generator().manual_seed(self._seed * 1_000_003 + 2 * step + number)
        prompt_B = gold_task.draw_prompts(config.num_samples, config.num_prompts, chance)
        return prompt_B, *sample(policy, prompt_B[:, None], RESPONSE_TOKENS, chance)
