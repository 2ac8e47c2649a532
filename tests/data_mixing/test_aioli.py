"""Aioli: sweeps, the three variants' updates, and losses that tell nothing."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from mixwright.data_mixing.decide import perturbation_share
from mixwright.data_mixing.errors import PolicyRejected
from mixwright.data_mixing.mirror_descent import exponentiated
from mixwright.data_mixing.online import Proposal
from mixwright.data_mixing.policies.aioli import normalised_gains
from tests.data_mixing.online_cases import GOLDEN, Floats, interval, online, sweep, window

AIOLI = GOLDEN["aioli"]
MIXTURES = np.array(AIOLI["P"])
VARIANTS = ["paper", "released", "centred"]
WITHOUT_AVERAGE = {"variant": "released", "ema": None}


def propose(keys: dict[str, Any], intervals: list[Any], state: dict[str, Any] | None = None, **more: Any) -> Proposal:
    kind, document = online({"kind": "aioli", **keys})
    return kind.propose(document, window(intervals, **more), state or {})


def stretches(keys: dict[str, Any], shares: list[float], decision: int = 1, key: int = 7) -> Any:
    kind, document = online({"kind": "aioli", **keys})
    return kind.stretches(document, shares, decision, key)


def golden_sweep() -> list[Any]:
    return sweep(AIOLI["A_true"], 1000 * MIXTURES)


def test_golden_normalisation_and_updates() -> None:
    normal_KK = normalised_gains(np.array(AIOLI["A_hat"]))
    assert normal_KK is not None
    assert normal_KK == pytest.approx(np.array(AIOLI["A_norm"]), abs=1e-9)
    score_K = normal_KK.sum(axis=0)
    assert score_K.tolist() == pytest.approx(AIOLI["colsum"], abs=1e-9)
    for eta in ("0.1", "1.0"):
        expected = AIOLI[f"p_from_uniform_eta{eta}"]
        assert exponentiated(np.ones(3), score_K, float(eta)).tolist() == pytest.approx(expected, abs=1e-9)


def test_gains_are_shifted_only_when_one_is_negative() -> None:
    positive = normalised_gains(np.array([[1.0, 2.0], [3.0, 4.0]]))
    shifted = normalised_gains(np.array([[-1.0, 2.0], [3.0, 4.0]]))
    assert positive is not None
    assert shifted is not None
    assert positive.tolist() == [[0.1, 0.2], [0.3, 0.4]]
    assert (12 * shifted).tolist() == [[0, 3], [4, 5]]
    assert normalised_gains(np.zeros((2, 2))) is None


@pytest.mark.parametrize(
    ("keys", "shares", "expected"),
    [
        ({"variant": "released", "eta": 1.0}, [0.2, 0.3, 0.5], "p_from_uniform_eta1.0"),
        ({**WITHOUT_AVERAGE, "eta": 0.1}, [0.2, 0.3, 0.5], "p_from_uniform_eta0.1"),
        ({"variant": "paper", "eta": 1.0}, [0.2, 0.3, 0.5], "p_multiplicative_from_[.2,.3,.5]_eta1"),
    ],
)
def test_a_decision_is_the_golden_update(keys: dict[str, Any], shares: list[float], expected: str) -> None:
    proposal = propose(keys, golden_sweep(), shares=shares)
    assert list(proposal.shares) == pytest.approx(AIOLI[expected], abs=1e-9)


def test_released_starts_from_ones_in_every_round_and_averages_normalised_matrices() -> None:
    keys = {"variant": "released", "eta": 1.0, "ema": 0.25}
    first = propose(keys, golden_sweep())
    other = sweep(np.eye(3), 1000 * MIXTURES)
    second = propose(keys, other, first.state, shares=[0.1, 0.1, 0.8])
    average_KK = 0.75 * np.eye(3) / 3 + 0.25 * np.array(AIOLI["A_norm"])
    assert list(second.shares) == pytest.approx(exponentiated(np.ones(3), average_KK.sum(axis=0), 1.0))


def test_released_without_an_average_is_cumulative_after_the_first_round() -> None:
    keys = {**WITHOUT_AVERAGE, "eta": 1.0}
    first = propose(keys, golden_sweep(), shares=[0.1, 0.1, 0.8])
    assert list(first.shares) == pytest.approx(AIOLI["p_from_uniform_eta1.0"], abs=1e-9)
    second = propose(keys, golden_sweep(), first.state, shares=[0.2, 0.3, 0.5])
    assert list(second.shares) == pytest.approx(AIOLI["p_multiplicative_from_[.2,.3,.5]_eta1"], abs=1e-9)


@pytest.mark.parametrize(("num_arms", "expected"), [(2, (4, 4, 250)), (3, (4, 6, 250)), (7, (2, 10, 200))])
def test_published_variants_have_the_sizes_of_the_released_scripts(num_arms: int, expected: tuple[int, ...]) -> None:
    sweeps, steps, round_steps = expected
    laid = stretches({"variant": "released"}, [1 / num_arms] * num_arms)
    assert [stretch.num_steps for stretch in laid] == [
        round_steps - sweeps * steps * num_arms, *[steps] * (sweeps * num_arms)
    ]  # fmt: skip


@pytest.mark.parametrize("num_arms", [2, 3, 7, 16])
def test_centred_perturbs_at_most_a_fifth_of_a_round_by_default(num_arms: int) -> None:
    assert 0.15 < perturbation_share(stretches({}, [1 / num_arms] * num_arms)) <= 0.2
    assert perturbation_share(stretches({"variant": "released"}, [1 / 7] * 7)) == pytest.approx(0.7)


def test_every_perturbation_is_validated_before_and_after() -> None:
    assert all(stretch.evaluate for stretch in stretches({}, [0.2, 0.8]))
    first = stretches({}, [0.2, 0.8], decision=0)
    assert all(stretch.evaluate and stretch.is_perturbation for stretch in first)


def test_published_one_hots_are_mixed_with_uniform_and_centred_ones_with_the_mixture() -> None:
    def tried(keys: dict[str, Any]) -> set[tuple[float, ...]]:
        return {tuple(np.round(stretch.shares, 12).tolist()) for stretch in stretches(keys, [0.1, 0.9], decision=0)}

    assert tried({"variant": "paper", "one_hot_factor": 0.6}) == {(0.6, 0.4), (0.4, 0.6)}
    assert tried({"epsilon": 0.5}) == {(0.55, 0.45), (0.05, 0.95)}


def test_one_hot_factor_and_epsilon_say_the_same() -> None:
    by_factor = stretches({"variant": "paper", "one_hot_factor": 0.5}, [1 / 3] * 3)
    by_epsilon = stretches({"variant": "paper", "epsilon": 0.75}, [1 / 3] * 3)
    assert np.array([s.shares for s in by_factor]) == pytest.approx(np.array([s.shares for s in by_epsilon]))


def test_each_repetition_of_a_sweep_has_each_arm_once_in_a_keyed_order() -> None:
    def orders(key: int) -> list[list[int]]:
        arms = [int(np.argmax(stretch.shares)) for stretch in stretches({"sweeps": 4}, [1 / 5] * 5, 0, key)]
        return [arms[start : start + 5] for start in range(0, 20, 5)]

    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders(1))
    assert orders(1) == orders(1) != orders(2)
    assert len({tuple(order) for key in range(5) for order in orders(key)}) > 10


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ema": 0.1}, "ema is a key of variant released, found variant centred"),
        ({"variant": "paper", "memory": 3}, "memory is a key of variant centred, found variant paper"),
        ({"one_hot_factor": 0.5, "epsilon": 0.5}, "give one of them"),
        ({"sweep_step": 4}, "sweep_step: unknown key; did you mean 'sweep_steps'?"),
        ({"variant": "original"}, "variant: input should be 'paper', 'released' or 'centred'"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyRejected) as caught:
        online({"kind": "aioli", **keys})
    assert message in str(caught.value)


def test_a_round_that_cannot_hold_its_sweep_is_refused_with_the_least_length() -> None:
    with pytest.raises(
        PolicyRejected, match=r"round_steps: 20 steps cannot hold a sweep of 2 x 3 arms x 4 steps; .* 25"
    ):
        stretches({"round_steps": 20}, [1 / 3] * 3)
    with pytest.raises(
        PolicyRejected, match=r"one_hot_factor: 0.2 emphasises none of 3 arms; expected more than 0.3333"
    ):
        stretches({"variant": "paper", "one_hot_factor": 0.2}, [1 / 3] * 3)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fall", [-0.3, 0.0, 0.3])
def test_arms_that_are_all_alike_change_nothing(variant: str, fall: float) -> None:
    proposal = propose({"variant": variant}, sweep(np.full((3, 3), fall), 1000 * MIXTURES))
    assert list(proposal.shares) == pytest.approx([1 / 3] * 3, abs=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_that_are_not_there_hold_the_mixture_and_the_state(variant: str) -> None:
    nothing = [interval(10 * i, 10, rows, [np.nan] * 3, [np.nan] * 3) for i, rows in enumerate(1000 * MIXTURES)]
    first = propose({"variant": variant}, golden_sweep())
    proposal = propose({"variant": variant}, nothing, first.state, shares=[0.5, 0.25, 0.25])
    assert proposal.held
    assert proposal.shares == (0.5, 0.25, 0.25)
    assert proposal.state == first.state


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_interval_with_a_broken_loss_is_skipped(variant: str) -> None:
    twice = sweep(AIOLI["A_true"], 1000 * np.tile(MIXTURES, (2, 1)))
    broken = [*twice[:2], twice[2].model_copy(update={"after": (1.0, None, 2.0)}), *twice[3:]]
    proposal = propose({"variant": variant}, broken)
    assert not proposal.held
    assert proposal.diagnostics["skipped"] == 1
    if variant != "centred":
        assert proposal.shares == pytest.approx(propose({"variant": variant}, twice).shares, abs=1e-9)


def centred_rounds(gains: Floats, keys: dict[str, Any], num_rounds: int) -> Floats:
    """Rounds of sweeps under a fixed law, without a guard."""
    share_K, state = [1 / len(gains)] * len(gains), {}
    for _ in range(num_rounds):
        laid = stretches({**keys, "epsilon": 0.3}, share_K, decision=0)
        rows = 10_000 * np.array([stretch.shares for stretch in laid])
        proposal = propose(keys, sweep(gains, rows, drift=0.02), state, shares=share_K)
        share_K, state = list(proposal.shares), json.loads(json.dumps(proposal.state))
    return np.array(share_K)


@pytest.mark.parametrize("update", ["eg", "omd", "optimistic"])
def test_centred_reads_most_of_what_helps_most_and_least_of_what_hurts(update: str) -> None:
    gains = np.array([[0.02, 0.01, -0.02], [0.01, 0.015, -0.02], [0.01, 0.0, -0.01]])
    share_K = centred_rounds(gains, {"update": update}, 8)
    assert share_K[0] > share_K[1] > share_K[2]
    assert share_K[2] < 0.15


def test_centred_does_not_care_for_what_all_mixtures_share() -> None:
    rows = 1000 * np.tile(MIXTURES, (2, 1))
    plain, drifting = (propose({}, sweep(np.array(AIOLI["A_true"]) / 50, rows, drift)) for drift in (0.0, 0.5))
    assert plain.diagnostics["estimate"] == pytest.approx(drifting.diagnostics["estimate"], abs=1e-9)


def test_decay_pulls_back_to_the_first_mixture_when_evidence_is_gone() -> None:
    flat = sweep(np.zeros((2, 2)), 1000 * np.array([[0.7, 0.3], [0.3, 0.7], [0.6, 0.4], [0.4, 0.6]]), drift=0.1)
    first = propose({"decay": 0.5}, flat, shares=[0.2, 0.8])
    later = propose({"decay": 0.5}, flat, first.state, shares=[0.5, 0.5])
    assert list(first.shares) == pytest.approx([0.2, 0.8])
    assert list(later.shares) == pytest.approx([1 / 3, 2 / 3])


def test_an_arm_without_a_share_is_not_perturbed_and_gets_none() -> None:
    laid = stretches({}, [0.5, 0.0, 0.5])
    assert all(stretch.shares[1] == 0 for stretch in laid)
    rows = 1000 * np.array([stretch.shares for stretch in laid if stretch.is_perturbation])
    for variant in VARIANTS:
        proposal = propose({"variant": variant}, sweep(np.diag([0.02, 0.0, 0.01]), rows), shares=[0.5, 0.0, 0.5])
        assert not proposal.held
        assert proposal.shares[1] == 0
        assert proposal.shares[0] > 0.5


def test_the_target_decides_which_arm_is_worth_more() -> None:
    gains, rows = np.diag([0.02, 0.02]), 1000 * np.array([[0.7, 0.3], [0.3, 0.7], [0.6, 0.4], [0.4, 0.6]])
    for variant in VARIANTS:
        proposal = propose({"variant": variant}, sweep(gains, rows, 0.01), target=(0.9, 0.1))
        assert proposal.shares[0] > 0.51


def test_a_new_unit_of_mass_starts_the_evidence_again() -> None:
    first = propose({}, golden_sweep())
    known = [item.model_copy(update={"learning_rate": 1e-3}) for item in golden_sweep()]
    second = propose({}, known, first.state)
    assert first.state["evidence"]["unit"] == "steps"
    assert second.state["evidence"] == propose({}, known).state["evidence"]


def test_one_arm_is_read_in_long_rounds_without_validation() -> None:
    assert [(s.num_steps, s.evaluate) for s in stretches({}, [1.0])] == [(1000, False)]
    assert [s.num_steps for s in stretches({"round_steps": 70}, [1.0, 0.0])] == [70]
