"""The tabular bandit of overoptimisation: a known gold reward, and preferences that cover few of the actions.

Every prompt has some actions that the behaviour policy takes, mostly good ones, and others that it hardly ever takes,
mostly bad ones. Preferences are Bradley-Terry by the gold reward. The policy is a table of logits, the reference is
uniform, training is gradient descent on all pairs at once in float64; so gold reward, KL divergence and the probability
of uncovered actions are exact (spec/posttraining.md 2.4a).

X prompts, A actions, P pairs, C completions (each is one action).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mixwright.data_mixing.config_file import StrictModel
from mixwright.pretrain.config import Positive, Share
from mixwright.pretrain.rpo.groups import CHOSEN, REJECTED, CompletionLogProbs
from mixwright.pretrain.rpo.objective import Objective, StepScope
from mixwright.pretrain.rpo.trial import CurvePoint, Trial, log_steps


class BanditConfig(StrictModel):
    """The world, and how the table is trained. Rewards are normal; the pair is mean and standard deviation."""

    num_prompts: Positive = 50
    num_actions: Positive = 20
    num_covered: Positive = 6
    covered_reward: tuple[float, float] = (1.0, 0.75)
    uncovered_reward: tuple[float, float] = (-1.0, 1.5)
    uncovered_share: Share = 0.02
    num_pairs: Positive = 4000
    lr: float = Field(default=500.0, gt=0)
    num_steps: Positive = 20_000
    num_points: int = Field(default=40, ge=2)

    @model_validator(mode="after")
    def _some_are_uncovered(self) -> BanditConfig:
        if self.num_covered >= self.num_actions:
            raise ValueError(f"num_covered must be below num_actions = {self.num_actions}, found {self.num_covered}")
        return self


class BanditTrial(Trial):
    """One objective in one bandit."""

    kind: Literal["bandit"] = "bandit"
    world: BanditConfig = BanditConfig()


@dataclass(frozen=True)
class Bandit:
    """Rewards float64 [X, A], probabilities of the behaviour [A] alike for all prompts, pairs as prompt and actions.

    `action_P3` are chosen, rejected and one draw of the uniform reference. The first actions are the covered ones.
    """

    reward_XA: Tensor
    behaviour_A: Tensor
    is_covered_A: Tensor
    prompt_P: Tensor
    action_P3: Tensor


def draw_bandit(config: BanditConfig, seed: int) -> Bandit:
    """The bandit of a seed."""
    chance = torch.Generator().manual_seed(seed)
    shape = (config.num_prompts, config.num_actions)
    is_covered_A = torch.arange(config.num_actions) < config.num_covered
    good, bad = config.covered_reward, config.uncovered_reward
    mean_A, spread_A = (
        torch.where(is_covered_A, inside, outside).double() for inside, outside in zip(good, bad, strict=True)
    )
    reward_XA = mean_A + spread_A * torch.randn(shape, generator=chance, dtype=torch.float64)
    num_uncovered = config.num_actions - config.num_covered
    behaviour_A = torch.where(
        is_covered_A, (1 - config.uncovered_share) / config.num_covered, config.uncovered_share / num_uncovered
    ).double()
    prompt_P = torch.randint(config.num_prompts, (config.num_pairs,), generator=chance)
    two_P2 = torch.multinomial(behaviour_A.expand(config.num_pairs, -1), 2, generator=chance)
    reward_P2 = reward_XA[prompt_P[:, None], two_P2]
    is_first_better_P = bradley_terry(reward_P2, 1.0, chance)
    pair_P2 = torch.where(is_first_better_P[:, None], two_P2, two_P2.flip(1))
    base_P1 = torch.randint(config.num_actions, (config.num_pairs, 1), generator=chance)
    return Bandit(reward_XA, behaviour_A, is_covered_A, prompt_P, torch.cat([pair_P2, base_P1], dim=1))


def bradley_terry(reward_P2: Tensor, scale: float, chance: torch.Generator) -> Tensor:
    """Whether the first of two is preferred, bool [P]: drawn with probability sigmoid(scale * difference)."""
    probability_P = torch.sigmoid(scale * (reward_P2[:, 0] - reward_P2[:, 1]))
    return torch.rand(len(reward_P2), generator=chance, dtype=torch.float64) < probability_P


def run_bandit(trial: BanditTrial) -> tuple[CurvePoint, ...]:
    """Train the table of logits; figures at steps that are evenly spaced in the logarithm."""
    config, objective = trial.world, Objective(trial.objective)
    bandit = draw_bandit(config, trial.seed)
    logits_XA = torch.zeros_like(bandit.reward_XA, requires_grad=True)
    action_PC = bandit.action_P3[:, : objective.num_completions]
    place_PC = bandit.prompt_P[:, None] * config.num_actions + action_PC
    reference_P2 = torch.full((config.num_pairs, 2), -math.log(config.num_actions), dtype=torch.float64)
    length_PC = torch.ones_like(place_PC, dtype=torch.float64)
    scope = StepScope(config.num_pairs, config.num_pairs)
    measured, points = set(log_steps(config.num_steps, config.num_points)), []
    for step in range(config.num_steps):
        logp_XA = logits_XA.log_softmax(dim=1)
        if step in measured:
            points.append(CurvePoint(step=step, figures=measure(logp_XA.detach(), bandit)))
        found = CompletionLogProbs(logp_XA.view(-1)[place_PC], length_PC)
        loss, _ = objective(found, reference_P2, scope)
        (slope_XA,) = torch.autograd.grad(loss, logits_XA)
        logits_XA.data.sub_(slope_XA, alpha=config.lr)
    last = measure(logits_XA.detach().log_softmax(dim=1), bandit)
    return (*points, CurvePoint(step=config.num_steps, figures=last))


def measure(logp_XA: Tensor, bandit: Bandit) -> dict[str, float]:
    """Exact figures of a policy; means over prompts, of log-probabilities and accuracy over training pairs."""
    p_XA = logp_XA.exp()
    logp_P3 = logp_XA[bandit.prompt_P[:, None], bandit.action_P3]
    chosen_P, rejected_P = logp_P3[:, CHOSEN], logp_P3[:, REJECTED]
    divergence_X = (p_XA * logp_XA).sum(dim=1) + math.log(p_XA.shape[1])
    return {
        "reward": float((p_XA * bandit.reward_XA).sum(dim=1).mean()),
        "kl": float(divergence_X.mean().clamp(min=0)),
        "uncovered": float(p_XA[:, ~bandit.is_covered_A].sum(dim=1).mean()),
        "chosen_logp": float(chosen_P.mean()),
        "rejected_logp": float(rejected_P.mean()),
        "accuracy": float((chosen_P > rejected_P).double().mean()),
    }


def landmarks(bandit: Bandit) -> dict[str, float]:
    """Rewards that the curves are to be read against: of the reference, the behaviour, and the best policies."""
    reward_XA = bandit.reward_XA
    return {
        "of the reference": float(reward_XA.mean()),
        "of the behaviour": float((reward_XA * bandit.behaviour_A).sum(dim=1).mean()),
        "of the best covered actions": float(reward_XA[:, bandit.is_covered_A].amax(dim=1).mean()),
        "of the best actions": float(reward_XA.amax(dim=1).mean()),
    }
