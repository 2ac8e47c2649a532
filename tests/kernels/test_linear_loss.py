"""linear_loss (engine S) against the reference and against linear_nll."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mixwright.kernels.linear_loss import linear_loss
from mixwright.kernels.linear_nll import linear_nll, linear_nll_reference
from tests.kernels.problems import OVERFLOWS, Problem, assert_all_close, overflowing, random_problem


def run_scalar(problem: Problem, z_loss: float = 0.0, upstream: float = 1.0) -> list[Tensor]:
    """[loss, nll, lse, dhidden, dweight (, dbias)]; row weights are the problem's dnll, those of lse**2 its dlse."""
    leaves = [t.clone().requires_grad_() for t in (problem.hidden_ND, problem.weight_VD)]
    bias_V = None if problem.bias_V is None else problem.bias_V.clone().requires_grad_()
    z_options: dict[str, Any] = {"z_loss": z_loss, "z_weight_N": problem.dlse_N} if z_loss else {}
    losses = linear_loss(*leaves, problem.targets_N, problem.dnll_N, bias_V=bias_V, **z_options, **problem.options)
    (losses.loss_sum * upstream).backward()
    grads = [leaf.grad for leaf in (*leaves, *([] if bias_V is None else [bias_V]))]
    return [losses.loss_sum.detach(), losses.nll_N, losses.lse_N, *(g for g in grads if g is not None)]


def run_reference(problem: Problem, z_loss: float = 0.0, upstream: float = 1.0) -> list[Tensor]:
    leaves = [t.double().clone().requires_grad_() for t in (problem.hidden_ND, problem.weight_VD)]
    bias_V = None if problem.bias_V is None else problem.bias_V.double().clone().requires_grad_()
    losses = linear_nll_reference(*leaves, problem.targets_N, bias_V=bias_V, **problem.options)
    loss = (losses.nll_N * problem.dnll_N).sum() + z_loss * (losses.lse_N.square() * problem.dlse_N).sum()
    (loss * upstream).backward()
    grads = [leaf.grad for leaf in (*leaves, *([] if bias_V is None else [bias_V]))]
    return [t.detach() for t in (loss, losses.nll_N, losses.lse_N, *(g for g in grads if g is not None))]


@pytest.mark.parametrize("vocabulary", [1, 7, 257])
@pytest.mark.parametrize("num_tokens", [0, 1, 37])
def test_equals_the_reference_on_awkward_sizes(num_tokens: int, vocabulary: int) -> None:
    problem = random_problem(num_tokens, 17, vocabulary, bias=True)
    assert_all_close(run_scalar(problem, 0.1, 3.0), run_reference(problem, 0.1, 3.0), 1e-12)


@pytest.mark.parametrize(
    "options", [{"softcap": 3.0}, {"temperature": 0.6}, {"ignored": 0.4}, {"softcap": 2.0, "ignored": 0.4}]
)
def test_equals_the_reference_with_options(options: dict[str, Any]) -> None:
    problem = random_problem(37, 8, 257, **options)
    assert_all_close(run_scalar(problem, 0.1), run_reference(problem, 0.1), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_give_float32_losses_and_gradients_of_their_own_dtype(dtype: torch.dtype) -> None:
    problem = random_problem(64, 16, 100).to(dtype)
    found, exact = run_scalar(problem, 0.01), run_reference(problem.to(torch.float64), 0.01)
    assert [tensor.dtype for tensor in found] == [torch.float32] * 3 + [dtype] * 2
    assert_all_close(found, exact, 1e-2)


def test_equals_linear_nll_when_weights_happen_to_be_known() -> None:
    problem = random_problem(37, 8, 257).to(torch.float32)
    problem.dlse_N.zero_()
    assert_all_close(run_scalar(problem)[1:], problem.run(linear_nll), 1e-6)


def test_z_weights_default_to_the_row_weights() -> None:
    problem = random_problem(10, 4, 20)
    inputs = problem.hidden_ND, problem.weight_VD, problem.targets_N, problem.dnll_N
    alone = linear_loss(*inputs, z_loss=0.1).loss_sum
    assert torch.equal(alone, linear_loss(*inputs, z_loss=0.1, z_weight_N=problem.dnll_N).loss_sum)


def test_a_row_of_weight_zero_has_no_influence_even_if_it_is_nan() -> None:
    problem = random_problem(20, 8, 50)
    problem.dnll_N[4] = problem.dlse_N[4] = 0.0
    expected = run_scalar(problem, 0.1)
    problem.hidden_ND[4] = torch.nan
    found = run_scalar(problem, 0.1)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[3:], expected[3:], strict=True))


def test_a_row_that_is_not_finite_and_counts_makes_loss_and_gradient_nan() -> None:
    problem = random_problem(20, 8, 50)
    problem.hidden_ND[4, 0] = torch.inf
    problem.dnll_N[4] = 1.0
    found = run_scalar(problem)
    assert found[0].isnan()
    assert found[4].isnan().all()


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("kind", OVERFLOWS)
def test_a_row_whose_logits_overflow_is_lost_only_if_it_counts(kind: str, z_loss: float) -> None:
    options = {"softcap": 3.0} if kind == "inf - inf" else {}
    problem = random_problem(30, 8, 257, bias=True, **options)
    base, silent = (run_scalar(p, z_loss) for p in overflowing(problem, kind, 3, 0.0))
    assert not silent[1][3].isfinite()
    assert all(torch.equal(a, b) for a, b in zip([silent[0], *silent[3:]], [base[0], *base[3:]], strict=True))
    lost = run_scalar(overflowing(problem, kind, 3, 1.0)[1], z_loss)
    assert not lost[0].isfinite()
    assert lost[3][3].isnan().all()
    assert lost[4].isnan().all()


def test_a_batch_without_targets_has_loss_zero_and_a_connected_graph() -> None:
    found = run_scalar(random_problem(5, 8, 20, ignored=1.1), 0.1)
    assert len(found) == 5
    assert not any(tensor.any() for tensor in found)


def test_a_frozen_head_gets_no_gradient() -> None:
    problem = random_problem(10, 8, 30)
    hidden_ND = problem.hidden_ND.requires_grad_()
    linear_loss(hidden_ND, problem.weight_VD, problem.targets_N, problem.dnll_N).loss_sum.backward()
    assert problem.weight_VD.grad is None
    assert hidden_ND.grad is not None
