"""The tabular bandit: its world, its gradient steps against a formula written out, and what the regulariser does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mixwright.pretrain.rpo.bandit import (
    BanditConfig,
    BanditTrial,
    bradley_terry,
    draw_bandit,
    landmarks,
    measure,
    run_bandit,
)
from mixwright.pretrain.rpo.config import ObjectiveConfig

SMALL = BanditConfig(num_prompts=10, num_pairs=400, num_steps=1000, lr=200.0, num_points=8)


def objective(**settings: Any) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate({"beta": 0.1, **settings})


def swept(eta: float) -> ObjectiveConfig:
    return objective(sft={"regulariser": "cumulative", "eta": eta})


def test_the_world_is_what_its_configuration_says() -> None:
    config = BanditConfig(num_prompts=2000, num_pairs=20_000)
    bandit = draw_bandit(config, seed=1)
    covered_XA, uncovered_XA = bandit.reward_XA[:, :6], bandit.reward_XA[:, 6:]
    assert covered_XA.mean().item() == pytest.approx(1.0, abs=0.03)
    assert covered_XA.std().item() == pytest.approx(0.75, abs=0.03)
    assert uncovered_XA.mean().item() == pytest.approx(-1.0, abs=0.03)
    assert uncovered_XA.std().item() == pytest.approx(1.5, abs=0.03)
    assert bandit.behaviour_A.sum().item() == pytest.approx(1.0)
    pair_P2 = bandit.action_P3[:, :2]
    assert (pair_P2[:, 0] != pair_P2[:, 1]).all()
    assert (pair_P2 >= 6).double().mean().item() == pytest.approx(0.02, abs=0.006)
    assert (bandit.action_P3[:, 2] >= 6).double().mean().item() == pytest.approx(0.7, abs=0.02)


def test_preferences_are_bradley_terry() -> None:
    reward_P2 = torch.tensor([[1.0, 0.5]], dtype=torch.float64).expand(20_000, 2)
    share = bradley_terry(reward_P2, 3.0, torch.Generator().manual_seed(0)).double().mean().item()
    assert share == pytest.approx(1 / (1 + math.exp(-1.5)), abs=0.01)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_a_step_is_that_of_the_formula(eta: float) -> None:
    config = BanditConfig(num_prompts=3, num_actions=4, num_covered=2, num_pairs=7, num_steps=1, lr=50.0, num_points=2)
    bandit = draw_bandit(config, seed=3)
    slope_XA = torch.zeros(3, 4, dtype=torch.float64)
    for prompt, (chosen, rejected, _) in zip(bandit.prompt_P.tolist(), bandit.action_P3.tolist(), strict=True):
        # At the reference the margin is 0: d softplus(-m) / dm = -1/2; the normaliser cancels in the margin.
        slope_XA[prompt, chosen] += -0.5 * 0.1
        slope_XA[prompt, rejected] += 0.5 * 0.1
        slope_XA[prompt] += eta * 0.1 / 4
        slope_XA[prompt, chosen] -= eta * 0.1
    expected = measure((-50.0 * slope_XA / 7).log_softmax(dim=1), bandit)
    found = run_bandit(BanditTrial(objective=swept(eta), seed=3, world=config))[-1].figures
    assert found == pytest.approx(expected, abs=1e-12)


def test_figures_of_the_reference_are_those_of_the_uniform_policy() -> None:
    trial = BanditTrial(objective=swept(0), seed=1, world=SMALL)
    first = run_bandit(trial)[0].figures
    marks = landmarks(draw_bandit(SMALL, 1))
    assert first["reward"] == pytest.approx(marks["of the reference"])
    assert first["kl"] == pytest.approx(0, abs=1e-12)
    assert first["uncovered"] == pytest.approx(14 / 20)
    assert first["chosen_logp"] == pytest.approx(-math.log(20))
    assert list(marks.values()) == sorted(marks.values())


def test_eta_keeps_probability_on_what_is_covered_and_eta_0_is_dpo() -> None:
    ends = {
        eta: run_bandit(BanditTrial(objective=swept(eta), seed=1, world=SMALL))[-1].figures for eta in (0.0, 0.05, 1.0)
    }
    dpo = run_bandit(BanditTrial(objective=objective(), seed=1, world=SMALL))[-1].figures
    assert ends[0.0] == dpo
    logp = [end["chosen_logp"] for end in ends.values()]
    assert logp == sorted(logp)
    assert ends[0.0]["uncovered"] > ends[0.05]["uncovered"] > ends[1.0]["uncovered"]


def test_samples_of_the_reference_hold_the_policy_near_it() -> None:
    base = {"regulariser": "cumulative", "eta": 1.0, "base": "reference"}
    near = run_bandit(BanditTrial(objective=objective(sft=base), seed=1, world=SMALL))[-1].figures
    chosen = run_bandit(BanditTrial(objective=swept(1.0), seed=1, world=SMALL))[-1].figures
    assert near["kl"] < chosen["kl"] / 2


def test_a_world_without_uncovered_actions_is_refused() -> None:
    with pytest.raises(ValidationError, match="num_covered must be below num_actions = 4, found 4"):
        BanditConfig(num_actions=4, num_covered=4)
