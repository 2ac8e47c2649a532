"""The objective of preference runs: golden values, equalities between its forms, gradients, exactness over cuts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixwright.data_mixing.config_file import validate
from mixwright.data_mixing.errors import ConfigError
from mixwright.pretrain.rpo.config import ObjectiveConfig
from mixwright.pretrain.rpo.figures import auc
from mixwright.pretrain.rpo.groups import CompletionLogProbs
from mixwright.pretrain.rpo.objective import (
    Objective,
    StepScope,
    WholeStep,
    ensloss_slopes,
    equivalents,
    margin_loss,
    sft_term,
)

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "rpo_vectors.json").read_text())
"""Float64 values of the methods' equations."""

EVERY_LOSS: list[dict[str, Any]] = [
    {"loss": "dpo"}, {"loss": "dpo", "label_smoothing": 0.1}, {"loss": "dpo", "target_margin": 0.3},
    {"loss": "ipo"}, {"loss": "hinge"}, {"loss": "robust", "label_smoothing": 0.2}, {"loss": "auc"},
    {"loss": "ensloss"}, {"loss": "dpo", "length_normalised": True, "reference_free": True, "target_margin": 0.5},
]  # fmt: skip
EVERY_SFT: list[dict[str, Any] | None] = [
    None,
    {"regulariser": "cumulative", "eta": 0.3},
    {"regulariser": "average", "eta": 0.3},
    {"reduction": "token_mean", "weight": 0.7},
    {"reduction": "seq_sum", "weight": 0.02},
    {"reduction": "seq_mean", "eta": 2.0, "base": "reference"},
    {"reduction": "token_mean", "weight": 0.7, "base": "reference"},
]


def objective(**settings: Any) -> Objective:
    return Objective(validate(ObjectiveConfig, settings, "test"))


def random_step(num_pairs: int, completions: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and lengths [S, C] and the reference's sums [S, 2], float64."""
    generator = torch.Generator().manual_seed(seed)
    length_SC = torch.randint(1, 30, (num_pairs, completions), generator=generator)
    logp_SC = -length_SC * (1 + torch.rand(num_pairs, completions, generator=generator, dtype=torch.float64))
    reference_S2 = logp_SC[:, :2] + torch.randn(num_pairs, 2, generator=generator, dtype=torch.float64)
    return logp_SC, length_SC, reference_S2


def whole_loss(found: Objective, step: tuple[Tensor, Tensor, Tensor], cuts: list[slice]) -> Tensor:
    """The objective of a step as the sum of the parts of its micro-batches; its gradient is in logp_SC."""
    logp_SC, length_SC, reference_S2 = step
    place = 0 if found.sft is None else found.sft.place
    scope = StepScope(len(logp_SC), int(length_SC[:, place].sum()), seed=5)
    reward_S2 = found.rewards(CompletionLogProbs(logp_SC, length_SC), reference_S2).detach()
    parts = []
    for cut in cuts:
        own = CompletionLogProbs(logp_SC[cut], length_SC[cut])
        whole = WholeStep(reward_S2, torch.arange(len(logp_SC))[cut])
        parts.append(found(own, reference_S2[cut], scope, whole)[0])
    return torch.stack(parts).sum()


def test_golden_values_of_both_regularisers() -> None:
    golden = GOLDEN["rpo"]
    logp = torch.tensor([[golden["lp_w"], golden["lp_l"]]], dtype=torch.float64, requires_grad=True)
    found = CompletionLogProbs(logp, torch.tensor([[golden["chosen_tokens"], 1]]))
    reference = torch.tensor([[golden["ref_w"], golden["ref_l"]]], dtype=torch.float64)
    scope = StepScope(1, golden["chosen_tokens"])
    beta, eta = golden["beta"], golden["eta"]
    dpo, _ = objective(beta=beta)(found, reference, scope)
    cumulative, figures = objective(beta=beta, sft={"regulariser": "cumulative", "eta": eta})(found, reference, scope)
    average, _ = objective(beta=beta, sft={"regulariser": "average", "eta": 0.2})(found, reference, scope)
    assert float(dpo) == pytest.approx(golden["dpo"], abs=1e-12)
    assert float(cumulative) == pytest.approx(golden["cumulative"], abs=1e-12)
    assert float(average) == pytest.approx(golden["average_eta0.2_beta0.01"], abs=1e-12)
    assert float(figures.reward_P2[0, 0] - figures.reward_P2[0, 1]) == pytest.approx(golden["margin"], abs=1e-12)
    (gradient,) = torch.autograd.grad(cumulative, logp)
    assert float(gradient[0, 0]) == pytest.approx(golden["dL/dlp_w_cumulative"], abs=1e-12)
    assert float(gradient[0, 1]) == pytest.approx(golden["dL/dlp_l"], abs=1e-12)


def test_golden_derivatives_of_ensloss() -> None:
    golden = GOLDEN["ensloss"]
    margin = torch.tensor(golden["margins"], dtype=torch.float64)
    slope = ensloss_slopes(margin, torch.tensor(golden["xi"], dtype=torch.float64))
    np.testing.assert_allclose(slope.numpy(), golden["derivs"], atol=1e-9)
    assert float((slope * margin).mean()) == pytest.approx(golden["loss_value"], abs=1e-9)


def test_eta_zero_is_dpo_bit_by_bit() -> None:
    step = tuple(part.float() if part.is_floating_point() else part for part in random_step(9, completions=2))
    cut = [slice(0, 9)]
    found = []
    for sft in (None, {"regulariser": "cumulative", "eta": 0.0}, {"regulariser": "average", "eta": 0.0}):
        logp = step[0].clone().requires_grad_()
        loss = whole_loss(objective(sft=sft), (logp, step[1], step[2]), cut)
        found.append((loss, torch.autograd.grad(loss, logp)[0]))
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(gradient, found[0][1])


def test_cumulative_and_average_agree_up_to_length_and_beta_when_lengths_are_equal() -> None:
    logp, length, reference = random_step(6, completions=2)
    length = torch.full_like(length, 7)
    beta, eta = 0.3, 0.05
    cut = [slice(0, 6)]
    cumulative = objective(beta=beta, sft={"regulariser": "cumulative", "eta": eta})
    average = objective(beta=beta, sft={"regulariser": "average", "eta": eta * beta * 7})
    assert float(whole_loss(cumulative, (logp, length, reference), cut)) == pytest.approx(
        float(whole_loss(average, (logp, length, reference), cut)), rel=1e-14
    )


@pytest.mark.parametrize("sft", EVERY_SFT)
@pytest.mark.parametrize("settings", EVERY_LOSS)
def test_the_gradient_does_not_depend_on_how_a_step_is_cut(
    settings: dict[str, Any], sft: dict[str, Any] | None
) -> None:
    found, step = objective(sft=sft, **settings), random_step(10)
    results = []
    for cuts in ([slice(0, 10)], [slice(0, 4), slice(4, 5), slice(5, 10)]):
        logp = step[0].clone().requires_grad_()
        loss = whole_loss(found, (logp, step[1], step[2]), cuts)
        results.append((loss.detach(), torch.autograd.grad(loss, logp)[0]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("settings", [one for one in EVERY_LOSS if one["loss"] != "ensloss"])
def test_values_and_gradients_equal_the_definition(settings: dict[str, Any]) -> None:
    """Written down once more, pair by pair, and differentiated by autograd as a whole."""
    found, (logp, length, reference) = objective(beta=0.4, **settings), random_step(7, completions=2)
    logp.requires_grad_()
    whole = whole_loss(found, (logp, length, reference), [slice(0, 3), slice(3, 7)])
    expected = definition(settings, 0.4, logp, length, reference)
    assert float(whole) == pytest.approx(float(expected), rel=1e-12)
    got, want = torch.autograd.grad(whole, logp)[0], torch.autograd.grad(expected, logp)[0]
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def definition(settings: dict[str, Any], beta: float, logp: Tensor, length: Tensor, reference: Tensor) -> Tensor:
    ratio = logp - (0 if settings.get("reference_free") else reference)
    ratio = ratio / length if settings.get("length_normalised") else ratio
    smooth, target = settings.get("label_smoothing", 0.0), settings.get("target_margin", 0.0)
    losses = []
    for i in range(len(ratio)):
        delta = ratio[i, 0] - ratio[i, 1]
        margin = beta * delta - target
        if settings["loss"] == "dpo":
            losses.append(-(1 - smooth) * F.logsigmoid(margin) - smooth * F.logsigmoid(-margin))
        elif settings["loss"] == "robust":
            losses.append((-(1 - smooth) * F.logsigmoid(margin) + smooth * F.logsigmoid(-margin)) / (1 - 2 * smooth))
        elif settings["loss"] == "hinge":
            losses.append(torch.clamp(1 - margin, min=0))
        elif settings["loss"] == "ipo":
            losses.append((delta - 1 / (2 * beta)) ** 2)
        else:
            others = [-F.logsigmoid(beta * (ratio[i, 0] - ratio[j, 1]) - target) for j in range(len(ratio))]
            losses.append(torch.stack(others).mean())
    return torch.stack(losses).mean()


def test_ensloss_is_calibrated_and_draws_anew_every_step() -> None:
    margin = torch.linspace(-3, 3, 41, dtype=torch.float64)
    slopes = [ensloss_slopes(margin, torch.randn(41, dtype=torch.float64)) for _ in range(2)]
    assert not torch.equal(*slopes)
    for slope in slopes:
        assert bool((slope < 0).all())
        inside = slope[margin <= 1]
        assert bool((inside.diff() >= 0).all()), "derivatives of a convex loss do not fall"


@pytest.mark.parametrize("settings", EVERY_LOSS)
def test_a_policy_that_equals_its_reference_has_a_known_loss(settings: dict[str, Any]) -> None:
    if settings["loss"] == "ensloss" or settings.get("reference_free"):
        return
    found, (logp, length, _) = objective(beta=0.7, **settings), random_step(5, completions=2)
    target = settings.get("target_margin", 0.0)
    known = {"ipo": (1 / (2 * 0.7)) ** 2, "hinge": 1.0}
    expected = known.get(settings["loss"], math.log(1 + math.exp(target)))  # ln 2
    assert float(whole_loss(found, (logp, length, logp), [slice(0, 2), slice(2, 5)])) == pytest.approx(expected)


def test_equivalents_name_one_weight_in_every_convention() -> None:
    """posttraining.md 2.3: eta 0.005 and beta 0.01 over 300 tokens are 0.015 on the scale of token means."""
    config = validate(ObjectiveConfig, {"preset": "liu2024"}, "test")
    values = equivalents(config, mean_length=300)
    assert values["weight, token_mean"] == pytest.approx(0.015)
    assert values["eta, cumulative"] == pytest.approx(0.005)
    term = sft_term(validate(ObjectiveConfig, {"preset": "liu2024_avg"}, "test"))
    assert term is not None
    assert (term.reduction, term.weight) == ("seq_mean", 0.2)
    for sft in EVERY_SFT[1:]:
        config = validate(ObjectiveConfig, {"beta": 0.2, "sft": sft}, "test")
        term, named = sft_term(config), equivalents(config, 12.0)
        assert term is not None
        own = {"seq_sum": "weight, seq_sum", "seq_mean": "weight, seq_mean (eta, average)"}.get(term.reduction)
        assert dict(named)[own or "weight, token_mean"] == pytest.approx(term.weight)  # type: ignore[index]


def test_presets_yield_to_what_is_given_beside_them() -> None:
    config = validate(ObjectiveConfig, {"preset": "liu2024", "beta": 0.05}, "test")
    assert config.beta == 0.05
    assert config.sft is not None
    assert config.sft.eta == 0.005
    assert validate(ObjectiveConfig, {"preset": "trl_rpo_alpha"}, "test").sft is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sft": {"reduction": "seq_sum"}}, "exactly one of `eta`"),
        ({"sft": {"reduction": "seq_sum", "eta": 1.0, "weight": 1.0}}, "exactly one of `eta`"),
        ({"sft": {"weight": 1.0}}, "exactly one of `regulariser`"),
        ({"sft": {"regulariser": "average", "weight": 1.0}}, "goes with `reduction`"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "goes with loss: dpo or robust"),
        ({"loss": "robust"}, "needs label_smoothing"),
        ({"loss": "dop"}, "loss"),
        ({"preset": "liu2042"}, "preset"),
        ({"preference_weight": 0}, "nothing to learn"),
        ({"alpha": 1.0}, "unknown key"),
    ],
)
def test_settings_that_could_mean_two_things_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(ObjectiveConfig, settings, "test")


def test_whole_step_losses_say_what_they_need() -> None:
    logp, length, reference = random_step(3, completions=2)
    with pytest.raises(ValueError, match="rewards of all pairs"):
        objective(loss="auc")(CompletionLogProbs(logp, length), reference, StepScope(3, 1))


def test_auc_counts_all_comparisons_and_halves_ties() -> None:
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = torch.randint(0, 6, (2, 50), generator=generator).double()
    brute = sum((c > r) + 0.5 * (c == r) for c in chosen.tolist() for r in rejected.tolist()) / 2500
    assert auc(chosen, rejected) == pytest.approx(brute)
    assert math.isclose(float(margin_loss(objective().config)(torch.tensor(0.0))), math.log(2), rel_tol=1e-6)
