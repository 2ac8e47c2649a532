"""Losses on top of nll and lse: golden vectors in float64, limits, gradients, silence of weight 0."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixwright.kernels.linear_nll import linear_nll, linear_nll_reference
from mixwright.kernels.token_losses import (
    aldr_temperature,
    comp_sum,
    elr_penalty,
    label_smoothing,
    ldr_kl,
    mean_logit,
    palm_z_loss,
    segment_means,
    spread_over_tokens,
    target_agreement,
    weighted_sum,
)
from tests.kernels.problems import random_problem

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "kernel_vectors.json").read_text())


def head_of(logits: list[float]) -> tuple[Tensor, Tensor]:
    """Hidden [1, 1] and weight [V, 1] whose logits are the given ones; the weight's gradient is that of the logits."""
    return torch.ones(1, 1, dtype=torch.float64), torch.tensor(logits, dtype=torch.float64)[:, None].requires_grad_()


def nll_of(golden: dict[str, Any], temperature: float = 1.0) -> Tensor:
    hidden_ND, weight_VD = head_of(golden["logits"])
    return linear_nll(hidden_ND, weight_VD, torch.tensor([golden["target"]]), temperature=temperature).nll_N


def test_palm_z_loss_golden_values_and_gradients() -> None:
    golden = GOLDEN["palm_zloss"]
    hidden_ND, weight_VD = head_of(golden["logits"])
    losses = linear_nll(hidden_ND, weight_VD, torch.tensor([golden["target"]]))
    z = palm_z_loss(losses.lse_N, torch.ones(1), golden["alpha"])
    assert losses.lse_N.item() == pytest.approx(golden["lse"], abs=1e-9)
    assert losses.nll_N.item() == pytest.approx(golden["ce"], abs=1e-9)
    assert z.item() == pytest.approx(golden["z"], abs=1e-9)
    (dz_VD,) = torch.autograd.grad(z, weight_VD, retain_graph=True)
    assert dz_VD[:, 0].tolist() == pytest.approx(golden["dz"], abs=1e-9)
    (dboth_VD,) = torch.autograd.grad(losses.nll_N.sum() + z, weight_VD)
    assert dboth_VD[:, 0].tolist() == pytest.approx(golden["d_ce_and_z"], abs=1e-9)


def test_z_loss_has_its_own_row_scale() -> None:
    problem = random_problem(10, 4, 20)
    weight_N, z_weight_N = problem.dnll_N.abs(), problem.dlse_N.abs()
    grads = []
    for head in (linear_nll, linear_nll_reference):
        weight_VD = problem.weight_VD.clone().requires_grad_()
        losses = head(problem.hidden_ND, weight_VD, problem.targets_N)
        (weighted_sum(losses.nll_N, weight_N) + palm_z_loss(losses.lse_N, z_weight_N, 0.1)).backward()
        grads.append(weight_VD.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)


def test_z_loss_of_factor_zero_leaves_the_gradient_bit_by_bit() -> None:
    problem = random_problem(10, 4, 20).to(torch.float32)
    grads = []
    for alpha in (None, 0.0):
        weight_VD = problem.weight_VD.clone().requires_grad_()
        losses = linear_nll(problem.hidden_ND, weight_VD, problem.targets_N)
        loss = losses.nll_N.sum()
        (loss if alpha is None else loss + palm_z_loss(losses.lse_N, torch.ones(10), alpha)).backward()
        grads.append(weight_VD.grad)
    assert torch.equal(grads[0], grads[1])


def test_weight_zero_silences_a_loss_that_is_nan() -> None:
    losses_N = torch.tensor([1.0, torch.nan, 3.0], requires_grad=True)
    loss = weighted_sum(losses_N, torch.tensor([1.0, 0.0, 2.0])) + palm_z_loss(losses_N, torch.tensor([0.0, 0.0, 1.0]))
    loss.backward()
    assert loss.isfinite()
    assert losses_N.grad is not None
    assert losses_N.grad[1] == 0


@pytest.mark.parametrize(("tau", "value"), GOLDEN["comp_sum"]["values"])
def test_comp_sum_golden_values(tau: float, value: float) -> None:
    assert comp_sum(nll_of(GOLDEN["comp_sum"]), tau).item() == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.3, 1.7, 2.0])
def test_comp_sum_gradient_is_that_of_cross_entropy_times_a_power_of_the_probability(tau: float) -> None:
    nll_N = torch.linspace(0.01, 15, 50, dtype=torch.float64, requires_grad=True)
    (found_N,) = torch.autograd.grad(comp_sum(nll_N, tau).sum(), nll_N)
    torch.testing.assert_close(found_N, torch.exp(-nll_N.detach() * (tau - 1)), rtol=1e-9, atol=1e-14)


def test_comp_sum_limits_are_cross_entropy_and_mean_absolute_error() -> None:
    nll_N = torch.rand(9, dtype=torch.float64)
    assert torch.equal(comp_sum(nll_N, 1.0), nll_N)
    torch.testing.assert_close(comp_sum(nll_N, 2.0), 1 - torch.exp(-nll_N), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(comp_sum(nll_N, 1 + 1e-9), nll_N, rtol=1e-8, atol=0)


def test_comp_sum_below_one_goes_on_as_a_straight_line_and_never_overflows() -> None:
    nll_N = torch.tensor([20.0, 21.0, 22.0, 1e4], requires_grad=True)
    loss_N = comp_sum(nll_N, 0.0)
    loss_N.sum().backward()
    assert loss_N.isfinite().all()
    assert nll_N.grad is not None
    torch.testing.assert_close(nll_N.grad, torch.full((4,), math.exp(20.0)), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("temperature", "margin", "value"), GOLDEN["ldr_kl"]["values"])
def test_ldr_kl_golden_values(temperature: float, margin: float, value: float) -> None:
    found = ldr_kl(nll_of(GOLDEN["ldr_kl"], temperature), 4, temperature, margin)
    assert found.item() == pytest.approx(value, abs=1e-9)


def test_ldr_kl_limits() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64)
    golden = {"logits": logits.tolist(), "target": 1}
    largest_margin = (logits + 0.3 * (torch.arange(4) != 1) - logits[1]).max()
    mean_margin = (logits + 0.3 * (torch.arange(4) != 1) - logits[1]).mean()
    assert ldr_kl(nll_of(golden, 0.01), 4, 0.01, 0.3).item() == pytest.approx(largest_margin.item(), abs=0.02)
    assert ldr_kl(nll_of(golden, 1e5), 4, 1e5, 0.3).item() == pytest.approx(mean_margin.item(), abs=1e-4)
    assert ldr_kl(nll_of(golden), 4, 1.0).item() == pytest.approx(nll_of(golden).item() - math.log(4), abs=1e-12)


def test_ldr_kl_gradient_equals_autograd_on_its_definition_with_a_temperature_per_row() -> None:
    problem = random_problem(12, 4, 20)
    temperature_N = torch.linspace(0.5, 2, 12, dtype=torch.float64)
    first, second = (problem.weight_VD.clone().requires_grad_() for _ in range(2))
    nll_N = linear_nll(problem.hidden_ND, first, problem.targets_N, temperature=temperature_N).nll_N
    found_N = ldr_kl(nll_N, 20, temperature_N, 0.4)
    logits_NV = problem.hidden_ND @ second.T
    gap_NV = logits_NV - logits_NV.gather(1, problem.targets_N[:, None])
    gap_NV = gap_NV + 0.4 * (torch.arange(20) != problem.targets_N[:, None]).double()
    defined_N = temperature_N * ((gap_NV / temperature_N[:, None]).logsumexp(1) - math.log(20))
    torch.testing.assert_close(found_N, defined_N, rtol=1e-12, atol=1e-12)
    (found_N * problem.dnll_N).sum().backward()
    (defined_N * problem.dnll_N).sum().backward()
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-11, atol=1e-12)


def test_aldr_temperature_golden_value() -> None:
    """The authors' code smooths p by 1e-5 before its entropy; we do not (at V = 50,000 that would add half a unit)."""
    golden = GOLDEN["aldr_lambda"]
    prob_V = torch.softmax(torch.tensor(golden["logits"], dtype=torch.float64), 0) + 1e-5
    entropy_N = torch.special.entr(prob_V / prob_V.sum()).sum()[None]
    assert math.log(4) - entropy_N.item() == pytest.approx(golden["kl"], abs=1e-9)
    assert aldr_temperature(entropy_N, 4, golden["lam0"], golden["alpha"]).item() == pytest.approx(
        golden["lam"], abs=1e-9
    )


def test_aldr_temperature_ranges_from_flat_to_certain_predictions() -> None:
    entropy_N = torch.tensor([math.log(50.0), 0.0], requires_grad=True)
    found_N = aldr_temperature(entropy_N, 50, 3.0, 2.0)
    torch.testing.assert_close(found_N, torch.tensor([3.0, 1.5]))
    assert not found_N.requires_grad


def test_label_smoothing_equals_torch() -> None:
    problem = random_problem(12, 4, 20, bias=True, ignored=0.3)
    first, second = (problem.weight_VD.clone().requires_grad_() for _ in range(2))
    losses = linear_nll(problem.hidden_ND, first, problem.targets_N, bias_V=problem.bias_V)
    mean_N = mean_logit(problem.hidden_ND, first, problem.bias_V)
    found_N = label_smoothing(losses.nll_N, losses.lse_N, mean_N, 0.1)
    logits_NV = torch.nn.functional.linear(problem.hidden_ND, second, problem.bias_V)
    options: dict[str, Any] = {"reduction": "none", "label_smoothing": 0.1}
    expected_N = torch.nn.functional.cross_entropy(logits_NV, problem.targets_N, **options)
    torch.testing.assert_close(found_N, expected_N, rtol=1e-12, atol=1e-12)
    (found_N * problem.dnll_N).sum().backward()
    (expected_N * problem.dnll_N).sum().backward()
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-12, atol=1e-12)


def test_elr_golden_value() -> None:
    golden = GOLDEN["elr"]
    agreement = torch.tensor([golden["p"]], dtype=torch.float64) @ torch.tensor(golden["t_new"], dtype=torch.float64)
    loss = -math.log(golden["p"][0]) + golden["factor"] * elr_penalty(agreement).item()
    assert loss == pytest.approx(golden["loss_y0"], abs=1e-9)


def test_elr_gradient_opposes_cross_entropy_where_teacher_and_model_agree_on_the_target() -> None:
    nll_N = torch.tensor([0.2, 0.2, 12.0], requires_grad=True)
    teacher_nll_N = torch.tensor([0.1, 9.0, 0.1], requires_grad=True)
    elr_penalty(target_agreement(nll_N, teacher_nll_N)).sum().backward()
    assert nll_N.grad is not None
    assert nll_N.grad[0] > 1
    assert 0 <= nll_N.grad[1] < 1e-3
    assert nll_N.grad[2] == 0
    assert teacher_nll_N.grad is None


def test_segment_means_count_only_counted_tokens_of_any_order() -> None:
    values_N = torch.tensor([1.0, 10.0, 2.0, torch.nan, 4.0, 6.0], requires_grad=True)
    segment_N = torch.tensor([0, 3, 0, 0, 1, 3])
    counted_N = torch.tensor([True, True, True, False, True, True])
    mean_S, count_S = segment_means(values_N, segment_N, 5, counted_N)
    assert mean_S.tolist() == [1.5, 4.0, 0.0, 8.0, 0.0]
    assert count_S.tolist() == [2.0, 1.0, 0.0, 2.0, 0.0]
    (mean_S * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).sum().backward()
    assert values_N.grad is not None
    assert values_N.grad.tolist() == [0.5, 2.0, 0.5, 0.0, 2.0, 2.0]


def test_instance_weights_bound_late_equal_autograd_through_segment_means() -> None:
    problem = random_problem(24, 4, 30, ignored=0.2)
    segment_N = torch.arange(24) // 6
    counted_N = problem.targets_N != -100
    first, second = (problem.weight_VD.clone().requires_grad_() for _ in range(2))
    nll_N = linear_nll(problem.hidden_ND, first, problem.targets_N).nll_N
    mean_S, count_S = segment_means(nll_N.detach(), segment_N, 4, counted_N)
    weight_S = torch.softmax(mean_S / 0.4, 0)
    weighted_sum(nll_N, spread_over_tokens(weight_S, segment_N, count_S, counted_N)).backward()
    reference_N = linear_nll_reference(problem.hidden_ND, second, problem.targets_N).nll_N
    (segment_means(reference_N, segment_N, 4, counted_N)[0] * weight_S).sum().backward()
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-12, atol=1e-12)


def test_parameters_out_of_range_are_refused() -> None:
    nll_N = torch.ones(2)
    with pytest.raises(ValueError, match=r"tau is 2.5, expected 0\.\.2"):
        comp_sum(nll_N, 2.5)
    with pytest.raises(ValueError, match=r"epsilon is 1\.0"):
        label_smoothing(nll_N, nll_N, nll_N, 1.0)
    with pytest.raises(ValueError, match=r"margin is 9\.0"):
        ldr_kl(nll_N, 10, 0.1, 9.0)
    with pytest.raises(ValueError, match=r"alpha is 1\.0"):
        aldr_temperature(nll_N, 10, alpha=1.0)
    with pytest.raises(ValueError, match="vocabulary is 1"):
        aldr_temperature(nll_N, 1)
    with pytest.raises(ValueError, match=r"segment ids reach 1, expected 0\.\.0"):
        segment_means(nll_N, torch.tensor([0, 1]), 1, nll_N > 0)


def test_a_rank_without_segments_has_no_means() -> None:
    nothing_N, no_segment_N = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    mean_S, count_S = segment_means(nothing_N, no_segment_N, 0, no_segment_N.bool())
    assert mean_S.shape == count_S.shape == (0,)
    assert spread_over_tokens(mean_S, no_segment_N, count_S, no_segment_N.bool()).shape == (0,)


def accuracy_after_noisy_training(strength: float) -> float:
    """Clean accuracy of a small network that was trained to the end on labels of which 40 % are wrong."""
    generator = torch.Generator().manual_seed(0)
    classes, dimensions, number = 4, 16, 400
    centre_KD = torch.randn(classes, dimensions, generator=generator)
    label_N = torch.arange(2 * number) % classes
    point_ND = centre_KD[label_N] + 1.2 * torch.randn(2 * number, dimensions, generator=generator)
    is_wrong_N = torch.rand(number, generator=generator) < 0.4
    noisy_N = torch.where(is_wrong_N, (label_N[:number] + 1) % classes, label_N[:number])
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(dimensions, 128), torch.nn.ReLU(), torch.nn.Linear(128, classes))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    table_NK = torch.zeros(number, classes)
    for _ in range(300):
        logits_NK = model(point_ND[:number])
        probability_NK = torch.clamp(torch.softmax(logits_NK, 1), 1e-4, 1 - 1e-4)
        kept_NK = (probability_NK / probability_NK.sum(1, keepdim=True)).detach()
        table_NK = 0.7 * table_NK + 0.3 * kept_NK
        agreement_N = (table_NK * probability_NK).sum(1)
        nll_N = torch.nn.functional.cross_entropy(logits_NK, noisy_N, reduction="none")
        optimizer.zero_grad()
        (nll_N + strength * elr_penalty(agreement_N)).mean().backward()
        optimizer.step()
    return float((model(point_ND[number:]).argmax(1) == label_N[number:]).float().mean())


def test_elr_keeps_what_was_learned_early_where_cross_entropy_memorises_wrong_labels() -> None:
    plain, regularised = accuracy_after_noisy_training(0.0), accuracy_after_noisy_training(3.0)
    assert plain < 0.8
    assert regularised > plain + 0.1
