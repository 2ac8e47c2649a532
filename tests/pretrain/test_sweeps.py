"""Designs, laws and regressions recover what made their data."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mixwright.pretrain.sweeps import design, doge, mixing_law, regression
from mixwright.pretrain.sweeps.mixing_law import MixingLaw


def a_law(seed: int, num_arms: int) -> MixingLaw:
    chance = np.random.default_rng(seed)
    slope = -chance.uniform(0, 0.3, (num_arms, num_arms)) - np.diag(chance.uniform(0.5, 2.0, num_arms))
    return MixingLaw(chance.uniform(1, 4, num_arms), slope)


def grid(num_arms: int, parts: int) -> np.ndarray:
    """Every mixture in multiples of 1 / parts."""
    points = [p for p in itertools.product(range(parts + 1), repeat=num_arms) if sum(p) == parts]
    return np.array(points) / parts


@pytest.mark.parametrize("num_arms", [2, 3, 6])
def test_a_law_without_noise_is_found_again(num_arms: int) -> None:
    law = a_law(num_arms, num_arms)
    share_NK = design.spread_points(2 * num_arms + 2, num_arms, seed=1)
    fitted = mixing_law.fit_law(share_NK, law.predict(share_NK))
    elsewhere = np.random.default_rng(9).dirichlet(np.ones(num_arms), 50)
    np.testing.assert_allclose(fitted.predict(elsewhere), law.predict(elsewhere), atol=1e-5)
    assert np.abs(mixing_law.leave_one_out(share_NK, law.predict(share_NK))).max() < 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_the_predicted_optimum_is_close_to_the_true_one_under_noise(seed: int) -> None:
    law, target = a_law(seed, 3), np.array([0.5, 0.3, 0.2])
    share_NK = design.spread_points(12, 3, seed)
    noise = 0.003 * np.random.default_rng(seed).standard_normal((12, 3))
    found = mixing_law.best_mixture(mixing_law.fit_law(share_NK, law.predict(share_NK) + noise), target)
    losses = law.predict(grid(3, 60)) @ target
    uniform = law.predict([1 / 3] * 3) @ target
    assert law.predict(found) @ target - losses.min() < 0.1 * (uniform - losses.min()) + 1e-3


@pytest.mark.parametrize(("seed", "floor"), [(0, 0.0), (1, 0.0), (2, 0.05), (3, 0.05)])
def test_the_best_mixture_is_that_of_a_fine_grid(seed: int, floor: float) -> None:
    law, target = a_law(seed, 3), np.ones(3) / 3
    best = mixing_law.best_mixture(law, target, floor)
    points = grid(3, 100)
    points = points[(points >= floor - 1e-9).all(axis=1)]
    nearest = points[(law.predict(points) @ target).argmin()]
    assert best.sum() == pytest.approx(1)
    assert best.min() >= floor - 1e-12
    np.testing.assert_allclose(best, nearest, atol=0.015)


def test_one_wild_run_hardly_moves_the_law() -> None:
    law, share_NK = a_law(5, 3), design.spread_points(14, 3, seed=2)
    loss_NG = law.predict(share_NK)
    loss_NG[4] += 1.0
    fitted = mixing_law.fit_law(share_NK, loss_NG)
    others = np.arange(14) != 4
    assert np.abs(fitted.predict(share_NK) - law.predict(share_NK))[others].max() < 0.05


def test_too_few_runs_for_a_law_are_refused() -> None:
    with pytest.raises(ValueError, match="3 runs; a law of 3 arms needs 4"):
        mixing_law.fit_law(np.eye(3), np.ones((3, 3)))
    assert np.isnan(mixing_law.leave_one_out(design.spread_points(4, 3, 0), np.ones((4, 3)))).all()


@pytest.mark.parametrize(("num_points", "num_arms"), [(6, 2), (9, 3), (14, 6)])
def test_a_design_covers_the_simplex(num_points: int, num_arms: int) -> None:
    point_NK = design.spread_points(num_points, num_arms, seed=3)
    assert point_NK.shape == (num_points, num_arms)
    np.testing.assert_allclose(point_NK.sum(axis=1), 1)
    chance = np.random.default_rng(0).dirichlet(np.full(num_arms, 1.5), (200, num_points))
    assert closest(point_NK) > np.mean([closest(points) for points in chance]) * 1.5
    np.testing.assert_array_equal(point_NK, design.spread_points(num_points, num_arms, seed=3))


def closest(point_NK: np.ndarray) -> float:
    return min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(point_NK, 2))


def test_scattered_points_lie_on_the_simplex_from_its_middle_to_its_corners() -> None:
    point_NK = design.scattered_points(60, np.full(4, 0.25), seed=0)
    np.testing.assert_allclose(point_NK.sum(axis=1), 1)
    assert point_NK.min() >= 0
    assert point_NK.max() > 0.9
    assert point_NK.max(axis=1).min() < 0.5


@pytest.mark.parametrize("num_arms", [3, 5])
def test_a_ridge_ranks_unseen_mixtures_of_a_synthetic_law(num_arms: int) -> None:
    law, chance = a_law(num_arms, num_arms), np.random.default_rng(1)
    share_NK = design.scattered_points(64, np.full(num_arms, 1 / num_arms), seed=4)
    loss_N = law.predict(share_NK).mean(axis=1) + 0.002 * chance.standard_normal(64)
    model = regression.fit_ridge(share_NK, loss_N)
    unseen = chance.dirichlet(np.ones(num_arms), 200)
    assert regression.spearman(model.predict(unseen), law.predict(unseen).mean(axis=1)) >= 0.95
    best = regression.best_simulated(model, np.full(num_arms, 1 / num_arms), 20_000, 64, seed=0)
    optimum = mixing_law.best_mixture(law, np.full(num_arms, 1 / num_arms))
    gain = [float(law.predict(p).mean()) for p in (np.full(num_arms, 1 / num_arms), best, optimum)]
    assert gain[0] - gain[1] > 0.7 * (gain[0] - gain[2])


def test_left_out_predictions_of_the_ridge_are_those_of_fits_without_the_run() -> None:
    chance = np.random.default_rng(3)
    share_NK = chance.dirichlet(np.ones(3), 20)
    loss_N = a_law(1, 3).predict(share_NK).mean(axis=1) + 0.05 * chance.standard_normal(20)
    feature_NF = regression.features(share_NK)
    standard_NF = (feature_NF - feature_NF.mean(axis=0)) / feature_NF.std(axis=0)
    left, singular, _ = np.linalg.svd(standard_NF, full_matrices=False)
    found = regression._left_out_error(left, singular, loss_N - loss_N.mean(), 0.3)
    for run in range(20):
        others = np.arange(20) != run
        x_NF = standard_NF[others] - standard_NF[others].mean(axis=0)
        y_N = loss_N[others] - loss_N[others].mean()
        coefficient_F = np.linalg.solve(x_NF.T @ x_NF + 0.3 * np.eye(x_NF.shape[1]), x_NF.T @ y_N)
        predicted = loss_N[others].mean() + (standard_NF[run] - standard_NF[others].mean(axis=0)) @ coefficient_F
        # Closed forms hold for one design matrix; without the run its own columns are centred anew, to second order.
        assert found[run] == pytest.approx(loss_N[run] - predicted, abs=0.02)


def test_rank_correlation() -> None:
    assert regression.spearman(np.array([1.0, 5.0, 9.0]), np.array([2.0, 3.0, 100.0])) == pytest.approx(1)
    assert regression.spearman(np.array([1.0, 5.0, 9.0]), np.array([3.0, 2.0, 1.0])) == pytest.approx(-1)


def test_doge_scores_are_gradient_agreement_over_mean_norm_within_bounds() -> None:
    gradient_GP = torch.tensor([[3.0, 4.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    target_P = torch.tensor([1.0, 0.5], dtype=torch.float64)
    mean_norm = (5 + 1 + 1 + 0) / 4 + 1e-6
    expected = [0.1 * 5 / mean_norm, 0.1 * 0.5 / mean_norm, 0.0, 0.0]
    assert doge.scores(gradient_GP, target_P, 0.1).tolist() == pytest.approx(expected)
    assert doge.scores(1e6 * gradient_GP[:1], 1e6 * target_P, 0.1).tolist() == pytest.approx([0.5])


def test_doge_weights_are_multiplied_and_normalised() -> None:
    updated = doge.updated(np.array([0.25, 0.75]), np.array([0.02, 0.0]), mu=0.01)
    expected = np.array([0.25 * np.exp(2), 0.75])
    np.testing.assert_allclose(updated, expected / expected.sum())
    assert np.isfinite(doge.updated(np.array([0.5, 0.5]), np.array([50.0, 0.0]), mu=0.01)).all()


def test_a_gradient_is_clipped_to_norm_one_and_a_short_one_stays() -> None:
    assert doge.clipped(torch.tensor([3.0, 4.0])).tolist() == pytest.approx([0.6, 0.8])
    assert doge.clipped(torch.tensor([0.3, 0.4])).tolist() == pytest.approx([0.3, 0.4])
