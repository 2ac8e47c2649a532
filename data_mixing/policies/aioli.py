"""`aioli`: perturb the mixture inside the run, learn from validation losses what each arm is worth, read more of it.

Chen et al., "Aioli: A unified optimization framework for language model data mixing" (arXiv 2411.05735);
spec/methods.md 1.2 (paper), 1.3 (released code), 1.6 (what `centred` changes and why).

    round      read the mixture p, then a sweep: each arm in turn is emphasised for a few steps, in a keyed random order
    paper      p_j <- p_j exp(eta sum_i Abar_ij)                        A from the sweep alone, Abar = A / sum(A)
    released   p_j  = exp(eta sum_i E_ij) / Z, E = moving average of Abar         starts from all ones in every round
    centred    p_j <- p_j^(1-d) prior_j^d exp(eta s_j)   s_j = posterior mean of arm j's gain per fall of the loss

Beside the released code, two repairs hold in every variant: proportions are those really read (the code inverts nominal
ones, which its sampler does not produce for k = 7), and a round whose losses tell nothing keeps the mixture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from mixwright.data_mixing.errors import PolicyRejected
from mixwright.data_mixing.evidence import Evidence, Gains, Observations, observe, solve_gains
from mixwright.data_mixing.mirror_descent import exponentiated, step_size, surprise
from mixwright.data_mixing.online import OnlineDocument, Proposal, Stretch, Window
from mixwright.data_mixing.permutation import mix_key, permute

Floats = NDArray[np.float64]
Variant = Literal["paper", "released", "centred"]
State = dict[str, Any]

PERTURBED_PART = 0.2
"""Largest part of a round that a centred policy perturbs unless `round_steps` says otherwise."""


@dataclass(frozen=True)
class Sizes:
    """A sweep is `sweeps` x K stretches of `sweep_steps`; a round has `round_steps` in all.

    emphasis: q_j = emphasis * e_j + (1 - emphasis) * base.
    """

    sweeps: int
    sweep_steps: int
    round_steps: int
    emphasis: float
    eta: float
    ema: float | None


_SCRIPTS: dict[int, tuple[int, int, int, float, float, float]] = {
    2: (4, 4, 250, 0.625, 0.2, 0.1),
    3: (4, 6, 250, 0.5, 0.1, 0.5),
    7: (2, 10, 200, 0.75, 1.0, 0.1),
}
"""lp_rounds, lp_steps, update_steps, one_hot_factor, eta, ema of the released scripts for k = 2, 3 and 7."""

_CENTRED = (2, 4, 0, 0.0, 5.0, 0.0)
_CENTRED_EPSILON = 0.3
_DECAY = {"eg": 0.5, "omd": 0.1, "optimistic": 0.1}
"""Found on the synthetic worlds of configs/worlds, one setting for all of them (docs/policies.md)."""

_STEPS_ALONE = 1000
"""A round of one arm, in which there is nothing to decide."""

_ROUNDING = 1e-9
"""What is left of gains that are all alike is rounding, of which a division by the sum would make a preference."""

_CENTRED_KEYS = ("update", "memory", "decay", "prior", "objective")


class Document(OnlineDocument):
    """Keys of `aioli`; what is left out is the variant's default (docs/policies.md).

    sweeps, sweep_steps, round_steps are the code's lp_rounds, lp_steps, update_steps. The emphasised arm of a
    perturbation has share `one_hot_factor`, or is mixed with `epsilon` of the base: uniform, in `centred` the mixture
    itself. `ema` (released) is the weight of the old matrix. `memory` (centred) is how many rounds evidence lasts,
    `decay` the pull to the initial mixture in a round, `prior` by how much the gains of arms are expected to differ, as
    a multiple of the loss's mean fall. `objective` (centred): the mean over domains that shall fall; of the perplexity,
    a nat counts in proportion to the domain's perplexity.
    """

    kind: Literal["aioli"]
    variant: Variant = "centred"
    sweeps: int | None = Field(default=None, ge=1, le=64, strict=True)
    sweep_steps: int | None = Field(default=None, ge=1, strict=True)
    round_steps: int | None = Field(default=None, ge=1, strict=True)
    one_hot_factor: float | None = Field(default=None, gt=0, le=1)
    epsilon: float | None = Field(default=None, ge=0, lt=1)
    eta: float | None = Field(default=None, ge=0)
    ema: float | None = Field(default=None, ge=0, lt=1)
    update: Literal["eg", "omd", "optimistic"] = "eg"
    memory: float = Field(default=10.0, ge=1)
    decay: float | None = Field(default=None, ge=0, le=1)
    prior: float = Field(default=0.15, gt=0)
    objective: Literal["loss", "perplexity"] = "loss"

    @model_validator(mode="after")
    def _keys_of_the_variant(self) -> Document:
        given = self.model_fields_set
        if "ema" in given and self.variant != "released":
            raise ValueError(f"ema is a key of variant released, found variant {self.variant}")
        wrong = [key for key in _CENTRED_KEYS if key in given]
        if wrong and self.variant != "centred":
            raise ValueError(f"{wrong[0]} is a key of variant centred, found variant {self.variant}")
        if self.one_hot_factor is not None and self.epsilon is not None:
            raise ValueError("one_hot_factor and epsilon say the same; give one of them")
        return self

    def sizes(self, num_arms: int) -> Sizes:
        """Sizes for so many arms, with the variant's defaults; raises PolicyRejected."""
        script = _SCRIPTS.get(num_arms, _SCRIPTS[7])
        if self.variant == "centred":
            script = _CENTRED
        sweeps, sweep_steps = self.sweeps or script[0], self.sweep_steps or script[1]
        round_steps = self.round_steps or script[2] or math.ceil(sweeps * sweep_steps * num_arms / PERTURBED_PART)
        return Sizes(
            sweeps=sweeps,
            sweep_steps=sweep_steps,
            round_steps=round_steps,
            emphasis=self._emphasis(num_arms, script[3]),
            eta=script[4] if self.eta is None else self.eta,
            ema=self.ema if "ema" in self.model_fields_set else script[5],
        )

    def _emphasis(self, num_arms: int, one_hot_factor: float) -> float:
        if self.epsilon is not None:
            return 1 - self.epsilon
        if self.one_hot_factor is None and self.variant == "centred":
            return 1 - _CENTRED_EPSILON
        factor = self.one_hot_factor or one_hot_factor
        if factor * num_arms <= 1:
            raise PolicyRejected(
                f"one_hot_factor: {factor:g} emphasises none of {num_arms} arms; expected more than {1 / num_arms:.4g}"
            )
        return (factor * num_arms - 1) / (num_arms - 1)


def stretches(document: Document, shares: Sequence[float], decision: int, key: int) -> tuple[Stretch, ...]:
    """The rest of the round at `shares`, then a sweep; only a sweep before the first decision."""
    num_arms = sum(share > 0 for share in shares)
    if num_arms < 2:
        return (Stretch(num_steps=document.round_steps or _STEPS_ALONE, shares=tuple(shares)),)
    sizes = document.sizes(num_arms)
    sweep = _sweep(document, sizes, np.array(shares), key)
    rest = sizes.round_steps - len(sweep) * sizes.sweep_steps
    if rest < 1:
        raise PolicyRejected(
            f"round_steps: {sizes.round_steps} steps cannot hold a sweep of {sizes.sweeps} x {num_arms} arms x "
            f"{sizes.sweep_steps} steps; expected at least {sizes.round_steps - rest + 1}"
        )
    if decision == 0:
        return sweep
    return (Stretch(num_steps=rest, shares=tuple(shares), evaluate=True), *sweep)


def _sweep(document: Document, sizes: Sizes, share_K: Floats, key: int) -> tuple[Stretch, ...]:
    """Every arm with a share is emphasised `sweeps` times; each repetition in an order of its own."""
    arms = np.flatnonzero(share_K > 0)
    base_K = share_K if document.variant == "centred" else np.where(share_K > 0, 1.0, 0.0)
    base_K = base_K / base_K.sum()
    sweep = []
    for repetition in range(sizes.sweeps):
        order = permute(np.arange(len(arms)), len(arms), mix_key(key, repetition))
        for arm in arms[order]:
            mixed_K = (1 - sizes.emphasis) * base_K
            mixed_K[arm] += sizes.emphasis
            shares = tuple(mixed_K.tolist())
            sweep.append(Stretch(num_steps=sizes.sweep_steps, shares=shares, evaluate=True, is_perturbation=True))
    return tuple(sweep)


def propose(document: Document, window: Window, state: Mapping[str, Any]) -> Proposal:
    """The mixture of the next round."""
    active_K = np.array(window.shares) > 0
    if active_K.sum() < 2:
        return _hold(window, state, "one arm has a share")
    seen = observe(window, document.objective).of_arms(active_K)
    share_A = np.array(window.shares)[active_K]
    decide = _propose_centred if document.variant == "centred" else _propose_published
    result = decide(document, window, state, seen, share_A)
    if isinstance(result, Proposal):
        return result
    share_K = np.zeros(len(active_K))
    share_K[active_K] = result.share_A
    diagnostics = {**result.diagnostics, "skipped": seen.num_skipped}
    return Proposal(shares=tuple(share_K.tolist()), state=result.state, diagnostics=diagnostics)


@dataclass(frozen=True, eq=False)
class Step:
    """A decision about the arms that have a share, [A]."""

    share_A: Floats
    state: dict[str, Any]
    diagnostics: dict[str, Any]


def _hold(window: Window, state: Mapping[str, Any], reason: str, **diagnostics: Any) -> Proposal:
    return Proposal(shares=window.shares, state=dict(state), held=reason, diagnostics=diagnostics)


def normalised_gains(gains_KK: Floats) -> Floats | None:
    """The released normalisation: less a negative smallest entry, by the sum; None when nothing is left."""
    shifted_KK = gains_KK - min(0.0, float(gains_KK.min()))
    total = float(shifted_KK.sum())
    return shifted_KK / total if total > _ROUNDING * float(np.abs(gains_KK).sum()) else None


def _propose_published(
    document: Document, window: Window, state: Mapping[str, Any], seen: Observations, share_A: Floats
) -> Step | Proposal:
    """Variants `paper` and `released`, from the perturbations of the last sweep."""
    sizes, tried_N = document.sizes(len(share_A)), seen.is_perturbation_N
    gains_KA = solve_gains(seen.share_NK[tried_N], seen.drop_NK[tried_N])
    if gains_KA is None:
        return _hold(
            window, state, f"the losses of {tried_N.sum()} perturbations do not tell {len(share_A)} arms apart"
        )
    gains_KA = gains_KA * (seen.target_K * np.count_nonzero(seen.target_K))[:, None]
    normal_KA = normalised_gains(gains_KA)
    if normal_KA is None:
        return _hold(window, state, "the gains of all arms are alike", gains=gains_KA.tolist())
    diagnostics = {"gains": gains_KA.tolist(), "score": normal_KA.sum(axis=0).tolist()}
    if document.variant == "paper":
        return Step(exponentiated(share_A, normal_KA.sum(axis=0), sizes.eta), {}, diagnostics)
    if sizes.ema is not None and "average" in state:
        normal_KA = (1 - sizes.ema) * normal_KA + sizes.ema * np.array(state["average"])
    # From all ones: in every round with a moving average, else in the first one.
    base_A = np.ones(len(share_A)) if sizes.ema is not None or "average" not in state else share_A
    share_A = exponentiated(base_A, normal_KA.sum(axis=0), sizes.eta)
    return Step(share_A, {"average": normal_KA.tolist()}, diagnostics)


def _propose_centred(
    document: Document, window: Window, state: Mapping[str, Any], seen: Observations, share_A: Floats
) -> Step | Proposal:
    """Variant `centred`, from all intervals so far."""
    state = {"prior": share_A.tolist(), **state}
    if not len(seen):
        return _hold(window, state, "no interval has finite losses before and after")
    evidence = Evidence.none(len(share_A), seen.unit)
    if "evidence" in state and state["evidence"]["unit"] == seen.unit:
        evidence = Evidence.from_state(state["evidence"])
    evidence = evidence.updated(seen, 1 - 1 / document.memory)
    state = {**state, "evidence": evidence.state()}
    gains = evidence.gains(document.prior)
    if gains is None:
        return _hold(window, state, "the mixtures read so far do not tell the arms apart")
    score_A = _scores(gains)
    wanted_A, memory = _step(document, score_A, share_A, state)
    diagnostics = {
        "gain": gains.mean_K.tolist(),
        "error": gains.error_K.tolist(),
        "estimate": gains.estimate_K.tolist(),
        "score": score_A.tolist(),
        "rate": gains.rate,
    }
    return Step(wanted_A, {**state, **memory}, diagnostics)


def _scores(gains: Gains) -> Floats:
    """Gains as a multiple of the loss's mean fall, within -1 to 1."""
    if gains.rate == 0:
        return np.zeros_like(gains.mean_K)
    return np.clip(gains.mean_K / gains.rate, -1, 1)


def _step(document: Document, score_A: Floats, share_A: Floats, state: Mapping[str, Any]) -> tuple[Floats, State]:
    """The next mixture, and what the step after it needs to know."""
    prior_A = np.array(state["prior"])
    decay = _DECAY[document.update] if document.decay is None else document.decay
    if document.update == "eg":
        eta = document.sizes(len(share_A)).eta
        return exponentiated(share_A ** (1 - decay) * prior_A**decay, score_A, eta), {}
    largest = max(float(state.get("largest", 0.0)), float(np.abs(score_A).max()))
    hint_A = np.array(state.get("hint", np.zeros(len(share_A)))) if document.update == "optimistic" else 0.0 * score_A
    variation = float(state.get("variation", 0.0))
    eta = step_size(len(share_A), variation, largest) if document.eta is None else document.eta
    memory: State = {"largest": largest, "variation": variation + surprise(score_A, hint_A)}
    if document.update == "omd":
        return exponentiated(share_A ** (1 - decay) * prior_A**decay, score_A, eta), memory
    anchor_A = np.array(state.get("anchor", share_A))
    anchor_A = exponentiated(anchor_A ** (1 - decay) * prior_A**decay, score_A, eta)
    return exponentiated(anchor_A, score_A, eta), memory | {"anchor": anchor_A.tolist(), "hint": score_A.tolist()}
