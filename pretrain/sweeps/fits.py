"""Fits: runs in, a policy document out. Each is a generator that asks for runs and is sent their records.

So a fit neither knows where runs are performed nor how many at a time, and several fits share the same workers
(`drive`). What a fit ends in is an ordinary document, which a job takes like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mixwright.data_mixing.config_file import StrictModel, validate
from mixwright.data_mixing.errors import ConfigError, nearest
from mixwright.pretrain.proxy import ProxyConfig, ProxyRecord, ProxyRun
from mixwright.pretrain.sweeps import design, mixing_law, regression
from mixwright.pretrain.sweeps.doge import DogeRun
from mixwright.pretrain.sweeps.perform import Execute

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """What all runs of a fit share. `target` says how much the loss of each domain counts, sum 1."""

    store: Path
    domains: tuple[str, ...]
    config: ProxyConfig
    seed: int
    target: tuple[float, ...]

    def run(self, shares: Sequence[float] | Floats, seed: int = 0) -> ProxyRun:
        """A run on one mixture [G]."""
        return self.run_policy(self.static(shares), seed)

    def run_policy(self, policy: dict[str, Any], seed: int = 0) -> ProxyRun:
        """A run under a policy."""
        return ProxyRun(
            store=self.store, domains=self.domains, policy=policy, config=self.config, seed=self.seed + seed
        )

    def static(self, shares: Sequence[float] | Floats) -> dict[str, Any]:
        """The document of one mixture [G]."""
        return {"kind": "static", "mixture": {n: float(s) for n, s in zip(self.domains, shares, strict=True)}}

    def uniform(self) -> dict[str, Any]:
        """All domains alike."""
        return self.static([1 / len(self.domains)] * len(self.domains))

    def vector(self, losses: dict[str, float]) -> list[float]:
        """Losses by name as [G]."""
        return [losses[name] for name in self.domains]


@dataclass(frozen=True)
class Fitted:
    """The document that a fit ends in, the records of its runs, and figures for people to look at."""

    document: dict[str, Any]
    records: tuple[ProxyRecord, ...]
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """What the runs read."""
        return sum(record.tokens for record in self.records)


Fit = Generator[Sequence[ProxyRun], list[ProxyRecord], Fitted]


class MixingLawOptions(StrictModel):
    """`num_runs` mixtures that cover the simplex (default 2 K + 2); `floor` is the smallest share of the result."""

    num_runs: int | None = Field(default=None, gt=0)
    floor: float = Field(default=0.005, ge=0)


def fit_mixing_law(problem: Problem, options: MixingLawOptions) -> Fit:
    """Data mixing laws: runs that cover the simplex, the log-linear law, its minimum."""
    num_arms = len(problem.domains)
    num_runs = options.num_runs or 2 * num_arms + 2
    if num_runs < num_arms + 2:
        raise ConfigError(
            f"num_runs: {num_runs} runs cannot check a law of {num_arms} domains; at least {num_arms + 2}"
        )
    share_NK = design.spread_points(num_runs, num_arms, problem.seed)
    records = yield [problem.run(share_K) for share_K in share_NK]
    loss_NG = np.array([problem.vector(record.last) for record in records])
    law = mixing_law.fit_law(share_NK, loss_NG)
    best_K = mixing_law.best_mixture(law, np.array(problem.target), options.floor)
    error_NG = mixing_law.leave_one_out(share_NK, loss_NG)
    spread_G = loss_NG.std(axis=0)
    figures = {
        "leave-one-out error, nats (rms)": float(np.sqrt(np.square(error_NG).mean())),
        "spread of the losses, nats (rms)": float(np.sqrt(np.square(spread_G).mean())),
        "predicted gain over uniform, nats": _gain(law, best_K, problem.target),
    }
    return Fitted(problem.static(best_K), tuple(records), figures)


def _gain(law: mixing_law.MixingLaw, best_K: Floats, target: tuple[float, ...]) -> float:
    uniform_K = np.full(len(best_K), 1 / len(best_K))
    predicted = law.predict([uniform_K, best_K]) @ np.array(target)
    return float(predicted[0] - predicted[1])


class RegmixOptions(StrictModel):
    """`num_runs` mixtures around the prior (uniform); the answer averages the `num_best` of `num_simulated`."""

    num_runs: int = Field(default=64, gt=0)
    num_simulated: int = Field(default=100_000, gt=0)
    num_best: int = Field(default=128, gt=0)


def fit_regmix(problem: Problem, options: RegmixOptions) -> Fit:
    """RegMix with a ridge regression in place of gradient-boosted trees (see regression.py)."""
    prior_K = np.full(len(problem.domains), 1 / len(problem.domains))
    share_NK = design.scattered_points(options.num_runs, prior_K, problem.seed)
    records = yield [problem.run(share_K) for share_K in share_NK]
    loss_N = np.array([problem.vector(record.last) for record in records]) @ np.array(problem.target)
    model = regression.fit_ridge(share_NK, loss_N)
    best_K = regression.best_simulated(model, prior_K, options.num_simulated, options.num_best, problem.seed)
    figures = {"leave-one-out rank correlation": regression.spearman(model.left_out_N, loss_N)}
    return Fitted(problem.static(best_K), tuple(records), figures)


class SkillOptions(StrictModel):
    """`policy`: further keys of the skill_it document."""

    policy: dict[str, Any] = Field(default_factory=dict)


def fit_skill_graph(problem: Problem, options: SkillOptions) -> Fit:
    """Skill-It's graph: run i reads domain i only; graph[i][j] is the part of domain j's loss that it takes away."""
    records = yield [problem.run(one_hot) for one_hot in np.eye(len(problem.domains))]
    graph = {name: skill_row(record) for name, record in zip(problem.domains, records, strict=True)}
    return Fitted({"kind": "skill_it", "graph": graph, **options.policy}, tuple(records), {"graph": graph})


def skill_row(record: ProxyRecord) -> dict[str, float]:
    """Relative fall of every domain's validation loss over the run."""
    return {name: (start - record.last[name]) / start for name, start in record.first.items()}


class DoremiOptions(StrictModel):
    """`policy`: further keys of the doremi document of the proxy run."""

    policy: dict[str, Any] = Field(default_factory=dict)


def fit_doremi(problem: Problem, options: DoremiOptions) -> Fit:
    """DoReMi: a reference run on all domains alike, a proxy run under `doremi`, the average of its mixtures."""
    (reference,) = yield [problem.run_policy(problem.uniform())]
    document = {"kind": "doremi", "reference": reference.last, **options.policy}
    (proxy,) = yield [problem.run_policy(document, seed=1)]
    return Fitted(problem.static(average_shares(proxy)), (reference, proxy), {"reference losses": reference.last})


def average_shares(record: ProxyRecord) -> list[float]:
    """Mean over the steps of the mixtures that the run was told to read [G]."""
    steps = [*(point.step for point in record.mixtures), record.run.config.num_steps]
    lengths = np.diff(steps)
    share_SG = np.array([[point.shares[name] for name in record.run.domains] for point in record.mixtures])
    average_G: list[float] = (lengths @ share_SG / lengths.sum()).tolist()
    return average_G


class DogeOptions(StrictModel):
    """`mu` as in DogeRun; `validation_part` of each step's rows make the validation batch (half, or 2 of 8 for k=3)."""

    mu: float = Field(default=0.01, gt=0)
    validation_part: float = Field(default=0.25, gt=0, lt=1)


def fit_doge(problem: Problem, options: DogeOptions) -> Fit:
    """DoGE: one proxy run that weighs domains by their gradients, the average of its weights."""
    batch = max(1, round(problem.config.rows_per_step * options.validation_part))
    run = problem.run_policy(problem.uniform())
    doge = DogeRun(**dict(run), mu=options.mu, validation_batch=batch)
    (record,) = yield [doge]
    weights = record.average_weights or {}
    return Fitted(problem.static(problem.vector(weights)), (record,), {"average weights": weights})


FITS: dict[str, tuple[type[StrictModel], Callable[[Problem, Any], Fit]]] = {
    "mixing_law": (MixingLawOptions, fit_mixing_law),
    "regmix": (RegmixOptions, fit_regmix),
    "skill_it": (SkillOptions, fit_skill_graph),
    "doremi": (DoremiOptions, fit_doremi),
    "doge": (DogeOptions, fit_doge),
}


def begin_fit(kind: str, problem: Problem, options: dict[str, Any]) -> Fit:
    """The fit of a kind; raises ConfigError for an unknown kind, wrong options, and fewer than two domains."""
    if kind not in FITS:
        raise ConfigError(f"there is no fit of kind {kind!r}{nearest(kind, FITS)}")
    if len(problem.domains) < 2:
        raise ConfigError(f"{kind}: found one domain, {problem.domains[0]!r}; there is nothing to mix")
    model, fit = FITS[kind]
    return fit(problem, validate(model, options, f"options of {kind}"))


def drive(fits: Sequence[Fit], execute: Execute) -> list[Fitted]:
    """Carry all fits to their ends; runs that they ask for at the same time are performed together."""
    results: dict[int, Fitted] = {}
    answers: dict[int, list[ProxyRecord] | None] = dict.fromkeys(range(len(fits)))
    while answers:
        asked: dict[int, Sequence[ProxyRun]] = {}
        for index, records in answers.items():
            try:
                asked[index] = next(fits[index]) if records is None else fits[index].send(records)
            except StopIteration as end:
                results[index] = end.value
        done = iter(execute([run for runs in asked.values() for run in runs]))
        answers = {index: [next(done) for _ in runs] for index, runs in asked.items()}
    return [results[index] for index in range(len(fits))]
