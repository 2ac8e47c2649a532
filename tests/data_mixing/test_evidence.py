"""What losses say about arms: the paper's solve on what was really read, and the regression over all intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mixwright.data_mixing.apportion import Apportionment, integer_proportions
from mixwright.data_mixing.evidence import Evidence, Observations, observe, solve_gains
from mixwright.data_mixing.permutation import permute
from tests.data_mixing.online_cases import GOLDEN, Floats, interval, sweep, window

GAINS = np.array([[0.30, 0.10, 0.05], [0.08, 0.25, -0.02], [0.02, 0.04, 0.40]])


def centred(gain_KK: Floats) -> Floats:
    return gain_KK - gain_KK.mean(axis=1, keepdims=True)


def one_hots(num_arms: int, share: float) -> Floats:
    rest = (1 - share) / (num_arms - 1)
    return np.full((num_arms, num_arms), rest) + np.eye(num_arms) * (share - rest)


def seen_of(intervals: list[Any], **more: Any) -> Observations:
    return observe(window(intervals, **more))


def test_golden_solve() -> None:
    golden = GOLDEN["aioli"]
    beta_NK = np.array(golden["beta"]).T
    assert solve_gains(np.array(golden["P"]), beta_NK) == pytest.approx(np.array(golden["A_hat"]), abs=1e-9)


def test_the_solve_finds_the_gains_up_to_what_all_mixtures_share() -> None:
    seen = seen_of(sweep(GAINS, 100 * np.tile(one_hots(3, 0.5), (2, 1)), drift=0.07))
    found = solve_gains(seen.share_NK, seen.drop_NK)
    assert found is not None
    assert found == pytest.approx(GAINS + 0.07, abs=1e-12)
    assert centred(found) == pytest.approx(centred(GAINS), abs=1e-12)


def plan_rows(nominal_NK: Floats, rows: int) -> Floats:
    """Rows of each stretch as the plan apportions them."""
    credits, counted = np.zeros(nominal_NK.shape[1], dtype=np.int64), []
    for share_K in nominal_NK:
        apportionment = Apportionment(integer_proportions(share_K), credits)
        counted.append(apportionment.counts(rows))
        credits = apportionment.carried(rows, counted[-1])
    return np.array(counted, dtype=np.float64)


def released_rows(nominal_NK: Floats, rows: int) -> Floats:
    """Rows of a batch as the released sampler draws them: at least one of each, the last domain gets what is left."""
    count_NK = np.maximum(1, np.floor(nominal_NK * rows + 1e-9))
    count_NK[:, -1] = np.maximum(0, rows - count_NK[:, :-1].sum(axis=1))
    return count_NK


@pytest.mark.parametrize("sampler", [plan_rows, released_rows])
def test_realised_counts_are_unbiased_where_nominal_ones_are_not(sampler: Any) -> None:
    gains = np.random.default_rng(0).uniform(-0.1, 0.4, (7, 7))
    nominal_NK = one_hots(7, 0.75)
    seen = seen_of(sweep(gains, sampler(nominal_NK, 8)))
    if np.linalg.matrix_rank(seen.share_NK) < 7:
        pytest.skip("this sampler's batches do not span the arms")
    realised, nominal = (solve_gains(share_NK, seen.drop_NK) for share_NK in (seen.share_NK, nominal_NK))
    assert realised is not None
    assert nominal is not None
    assert np.abs(realised - gains).max() < 1e-9
    assert np.abs(centred(nominal) - centred(gains)).max() > 0.02


def test_realised_shares_average_to_the_nominal_ones_over_perturbations_of_ten_steps() -> None:
    nominal_KK = one_hots(7, 0.75)
    order = np.concatenate([permute(np.arange(7), 7, repetition) for repetition in range(50)])
    realised_NK = plan_rows(nominal_KK[order], 80) / 80
    for arm in range(7):
        assert realised_NK[order == arm].mean(axis=0) == pytest.approx(nominal_KK[arm], abs=0.005)
    assert np.abs(realised_NK - nominal_KK[order]).max() < 3 / 80
    assert np.abs(released_rows(nominal_KK, 8)[6] / 8 - nominal_KK[6]).max() > 0.2


def test_too_few_different_mixtures_determine_nothing() -> None:
    seen = seen_of(sweep(GAINS, [[10, 5, 5], [10, 5, 5], [5, 10, 5]]))
    assert solve_gains(seen.share_NK, seen.drop_NK) is None
    assert Evidence.none(3, seen.unit).updated(seen, 1.0).gains(0.5) is None


def test_an_interval_without_a_finite_loss_is_left_out() -> None:
    intervals = sweep(GAINS, 100 * one_hots(3, 0.5))
    broken = interval(30, 10, [100, 0, 0], [np.nan, 1, 1], [1, 1, 1], is_perturbation=True)
    empty = interval(40, 10, [0, 0, 0], [1, 1, 1], [1, 1, 1], is_perturbation=True)
    seen = seen_of([*intervals, broken, empty])
    assert (len(seen), seen.num_skipped) == (3, 2)
    assert np.isfinite(seen.share_NK).all()


def test_an_arm_that_is_never_validated_counts_with_nothing() -> None:
    intervals = [
        interval(0, 5, [5, 5], [4.0, np.nan], [3.0, np.nan]),
        interval(5, 5, [9, 1], [3.0, np.nan], [2.5, np.nan]),
    ]
    seen = seen_of(intervals)
    assert seen.target_K.tolist() == [1.0, 0.0]
    assert seen.drop_N.tolist() == [1.0, 0.5]


def test_target_weights_say_whose_loss_counts() -> None:
    seen = seen_of(sweep(GAINS, 100 * one_hots(3, 0.5)), target=(0.0, 0.25, 0.75))
    assert seen.drop_N == pytest.approx(seen.drop_NK[:, 1] / 4 + seen.drop_NK[:, 2] * 3 / 4)


def test_the_objective_perplexity_falls_as_the_mean_perplexity_falls() -> None:
    before, fall = np.array([4.0, 3.0, 2.0]), np.array([3e-6, -2e-6, 1e-6])
    seen = observe(window([interval(0, 4, [5, 5, 5], before, before - fall)]), "perplexity")
    perplexity, perplexity_before = np.exp(before - fall).mean(), np.exp(before).mean()
    assert seen.drop_N[0] == pytest.approx((perplexity_before - perplexity) / perplexity_before, rel=1e-5)
    assert seen_of([interval(0, 4, [5, 5, 5], before, before - fall)]).drop_N[0] == pytest.approx(fall.mean())


def evidence_of(gains: Floats, noise: float, drift: float, num_windows: int = 4, seed: int = 0) -> Evidence:
    draw, evidence = np.random.default_rng(seed), None
    for place in range(num_windows):
        loss_K, found = np.full(len(gains), 5.0), []
        mixtures = np.concatenate(
            [np.full((1, len(gains)), 1 / len(gains)), np.tile(one_hots(len(gains), 0.7), (2, 1))]
        )
        step = 1000 * place
        for steps, share_K in zip([40, *[4] * (2 * len(gains))], mixtures, strict=True):
            fall_K = steps * (gains @ share_K) / 100 + drift * steps * (1 - 0.005 * (step % 1000 + steps / 2))
            after_K = loss_K - fall_K + draw.normal(0, noise, len(gains))
            found.append(interval(step, steps, 1000 * share_K, loss_K, after_K, learning_rate=2e-3))
            loss_K, step = after_K, step + steps
        seen = seen_of(found)
        evidence = (evidence or Evidence.none(len(gains), seen.unit)).updated(seen, 0.9)
    assert evidence is not None
    return evidence


def test_the_regression_finds_gains_under_a_drift_that_all_mixtures_share() -> None:
    posterior = evidence_of(GAINS, noise=0.0, drift=0.01).gains(0.5)
    assert posterior is not None
    expected_K = GAINS.mean(axis=0) / 100 / 2e-3
    assert posterior.estimate_K == pytest.approx(expected_K - expected_K.mean(), rel=1e-6)
    assert posterior.mean_K == pytest.approx(posterior.estimate_K, rel=1e-3)


def test_a_gain_that_hurts_keeps_its_sign() -> None:
    gains = np.array([[0.4, -0.5], [0.2, -0.3]])
    posterior = evidence_of(gains, noise=1e-6, drift=0.01).gains(0.5)
    assert posterior is not None
    assert posterior.mean_K[0] > 0 > posterior.mean_K[1]


def test_noise_shrinks_gains_and_more_of_it_shrinks_them_more() -> None:
    sizes = []
    for noise in (1e-5, 0.01, 0.1):
        posterior = evidence_of(GAINS, noise, drift=0.001).gains(0.2)
        assert posterior is not None
        sizes.append(np.abs(posterior.mean_K).max() / posterior.rate)
    assert sizes[2] < sizes[1] < sizes[0]
    assert sizes[2] < 0.05


def test_standard_errors_cover_the_truth_about_as_often_as_they_should() -> None:
    expected_K = (GAINS.mean(axis=0) - GAINS.mean()) / 100 / 2e-3
    scores = []
    for seed in range(60):
        posterior = evidence_of(GAINS, 0.003, 0.002, seed=seed).gains(50.0)
        assert posterior is not None
        scores.append((posterior.mean_K - expected_K) / posterior.error_K)
    assert 0.6 < float(np.std(scores)) < 1.6


def test_evidence_survives_the_journal_bit_by_bit() -> None:
    evidence = evidence_of(GAINS, 0.01, 0.01)
    again = Evidence.from_state(evidence.state())
    assert again.state() == evidence.state()
