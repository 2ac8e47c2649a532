"""Laws of losses: recovered from known ones, intervals, predictions, what a loss is worth in text."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mixwright.pretrain.ensemble.curve import EnsembleEvaluation
from mixwright.pretrain.ensemble.scaling import PowerLaw, data_multiple, fit_power, member_law, predict_last
from mixwright.pretrain.errors import EnsembleError


def evaluation_of(num_members: int, law: PowerLaw, noise: float = 0.0, rows: int = 200) -> EnsembleEvaluation:
    """Subsets whose losses follow a law in their size, with rows of different difficulty."""
    chance = np.random.default_rng(0)
    subsets = [s for k in range(1, num_members + 1) for s in itertools.combinations(range(num_members), k)]
    difficulty_R = chance.normal(0, 1, rows)
    own_K = chance.normal(0, noise, num_members)
    losses = [law(len(s)) + difficulty_R - difficulty_R.mean() + own_K[list(s)].mean() for s in subsets]
    return EnsembleEvaluation(
        members=tuple(f"m{i}" for i in range(num_members)), fingerprints=("",) * num_members, num_parameters=1000,
        pooling="logits", store_fingerprint="", tokens_per_row=128, domains=("d",),
        domain_R=np.zeros(rows, dtype=np.int64), subsets=tuple(subsets), temperature_S=np.ones(len(subsets)),
        plain_SR=np.stack(losses), fitted_SR=np.stack(losses),
    )  # fmt: skip


def known(floor: float, scale: float, exponent: float) -> PowerLaw:
    return PowerLaw(floor, scale, exponent, 0.0, 5, 5.0)


@pytest.mark.parametrize("exponent", [0.3, 0.7, 1.0, 1.6, 3.0])
@pytest.mark.parametrize("floor", [0.0, 2.9])
def test_a_law_is_recovered_from_its_own_losses(floor: float, exponent: float) -> None:
    law = known(floor, 1.1, exponent)
    found = fit_power([1, 2, 3, 4, 5], [law(k) for k in (1, 2, 3, 4, 5)])
    assert found.exponent == pytest.approx(exponent, rel=2e-3)
    assert found.floor == pytest.approx(floor, abs=5e-3)
    assert found.scale == pytest.approx(1.1, rel=5e-3)
    assert found.residual < 1e-4


def test_the_published_law_over_parameters_is_recovered() -> None:
    """Golden values of 3.43 + 0.05 / N^1.02, N in billions (spec/golden_vectors.json, infinite_compute_fit)."""
    points = {0.15: 3.77622380112287, 0.3: 3.6007286178706894, 0.6: 3.5141890732685117, 1.4: 3.465474755259827}
    found = fit_power(list(points), list(points.values()))
    assert (found.floor, found.scale, found.exponent) == pytest.approx((3.43, 0.05, 1.02), rel=1e-3)


def test_the_fit_loses_no_more_than_any_law_of_a_fine_grid() -> None:
    chance = np.random.default_rng(1)
    x = np.array([1.0, 2, 3, 4, 5])
    loss = 3 + 0.8 / x**0.9 + chance.normal(0, 0.02, 5)
    found = fit_power(x.tolist(), loss.tolist())
    square = sum((found(k) - y) ** 2 for k, y in zip(x, loss, strict=True))
    for floor in np.linspace(2.5, 3.5, 41):
        for scale in np.linspace(0.3, 1.5, 25):
            for exponent in np.linspace(0.3, 3, 28):
                assert square <= np.square(floor + scale / x**exponent - loss).sum() + 1e-9


def test_rising_losses_have_no_gain_and_negative_floors_are_held_at_zero() -> None:
    assert fit_power([1, 2, 3, 4], [3.0, 3.1, 3.2, 3.3]).scale == 0.0
    found = fit_power([1, 2, 3, 4], [1.0, 0.5, 0.3, 0.2])
    assert found.floor == 0.0
    assert found.scale > 0


@pytest.mark.parametrize("xs", [[1.0, 2.0], [1.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
def test_too_few_points_are_refused(xs: list[float]) -> None:
    with pytest.raises(EnsembleError, match="three or more different positive x"):
        fit_power(xs, [1.0] * len(xs))


def test_three_points_are_called_thin() -> None:
    assert fit_power([1, 2, 3], [3.0, 2.5, 2.4]).is_thin
    assert not fit_power([1, 2, 3, 4], [3.0, 2.5, 2.4, 2.3]).is_thin


def test_intervals_contain_the_law_and_leaving_a_member_out_widens_with_their_differences() -> None:
    law = known(2.9, 0.6, 1.0)
    alike, unlike = evaluation_of(5, law), evaluation_of(5, law, noise=0.05)
    found = member_law(alike, fitted=False)
    assert found.exponent.low <= 1.0 + 1e-3
    assert found.exponent.high >= 1.0 - 1e-3
    assert found.floor.low < 2.9 < found.floor.high
    assert found.exponent_without_one is not None
    other = member_law(unlike, fitted=False).floor_without_one
    assert other is not None
    assert found.floor_without_one is not None
    assert other.high - other.low > 10 * (found.floor_without_one.high - found.floor_without_one.low)


def test_the_last_member_is_predicted_from_the_others_alone() -> None:
    law = known(2.9, 0.6, 1.0)
    found = predict_last(evaluation_of(5, law), fitted=False)
    assert found.k == 5
    assert found.error == pytest.approx(0, abs=1e-3)
    # Losses of subsets with the last member must not matter.
    spoilt = evaluation_of(5, law)
    for number, subset in enumerate(spoilt.subsets):
        if 4 in subset and len(subset) < 5:
            spoilt.plain_SR[number] += 1
    assert predict_last(spoilt, fitted=False).predicted == pytest.approx(found.predicted, abs=1e-9)
    with pytest.raises(EnsembleError, match="three members to fit and one to predict, found 3"):
        predict_last(evaluation_of(3, law), fitted=False)


def test_a_loss_is_worth_the_text_that_the_standard_recipe_needs_for_it() -> None:
    standard = PowerLaw(2.0, 40.0, 0.25, 0.0, 4, largest=1e6)
    worth = data_multiple(standard, standard(5e5), tokens=1e5)
    assert worth.multiple == pytest.approx(5.0)
    assert not worth.extrapolates
    assert data_multiple(standard, standard(2e6), tokens=1e5).extrapolates
    assert data_multiple(standard, 1.9, tokens=1e5).multiple == math.inf
