"""The online policies beside Aioli, and unimax: golden updates, floors, orders of names."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.arms import arms_of
from mixwright.data_mixing.entries import PROPORTION_TOTAL
from mixwright.data_mixing.errors import PolicyRejected
from mixwright.data_mixing.neural import Ensemble, keyed_uniform
from mixwright.data_mixing.online import Proposal
from mixwright.data_mixing.policies.ado import fit_law
from mixwright.data_mixing.policies.bandit_neural import probabilities as inverse_gap
from mixwright.data_mixing.policies.doremi import update as doremi_update
from mixwright.data_mixing.policies.odm import exploration
from mixwright.data_mixing.policies.odm import probabilities as odm_probabilities
from mixwright.data_mixing.policies.unimax import dealt_out
from tests.data_mixing.online_cases import GOLDEN, domains, interval, online, window
from tests.data_mixing.run_cases import SIZES, genesis

SKILL, DOREMI, ODM = GOLDEN["skillit"], GOLDEN["doremi"], GOLDEN["odm"]


def propose(document: dict[str, Any], intervals: list[Any], state: Any = None, **more: Any) -> Proposal:
    kind, parsed = online(document)
    return kind.propose(parsed, window(intervals, **more), state or {})


def measured(losses: list[float], rows: list[int] | None = None, **more: Any) -> Any:
    """One interval whose training and last validation losses are these."""
    return interval(0, 10, rows or [100] * len(losses), [9.0] * len(losses), losses, **more)


def graph(names: tuple[str, ...], matrix: list[list[float]]) -> dict[str, dict[str, float]]:
    return {row: dict(zip(names, values, strict=True)) for row, values in zip(names, matrix, strict=True)}


# Skill-It


def test_golden_skill_it_is_a_sum_of_windows_losses_through_the_graph() -> None:
    document = {"kind": "skill_it", "eta": SKILL["eta"], "window": 2, "graph": graph(("a", "b"), SKILL["G"])}
    state: Any = {}
    for losses in ([50.0, 60.0], [1.0, 0.5], [2.0, 1.5]):
        proposal = propose(document, [measured(losses)], state, arms=("a", "b"))
        state = json.loads(json.dumps(proposal.state))
    assert proposal.diagnostics["loss_sum"] == SKILL["window_loss_sum"]
    assert list(proposal.shares) == pytest.approx(SKILL["p"], abs=1e-9)


def test_skill_it_finds_names_that_are_in_no_alphabetical_order() -> None:
    matrix, losses = [[0.9, 0.1, 0.0], [0.2, 0.8, 0.3], [0.1, 0.4, 0.7]], [3.0, 1.0, 2.0]
    names = ("wiki", "arxiv", "books")
    document = {"kind": "skill_it", "graph": graph(names, matrix)}
    shares = dict(zip(names, propose(document, [measured(losses)], arms=names).shares, strict=True))
    expected = np.exp(0.2 * np.array(matrix) @ losses)
    assert list(shares.values()) == pytest.approx(expected / expected.sum())
    other = ("arxiv", "books", "wiki")
    again = propose(document, [measured([1.0, 2.0, 3.0])], arms=other)
    assert dict(zip(other, again.shares, strict=True)) == pytest.approx(shares)


def test_skill_it_starts_from_the_row_sums_of_its_graph() -> None:
    document = online({"kind": "skill_it", "graph": graph(("b", "a"), [[0.5, 0.3], [0.1, 0.2]])})[1]
    expected = np.exp(0.2 * np.array([0.3, 0.8]))
    assert arms_of(document, domains("a", "b")).initial_K == pytest.approx(expected / expected.sum())


def test_a_graph_entry_of_one_beside_the_diagonal_is_read_as_a_half() -> None:
    document = online({"kind": "skill_it", "graph": graph(("a", "b"), [[1.0, 1.0], [0.3, 0.9]])})[1]
    assert document.matrix(("a", "b")).tolist() == [[1.0, 0.5], [0.3, 0.9]]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"kind": "skill_it", "graph": {"a": {"a": 1, "b": 1}}}, "graph: arm 'b' is missing"),
        ({"kind": "skill_it", "graph": {"a": {"a": 1}, "b": {"a": 1, "b": 1}}}, "graph.a: arm 'b' is missing"),
        ({"kind": "skill_it", "graph": {"a": {}, "bb": {}, "b": {}}}, "graph.bb: there is no such arm"),
        ({"kind": "doremi", "reference": {"a": 1}}, "reference: the loss of arm 'b' is missing"),
        ({"kind": "doremi", "reference": {"a": 1, "b": 1, "c": 1}}, "reference.c: there is no such arm"),
    ],
)
def test_names_that_are_no_arms_are_refused_at_submission(document: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyRejected) as caught:
        arms_of(online(document)[1], domains("a", "b"))
    assert message in str(caught.value)


# DoReMi


def test_golden_doremi_update() -> None:
    share_K = doremi_update(DOREMI["p"], DOREMI["excess"], DOREMI["mu"], DOREMI["c"])
    assert share_K.tolist() == pytest.approx(DOREMI["p_new"], abs=1e-9)


@pytest.mark.parametrize(("variant", "mu", "smoothing"), [("original", 1.0, 1e-4), ("aioli", 0.01, 1e-3)])
def test_doremi_compares_with_the_reference_by_name(variant: str, mu: float, smoothing: float) -> None:
    document = {"kind": "doremi", "variant": variant, "reference": {"b": 2.0, "a": 3.0}}
    proposal = propose(document, [measured([3.5, 1.0])], arms=("a", "b"))
    assert list(proposal.shares) == pytest.approx(doremi_update([0.5, 0.5], [0.5, 0.0], mu, smoothing))


def test_doremi_keeps_the_last_excess_of_an_arm_that_was_not_read() -> None:
    document = {"kind": "doremi", "reference": {"a": 1.0, "b": 1.0}}
    first = propose(document, [measured([2.0, 1.5])], arms=("a", "b"))
    second = propose(document, [measured([math.nan, 1.2], [0, 100])], first.state, arms=("a", "b"))
    assert second.diagnostics["excess"] == pytest.approx([1.0, 0.2])


def test_doremi_averages_the_mixtures_over_steps() -> None:
    document, state = {"kind": "doremi", "reference": {"a": 1.0, "b": 1.0}}, {}
    for steps, shares in ((10, [0.5, 0.5]), (30, [0.9, 0.1])):
        seen = interval(0, steps, [50, 50], [2.0, 2.0], [2.0, 2.0])
        proposal = propose(document, [seen], state, arms=("a", "b"), shares=shares)
        state = proposal.state
    assert proposal.diagnostics["average"] == pytest.approx([0.8, 0.2])


# ODM


def test_golden_odm_probabilities() -> None:
    assert exploration(3, ODM["t"] - 1) == pytest.approx(ODM["eps_prev"], abs=1e-12)
    assert exploration(3, ODM["t"]) == pytest.approx(ODM["eps"], abs=1e-12)
    assert odm_probabilities(ODM["R"], ODM["t"]).tolist() == pytest.approx(ODM["pi"], abs=1e-9)


def test_odm_never_goes_below_its_floor() -> None:
    for num_arms in (1, 2, 3, 7, 16):
        for update in (1, 2, 10, 1000, 10**7):
            share_K = odm_probabilities(np.linspace(0, 1e6, num_arms), update)
            assert share_K.min() >= exploration(num_arms, update) - 1e-12
            assert share_K.sum() == pytest.approx(1)


def test_odm_weighs_a_loss_by_how_seldom_the_arm_was_read() -> None:
    first = propose({"kind": "odm"}, [measured([4.0, 2.0])], shares=[0.8, 0.2])
    assert first.state == {"rewards": [pytest.approx(0.5), pytest.approx(1.0)], "update": 1}
    second = propose({"kind": "odm"}, [measured([math.nan, 2.0], [0, 10])], first.state, shares=[0.5, 0.5])
    assert second.state == {"rewards": [pytest.approx(0.5), pytest.approx(1.4)], "update": 2}


def test_odm_can_average_instead() -> None:
    document = {"kind": "odm", "reward": "moving_average"}
    first = propose(document, [measured([4.0, 2.0])])
    assert first.state["rewards"] == pytest.approx([0.04, 0.02])


# ADO


def test_a_loss_law_is_found_again() -> None:
    tokens_n = np.geomspace(1e3, 1e6, 30)
    floor, height, alpha = fit_law(tokens_n, 2.0 + 30.0 * tokens_n**-0.3)
    assert (floor, height, alpha) == pytest.approx((2.0, 30.0, 0.3), rel=0.15)
    assert fit_law(tokens_n, np.full(30, 3.0))[1] == pytest.approx(0, abs=1e-9)


def ado_rounds(alphas: list[float], num_rounds: int) -> Proposal:
    document, state = {"kind": "ado", "warm_up": 4}, {}
    for step in range(1, num_rounds + 1):
        losses = [2 + 5 * (step * 1000.0) ** -alpha if alpha else 7.0 for alpha in alphas]
        proposal = propose(document, [measured(losses)], state)
        state = json.loads(json.dumps(proposal.state))
    return proposal


def test_ado_reads_what_is_learned_fastest_and_less_of_what_is_not_learned() -> None:
    share_K = ado_rounds([0.1, 0.0, 0.02], 12).shares
    assert share_K[0] > share_K[2] > share_K[1] >= 0.01 - 1e-12


def test_ado_holds_until_it_has_curves() -> None:
    assert ado_rounds([0.3, 0.3], 3).held == "3 of 4 rounds to fit a law to"
    assert not ado_rounds([0.3, 0.3], 4).held


def test_the_curves_of_ado_stay_short() -> None:
    curves = ado_rounds([0.3, 0.2], 300).state["curves"]
    assert [len(curve) <= 64 for curve in curves] == [True, True]
    assert all(a[0] < b[0] for curve in curves for a, b in itertools.pairwise(curve))


# The neural bandit


def test_inverse_gap_weighting_prefers_the_least_loss_and_sums_to_one() -> None:
    loss_K = np.array([0.5, 0.2, 0.6])
    squared, relative = (inverse_gap(loss_K, 10.0, loss) for loss in ("squared", "kl"))
    assert squared.tolist() == pytest.approx([1 / 6, 1 - 1 / 6 - 1 / 7, 1 / 7])
    assert relative.tolist() == pytest.approx([0.2 / 3.6, 1 - 0.2 / 3.6 - 0.2 / 4.6, 0.2 / 4.6])
    assert inverse_gap(loss_K, 0.0, "kl").tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("loss", ["squared", "kl"])
def test_a_step_of_learning_follows_the_gradient(loss: Any) -> None:
    net = Ensemble.start(2, 3, 4, perturbation=0.5, seed=1).learn(np.array([1.0, 0.0, -1.0]), 1.0, "kl", 0.7)
    input_D, target, tiny = np.array([0.3, -0.7, 0.2]), 0.9, 1e-6

    def member_loss(parameter_SP: Any, member: int) -> float:
        changed = Ensemble(parameter_SP, net.first_SP, net.sign_SP, 3, 4, net.scale)
        predicted = 1 / (1 + np.exp(-changed._logits(input_D[None])[0][member, 0]))
        squared = (predicted - target) ** 2
        return squared if loss == "squared" else -target * np.log(predicted) - (1 - target) * np.log(1 - predicted)

    step_SP = net.parameter_SP - net.learn(input_D, target, loss, 1.0).parameter_SP
    for member, place in ((0, 0), (0, 13), (1, 17), (1, 20)):
        raised = net.parameter_SP.copy()
        raised[member, place] += tiny
        slope = (member_loss(raised, member) - member_loss(net.parameter_SP, member)) / tiny
        assert step_SP[member, place] == pytest.approx(slope, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("loss", ["squared", "kl"])
def test_the_ensemble_learns_what_depends_on_its_input(loss: Any) -> None:
    net = Ensemble.start(3, 2, 8, perturbation=0.1, seed=0)
    points = keyed_uniform(400, 5).reshape(200, 2) * 2 - 1
    for point in np.tile(points, (10, 1)):
        net = net.learn(point, 0.9 if point[0] > 0 else 0.1, loss, 0.3)
    found = net.predict(np.array([[0.8, 0.0], [-0.8, 0.0]]))
    assert found[0] > 0.75
    assert found[1] < 0.25


def test_keyed_numbers_are_uniform_and_repeatable() -> None:
    numbers = keyed_uniform(10_000, 3, 4)
    assert numbers.tolist() == keyed_uniform(10_000, 3, 4).tolist()
    assert numbers.tolist() != keyed_uniform(10_000, 3, 5).tolist()
    assert np.histogram(numbers, 10, (0, 1))[0] == pytest.approx(1000, abs=120)


def test_pulls_come_in_proportion_to_the_mixture_and_read_it_on_the_whole() -> None:
    kind, document = online({"kind": "bandit_neural", "pulls": 8, "epsilon": 0.5})
    share_K, total_K = np.array([0.55, 0.3, 0.15]), np.zeros(3)
    for key in range(400):
        laid = kind.stretches(document, share_K.tolist(), 1, key)
        assert len(laid) == 8
        total_K += np.mean([stretch.shares for stretch in laid], axis=0)
    assert total_K / 400 == pytest.approx(share_K, abs=0.005)


def bandit_rounds(loss: str, rounds: int = 25) -> Any:
    kind, document = online({"kind": "bandit_neural", "loss": loss})
    share_K, state = [1 / 3] * 3, {}
    gain_K = np.array([0.06, 0.02, 0.0])
    for decision in range(rounds):
        intervals, level = [], 5.0
        for place, stretch in enumerate(kind.stretches(document, share_K, decision, decision)):
            rows = 1000 * np.array(stretch.shares)
            after = level - float(gain_K @ stretch.shares) - 0.01
            intervals.append(interval(10 * place, 10, rows, [level] * 3, [after] * 3))
            level = after
        proposal = kind.propose(document, window(intervals, share_K), state)
        share_K, state = list(proposal.shares), json.loads(json.dumps(proposal.state))
    return share_K


@pytest.mark.parametrize("loss", ["squared", "kl"])
def test_the_bandit_finds_the_arm_that_lets_losses_fall(loss: str) -> None:
    share_K = bandit_rounds(loss)
    assert int(np.argmax(share_K)) == 0
    assert share_K[0] > 0.45


# UniMax


def test_unimax_deals_out_evenly_up_to_the_limits() -> None:
    assert dealt_out(np.array([10.0, 1000.0, 40.0]), 300.0).tolist() == [10.0, 250.0, 40.0]
    assert dealt_out(np.array([100.0, 1000.0, 400.0]), 300.0).tolist() == [100.0, 100.0, 100.0]
    assert dealt_out(np.array([10.0, 20.0]), 300.0).tolist() == [10.0, 20.0]


def test_unimax_repeats_no_domain_more_often_than_asked() -> None:
    run = genesis(num_steps=400)
    entry = accept({"kind": "unimax", "max_epochs": 2}, run)
    rows = np.array(entry.program[0].proportions) / PROPORTION_TOTAL * 400 * 8
    assert dict(zip(SIZES, rows, strict=True)) == pytest.approx(
        {"code": 1200, "wiki": 1200, "web-a": 200, "web-b": 600}, abs=1e-3
    )


def test_unimax_leaves_domains_out_by_name() -> None:
    entry = accept({"kind": "unimax", "domains": ["web-*"]}, genesis())
    assert entry.program[0].proportions[:2] == (0, 0)
