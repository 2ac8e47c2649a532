"""Bugs found in other fused heads (spec/kernels.md section 7), each as a test that such a bug would fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mixwright.kernels.linear_loss import linear_loss
from mixwright.kernels.linear_nll import linear_nll, linear_nll_reference
from tests.kernels.problems import assert_all_close, random_problem

ENGINES = ["cached", "recompute"]


@pytest.mark.parametrize("shift", [0.0, -20.0])
@pytest.mark.parametrize("engine", ENGINES)
def test_softcap_does_not_revive_the_tail_of_the_vocabulary(shift: float, engine: Any) -> None:
    """Liger, CCE, Unsloth: columns padded with -inf became -cap and entered the sum."""
    problem = random_problem(20, 8, 1001, bias=True, softcap=5.0)
    assert problem.bias_V is not None
    problem = replace(problem, bias_V=problem.bias_V + shift)
    assert_all_close(problem.run(linear_nll, engine=engine), problem.run(linear_nll_reference), 1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_phantom_column_of_logit_zero_enters_the_sum(engine: Any) -> None:
    """verl: zero-filled tail columns shifted lse; fatal where lse is near or below 0, as z-loss makes it."""
    problem = random_problem(20, 8, 1001, bias=True)
    assert problem.bias_V is not None
    problem = replace(problem, bias_V=problem.bias_V - 40.0)
    assert (problem.run(linear_nll_reference)[1] < -20).all()
    assert_all_close(problem.run(linear_nll, engine=engine), problem.run(linear_nll_reference), 1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_each_row_has_its_own_upstream_gradient(engine: Any) -> None:
    """Liger's reduction="none" multiplied all rows by the upstream gradient of the first."""
    problem = random_problem(20, 8, 50)
    one_row_N = torch.zeros(20, dtype=torch.float64)
    one_row_N[7] = 1.0
    problem = replace(problem, dnll_N=one_row_N, dlse_N=torch.zeros_like(one_row_N))
    dhidden_ND = problem.run(linear_nll, engine=engine)[2]
    assert dhidden_ND[7].any()
    assert not dhidden_ND[:7].any()
    assert not dhidden_ND[8:].any()


@pytest.mark.parametrize("engine", ENGINES)
def test_gradient_of_a_nearly_certain_target_is_as_exact_as_that_of_torch(engine: Any) -> None:
    """Liger wrote the true class in 16 bits, read it back and subtracted 1: no digit left at p = 0.999."""
    hidden_ND = torch.tensor([[1.0]], dtype=torch.float64)
    weight_VD = torch.tensor([[14.0], [0.0], [0.0]], dtype=torch.float64)

    def dweight(dtype: torch.dtype) -> torch.Tensor:
        leaf_VD = weight_VD.detach().clone().to(dtype).requires_grad_()
        linear_nll(hidden_ND.to(dtype), leaf_VD, torch.tensor([0]), engine=engine).nll_N.sum().backward()
        assert leaf_VD.grad is not None
        return leaf_VD.grad[0, 0]

    exact = dweight(torch.float64)
    single = torch.log_softmax((hidden_ND @ weight_VD.T).float().requires_grad_(), 1)
    assert -2e-6 < exact < -1e-6
    assert abs(dweight(torch.float32) - exact) <= abs((single[0, 0].exp() - 1).double() - exact) + 6e-8
    assert abs(dweight(torch.bfloat16) - exact) <= 6e-8


def test_weight_gradient_does_not_lose_digits_with_the_number_of_blocks() -> None:
    """Liger, Unsloth, torch: dW accumulated in 16 bits over chunks, so that the chunk size changed the training."""
    problem = random_problem(1000, 16, 30).to(torch.bfloat16)
    row_weight_N = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    problem = replace(problem, dnll_N=row_weight_N, dlse_N=torch.zeros(1000))
    exact = problem.to(torch.float64).run(linear_nll_reference)[3]
    weight_VD = problem.weight_VD.clone().requires_grad_()
    linear_loss(problem.hidden_ND, weight_VD, problem.targets_N, row_weight_N).loss_sum.backward()
    assert weight_VD.grad is not None
    for found_VD in (problem.run(linear_nll, engine="recompute")[3], weight_VD.grad):
        assert (found_VD.double() - exact).norm() < 4e-3 * exact.norm()


@pytest.mark.parametrize("offset", [1e4, 1e8])
def test_loss_survives_a_large_common_offset(offset: float) -> None:
    """torch, MLX: lse - z_y with a rounded lse gives 0 (or worse) at large offsets."""
    hidden_ND = torch.tensor([[offset]])
    losses = linear_nll(hidden_ND, torch.ones(7, 1), torch.tensor([3]))
    torch.testing.assert_close(losses.nll_N, torch.tensor([7.0]).log())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_loss_is_negative(dtype: torch.dtype) -> None:
    """An exact target logit beside an lse of rounded logits made losses of sure predictions negative."""
    problem = random_problem(200, 16, 50, scale=20.0).to(dtype)
    best_N = (problem.hidden_ND @ problem.weight_VD.T).argmax(1)
    assert (linear_nll(problem.hidden_ND, problem.weight_VD, best_N).nll_N >= 0).all()


def test_tiny_gradients_of_rare_classes_are_not_filtered() -> None:
    """CCE drops blocks of small probabilities before the row weight multiplies them: rare classes are never pushed."""
    problem = random_problem(20, 8, 600, bias=True).to(torch.float32)
    assert problem.bias_V is not None
    problem.bias_V[300:] -= 15.0
    problem = replace(problem, dnll_N=problem.dnll_N * 1e4)
    problem.targets_N.remainder_(300)
    exact = problem.to(torch.float64).run(linear_nll_reference)[3][300:]
    assert_all_close([problem.run(linear_nll)[3][300:]], [exact], 1e-4)


def test_bias_gradient_includes_every_block() -> None:
    """CCE returned from filtered blocks before adding their bias gradient."""
    problem = random_problem(100, 8, 600, bias=True, scale=20.0)
    assert_all_close([problem.run(linear_nll)[4]], [problem.run(linear_nll_reference)[4]], 1e-12)


def test_upstream_gradient_scales_and_is_not_averaged() -> None:
    """Unsloth took the mean of grad_output, or asserted that it is 1: wrong under DDP and loss scaling."""
    problem = random_problem(10, 8, 30)
    weight_VD = problem.weight_VD.requires_grad_()
    losses = linear_nll(problem.hidden_ND, weight_VD, problem.targets_N)
    (plain,) = torch.autograd.grad((losses.nll_N * problem.dnll_N).sum(), weight_VD, retain_graph=True)
    (scaled,) = torch.autograd.grad((losses.nll_N * problem.dnll_N).sum() * 65536.0, weight_VD)
    assert torch.equal(scaled, plain * 65536.0)


def test_every_row_of_reused_memory_is_written() -> None:
    """Liger returned early for ignored rows without storing, and read stale memory once zero-filling was removed."""
    problem = random_problem(64, 8, 50, ignored=0.5, bias=True)
    for _ in range(5):
        stale = [torch.full((64, 50), torch.nan, dtype=torch.float64) for _ in range(4)]
        del stale
        assert_all_close(problem.run(linear_nll), problem.run(linear_nll_reference), 1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_entropy_gradient_is_not_dropped(engine: Any) -> None:
    """TRL returned an entropy whose gradient it silently ignored."""
    problem = random_problem(10, 8, 30, entropy=True)
    problem = replace(problem, dnll_N=torch.zeros(10), dlse_N=torch.zeros(10))
    found = problem.run(linear_nll, engine=engine)
    assert found[3].any()
    assert_all_close(found, problem.run(linear_nll_reference), 1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_softcap_derivative_enters_every_block(engine: Any) -> None:
    """Levanter's block backward left out the factor 1 - tanh**2."""
    problem = random_problem(20, 8, 600, softcap=0.5, scale=3.0)
    assert_all_close(problem.run(linear_nll, engine=engine)[2:], problem.run(linear_nll_reference)[2:], 1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_float16_gradients_of_a_token_mean_do_not_underflow(engine: Any) -> None:
    """Coefficients of 1e-6 times hidden states of 1e-2 are zero in float16 unless they are scaled first."""
    problem = random_problem(64, 16, 50).to(torch.float16)
    problem = replace(problem, hidden_ND=problem.hidden_ND * 1e-2, dlse_N=problem.dlse_N * 0)
    problem = replace(problem, dnll_N=torch.full((64,), 2e-5))
    problem.targets_N.zero_()
    exact = problem.to(torch.float64).run(linear_nll_reference)[3]
    found = problem.run(linear_nll, engine=engine)[3]
    assert (found[0].double() - exact[0]).norm() < 2e-2 * exact[0].norm()
