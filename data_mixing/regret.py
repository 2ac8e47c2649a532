"""Policies side by side on one world: regret over many seeds, paired with reading all domains alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.simulator import Outcome, simulate
from mixwright.data_mixing.worlds import World, build

Floats = NDArray[np.float64]

STRATIFIED = {"kind": "static", "mixture": {"*": 1}}


@dataclass(frozen=True)
class Regret:
    """One policy over N seeds, in nats of mean validation loss at the end.

    regret: mean distance to the best dynamic mixture. against_stratified: paired difference, negative is better.
    `_error` is the standard error of a mean. garbage_share: mean share of a garbage domain among all rows read, None in
    a world without one. perturbed, validations, decisions, held: means of a run.
    """

    policy: str
    num_seeds: int
    regret: float
    regret_error: float
    against_stratified: float
    against_stratified_error: float
    perturbed: float
    validations: float
    decisions: float
    held: float
    garbage_share: float | None


def compare(policies: Mapping[str, Mapping[str, Any]], world: World, num_seeds: int) -> list[Regret]:
    """Every policy document on the scenes of seeds 0 to `num_seeds`, in order; raises PolicyRejected."""
    if num_seeds < 1:
        raise ValueError(f"num_seeds is {num_seeds}; expected at least 1")
    named = {"stratified": STRATIFIED, **policies}
    outcomes: dict[str, list[Outcome]] = {name: [] for name in named}
    for seed in range(num_seeds):
        scene = build(world, seed)
        for name, document in named.items():
            outcomes[name].append(simulate(document, world, seed, scene))
    baseline_S = np.array([outcome.regret for outcome in outcomes["stratified"]])
    return [_summary(name, runs, baseline_S, world) for name, runs in outcomes.items()]


def best_fixed_regret(world: World, num_seeds: int) -> float:
    """Mean regret of the best fixed mixture of each seed."""
    scenes = [build(world, seed) for seed in range(num_seeds)]
    return float(np.mean([scene.best_fixed()[1] - scene.best_dynamic() for scene in scenes]))


def _summary(name: str, runs: Sequence[Outcome], baseline_S: Floats, world: World) -> Regret:
    regret_S = np.array([run.regret for run in runs])
    difference_S = regret_S - baseline_S
    garbage = np.mean([run.share_K[-world.garbage :].mean() for run in runs]) if world.garbage else None
    return Regret(
        policy=name,
        num_seeds=len(runs),
        regret=float(regret_S.mean()),
        regret_error=_standard_error(regret_S),
        against_stratified=float(difference_S.mean()),
        against_stratified_error=_standard_error(difference_S),
        perturbed=float(np.mean([run.perturbed for run in runs])),
        validations=float(np.mean([run.num_validations for run in runs])),
        decisions=float(np.mean([run.num_decisions for run in runs])),
        held=float(np.mean([run.num_held for run in runs])),
        garbage_share=None if garbage is None else float(garbage),
    )


def _standard_error(value_S: Floats) -> float:
    return float(value_S.std(ddof=1) / len(value_S) ** 0.5) if len(value_S) > 1 else 0.0
