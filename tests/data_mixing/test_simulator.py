"""Synthetic worlds: their optimum is one, rows are counted as the plan counts them, policies do what they should."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.config_file import load_config
from mixwright.data_mixing.domain import Domain
from mixwright.data_mixing.entries import Genesis
from mixwright.data_mixing.errors import PolicyRejected
from mixwright.data_mixing.plan import CommittedPolicy, Plan
from mixwright.data_mixing.regret import STRATIFIED, best_fixed_regret, compare
from mixwright.data_mixing.simulator import simulate
from mixwright.data_mixing.worlds import Scene, World, build

WORLDS = Path(__file__).parents[2] / "configs" / "worlds"
CENTRED: dict[str, Any] = {"kind": "aioli"}
SMALL = {"num_steps": 600, "rows_per_step": 8}


def mean_loss(scene: Scene, share_K: np.ndarray) -> float:
    steps = scene.world.num_steps
    return float(scene.loss(scene.fallen(0, steps, share_K), steps).mean())


def mixtures(num_domains: int, parts: int) -> list[np.ndarray]:
    grid = itertools.product(range(parts + 1), repeat=num_domains)
    return [np.array(point) / parts for point in grid if sum(point) == parts]


@pytest.mark.parametrize("law", ["linear", "power"])
@pytest.mark.parametrize("seed", range(4))
def test_no_fixed_mixture_is_better_than_the_best(law: Any, seed: int) -> None:
    scene = build(World(law=law, drift=0.8, spread=0.8, schedule="cosine", **SMALL), seed)
    if law == "power":
        scene = build(World(law=law, spread=0.8, schedule="cosine", **SMALL), seed)
    share_K, loss = scene.best_fixed()
    assert loss == pytest.approx(mean_loss(scene, share_K))
    brute = min(mean_loss(scene, mixture_K) for mixture_K in mixtures(3, 20))
    assert brute - 0.01 < loss <= brute + 1e-9
    assert scene.best_dynamic() <= loss + 1e-12


def test_the_best_dynamic_mixture_takes_the_best_domain_of_every_step() -> None:
    world = World(drift=0.9, **SMALL)
    scene = build(world, 3)
    fallen_K = np.zeros(3)
    for step in range(world.num_steps):
        falls = [scene.fallen(step, step + 1, one_hot) for one_hot in np.eye(3)]
        fallen_K += max(falls, key=lambda fall_K: fall_K.sum())
    assert scene.best_dynamic() == pytest.approx(float(scene.loss(fallen_K, world.num_steps).mean()))
    assert scene.best_dynamic() < scene.best_fixed()[1] - 1e-3


def test_a_static_policy_has_the_regret_of_its_mixture() -> None:
    world = World(validation_noise=0.1, **SMALL)
    scene = build(world, 5)
    document = {"kind": "static", "mixture": {"domain0": 0.5, "domain2": 0.5}}
    expected = mean_loss(scene, np.array([0.5, 0.0, 0.5])) - scene.best_dynamic()
    assert simulate(document, world, 5).regret == pytest.approx(expected, abs=1e-9)


def test_luck_is_the_same_for_all_policies() -> None:
    calm, wild = (World(walk_noise=noise, **SMALL) for noise in (0.0, 0.05))
    assert simulate(STRATIFIED, wild, 2).regret == pytest.approx(simulate(STRATIFIED, calm, 2).regret, abs=1e-9)
    assert (build(wild, 2).noise_TK == build(wild, 2).noise_TK).all()
    assert (build(wild, 2).common_TK != build(wild, 3).common_TK).any()


def test_rows_are_counted_as_the_plan_counts_them() -> None:
    world = World(num_steps=100, rows_per_step=7)
    names = [f"domain{index}" for index in range(3)]
    points = [
        {"step": step, "mixture": dict(zip(names, (1, 1 + step % 3, 2 + step % 5), strict=True))} for step in range(100)
    ]
    document = {"kind": "schedule", "points": points}
    genesis = Genesis(
        run="simulation", seed=0, sequence_length=64, rows_per_step=7, num_steps=100, store_fingerprint="",
        domains=tuple(Domain(name=name, num_rows=1 << 24, fingerprint="") for name in names),
    )  # fmt: skip
    plan = Plan(genesis, [CommittedPolicy(0, 1, accept(document, genesis))])
    # The plan keeps domains in order of their ids, so that a row more or less falls on another one.
    assert np.abs(simulate(document, world, 0).share_K * 700 - plan.cursors(100)).max() < 3


@pytest.mark.parametrize("document", [CENTRED, {"kind": "odm"}, {"kind": "bandit_neural"}])
def test_a_simulation_can_be_repeated(document: dict[str, Any]) -> None:
    world = World(validation_noise=0.01, **SMALL)
    first, again, other = (simulate(document, world, seed) for seed in (4, 4, 5))
    assert first.regret == again.regret
    assert first.share_K.tolist() == again.share_K.tolist()
    assert first.regret != other.regret


def test_a_policy_is_refused_as_at_submission() -> None:
    with pytest.raises(PolicyRejected, match="round_steps: 10 steps cannot hold a sweep"):
        simulate({"kind": "aioli", "round_steps": 10}, World(**SMALL), 0)
    with pytest.raises(PolicyRejected, match="'aioly'; did you mean 'aioli'"):
        simulate({"kind": "aioly"}, World(**SMALL), 0)


@pytest.mark.parametrize("name", [path.stem for path in sorted(WORLDS.glob("*.yaml"))])
def test_every_world_that_we_ship_runs(name: str) -> None:
    world = load_config(World, WORLDS / f"{name}.yaml")
    outcome = simulate(CENTRED, world, 0)
    assert np.isfinite(outcome.regret)
    assert outcome.share_K.sum() == pytest.approx(1)
    assert outcome.num_decisions > 3
    assert outcome.perturbed < 0.25


def regrets(name: str, num_seeds: int, *policies: dict[str, Any]) -> list[Any]:
    world = load_config(World, WORLDS / f"{name}.yaml")
    return compare({str(place): policy for place, policy in enumerate(policies)}, world, num_seeds)


@pytest.mark.parametrize("name", ["drifting", "noisy"])
def test_centred_has_less_regret_than_the_published_variants_odm_and_stratified(name: str) -> None:
    others: list[dict[str, Any]] = [{"kind": "aioli", "variant": v} for v in ("paper", "released")]
    stratified, centred, *rest = regrets(name, 16, CENTRED, *others, {"kind": "odm"})
    assert centred.regret < min(result.regret for result in (stratified, *rest))


def test_believing_noise_costs_little() -> None:
    stratified, centred, still = regrets("iid_noise", 16, CENTRED, {**CENTRED, "eta": 0.0})
    assert stratified.regret == pytest.approx(0, abs=1e-4)
    assert still.regret == pytest.approx(0, abs=1e-4)
    assert centred.regret < 0.008


def test_a_garbage_domain_gets_less_than_its_share_and_more_under_the_released_update() -> None:
    released: dict[str, Any] = {"kind": "aioli", "variant": "released", "eta": 1.0}
    world = load_config(World, WORLDS / "garbage.yaml")
    for seed in range(6):
        centred_share = simulate(CENTRED, world, seed).last_share_K[3]
        released_share = simulate(released, world, seed).last_share_K[3]
        assert centred_share < 1 / 4
        assert 1 / (1 + 3 * math.e) <= released_share
        assert centred_share < released_share


def test_the_table_is_paired_and_the_best_fixed_mixture_is_no_worse_than_any_other() -> None:
    world = World(drift=0.5, **SMALL)
    stratified, other = compare({"same": STRATIFIED}, world, 3)
    assert (stratified.policy, other.policy) == ("stratified", "same")
    assert other.against_stratified == other.against_stratified_error == 0
    assert best_fixed_regret(world, 3) < stratified.regret
    with pytest.raises(ValueError, match="num_seeds is 0"):
        compare({}, world, 0)


def test_one_domain_is_read_alone() -> None:
    outcome = simulate(CENTRED, World(num_domains=1, **SMALL), 0)
    assert outcome.share_K.tolist() == [1.0]
    assert outcome.regret == pytest.approx(0, abs=1e-9)
