"""Mirror descent: golden values, extremes, and what optimism buys (spec/methods.md 15)."""

from __future__ import annotations

import numpy as np
import pytest

from mixwright.data_mixing.mirror_descent import exponentiated, step_size, surprise
from tests.data_mixing.online_cases import GOLDEN


def test_golden_step_of_optimistic_mirror_descent() -> None:
    golden = GOLDEN["oomd"]
    played = exponentiated(golden["p_hat"], -np.array(golden["hint"]), golden["eta"])
    assert played.tolist() == pytest.approx(golden["p"], abs=1e-9)
    anchor = exponentiated(golden["p_hat"], -np.array(golden["grad"]), golden["eta"])
    assert anchor.tolist() == pytest.approx(golden["p_hat_next"], abs=1e-9)


def test_no_score_overflows_and_nothing_comes_back_from_zero() -> None:
    assert exponentiated([0.5, 0.5, 0.0], [1e300, 0.0, 1e308], 1.0).tolist() == [1.0, 0.0, 0.0]
    assert exponentiated([0.5, 0.5], [-1e300, -1e300], 1.0).tolist() == [0.5, 0.5]


def test_a_constant_in_all_scores_changes_nothing() -> None:
    assert exponentiated([0.2, 0.8], [1.0, 2.0], 0.7) == pytest.approx(exponentiated([0.2, 0.8], [101.0, 102.0], 0.7))


def test_the_step_shrinks_with_what_hints_missed() -> None:
    assert step_size(4, 0.0, bound=1.0, delta=1.0) == pytest.approx((np.log(4) / 5) ** 0.5)
    assert step_size(4, 95.0, bound=1.0, delta=1.0) == pytest.approx((np.log(4) / 100) ** 0.5)
    assert surprise([1.0, -3.0], [0.0, 1.0]) == 16.0


def regret(loss_TK: np.ndarray, optimistic: bool) -> float:
    """Loss of the player beyond that of the best fixed choice."""
    num_arms = loss_TK.shape[1]
    anchor_K, hint_K, variation, paid = np.full(num_arms, 1 / num_arms), np.zeros(num_arms), 0.0, 0.0
    for loss_K in loss_TK:
        eta = step_size(num_arms, variation)
        paid += float(exponentiated(anchor_K, -hint_K, eta) @ loss_K)
        variation += surprise(loss_K, hint_K)
        anchor_K = exponentiated(anchor_K, -loss_K, eta)
        hint_K = loss_K if optimistic else hint_K
    return paid - float(loss_TK.sum(axis=0).min())


@pytest.mark.parametrize("seed", range(5))
def test_optimism_has_less_regret_on_drifting_losses(seed: int) -> None:
    draw = np.random.default_rng(seed)
    phase_K = draw.uniform(0, 2 * np.pi, 5)
    loss_TK = np.sin(2 * np.pi * np.arange(400)[:, None] / 200 + phase_K) + draw.normal(0, 0.05, (400, 5))
    assert regret(loss_TK, optimistic=True) <= regret(loss_TK, optimistic=False)


def test_on_independent_noise_optimism_is_no_great_loss() -> None:
    draws = [np.random.default_rng(seed).normal(0, 1, (400, 5)) for seed in range(20)]
    hopeful, plain = (np.mean([regret(loss_TK, optimistic) for loss_TK in draws]) for optimistic in (True, False))
    assert hopeful <= 1.5 * plain
