"""What autograd, torch.compile, ZeRO-3 and careless callers may expect of linear_nll and linear_loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixwright.kernels import linear_loss as linear_loss_module
from mixwright.kernels import linear_nll as linear_nll_module
from mixwright.kernels.linear_loss import linear_loss
from mixwright.kernels.linear_nll import linear_nll, linear_nll_reference
from tests.kernels.problems import assert_all_close, random_problem

ENGINES = ["cached", "recompute"]


@pytest.mark.parametrize("engine", ENGINES)
def test_gradcheck_of_losses_with_all_options(engine: Any) -> None:
    problem = random_problem(5, 3, 7, bias=True, ignored=0.3)
    leaves = [t.requires_grad_() for t in (problem.hidden_ND, problem.weight_VD, problem.bias_V) if t is not None]

    def losses(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor) -> tuple[Tensor, Tensor]:
        options = {"bias_V": bias_V, "softcap": 2.0, "temperature": 0.8, "engine": engine}
        return linear_nll(hidden_ND, weight_VD, problem.targets_N, **options)[:2]

    assert torch.autograd.gradcheck(losses, leaves)


def test_gradcheck_of_the_entropy_with_all_options() -> None:
    problem = random_problem(5, 3, 7, bias=True, ignored=0.3)
    leaves = [t.requires_grad_() for t in (problem.hidden_ND, problem.weight_VD, problem.bias_V) if t is not None]

    def losses(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor) -> tuple[Tensor | None, ...]:
        options = {"bias_V": bias_V, "softcap": 2.0, "temperature": 0.8, "entropy": True}
        return linear_nll(hidden_ND, weight_VD, problem.targets_N, **options)[:3]

    assert torch.autograd.gradcheck(losses, leaves)


@pytest.mark.parametrize("entropy", [False, True])
def test_compiled_with_entropy_equals_eager(entropy: bool) -> None:
    problem = random_problem(32, 8, 50, ignored=0.25, entropy=True).to(torch.float32)
    if not entropy:  # asked for, but no gradient reaches it
        problem = replace(problem, dentropy_N=torch.zeros_like(problem.dnll_N))
    compiled = torch.compile(linear_nll, fullgraph=True, backend="aot_eager")
    assert_all_close(problem.run(compiled), problem.run(linear_nll), 1e-6)


def test_gradcheck_of_the_scalar_loss() -> None:
    problem = random_problem(5, 3, 7, bias=True)
    leaves = [t.requires_grad_() for t in (problem.hidden_ND, problem.weight_VD, problem.bias_V) if t is not None]

    def loss(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
        options = {"bias_V": bias_V, "softcap": 2.0, "z_loss": 0.1}
        return linear_loss(hidden_ND, weight_VD, problem.targets_N, problem.dnll_N, **options).loss_sum

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("num_cached", [0, 4, 9])
def test_opcheck_of_the_late_bound_op(num_cached: int) -> None:
    problem = random_problem(9, 4, 20, bias=True).to(torch.float32)
    leaves = [t.requires_grad_() for t in (problem.hidden_ND, problem.weight_VD, problem.bias_V) if t is not None]
    inputs = (*leaves, problem.targets_N, None, 3.0, -100, num_cached, [True] * 3, False, True, False)
    torch.library.opcheck(linear_nll_module._forward_op, inputs)


def test_opcheck_of_the_stream_op() -> None:
    problem = random_problem(9, 4, 20).to(torch.float32)
    leaves = problem.hidden_ND.requires_grad_(), problem.weight_VD.requires_grad_()
    inputs = (*leaves, None, problem.targets_N, problem.dnll_N, None, None, 0.1, None, -100, [True, True, False], False)
    torch.library.opcheck(linear_loss_module._stream_op, inputs)


def test_compiled_without_graph_breaks_equals_eager_with_ignored_rows() -> None:
    problem = random_problem(32, 8, 50, ignored=0.25).to(torch.float32)
    compiled = torch.compile(linear_nll, fullgraph=True, backend="aot_eager")
    assert_all_close(problem.run(compiled), problem.run(linear_nll), 1e-7)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_retained_graph_can_be_used_again_with_another_upstream_gradient(engine: Any) -> None:
    problem = random_problem(20, 8, 50)
    leaves = problem.hidden_ND.requires_grad_(), problem.weight_VD.requires_grad_()
    losses = linear_nll(*leaves, problem.targets_N, engine=engine)
    torch.autograd.grad(losses.lse_N, leaves, problem.dlse_N, retain_graph=True)
    second = torch.autograd.grad([losses.nll_N, losses.lse_N], leaves, [problem.dnll_N, problem.dlse_N])
    assert_all_close(list(second), problem.run(linear_nll_reference)[2:], 1e-12)


def test_the_scalar_loss_can_be_differentiated_twice_over_a_retained_graph() -> None:
    problem = random_problem(20, 8, 50)
    weight_VD = problem.weight_VD.requires_grad_()
    loss = linear_loss(problem.hidden_ND, weight_VD, problem.targets_N, problem.dnll_N).loss_sum
    (first,) = torch.autograd.grad(loss, weight_VD, torch.tensor(2.0, dtype=torch.float64), retain_graph=True)
    (second,) = torch.autograd.grad(loss, weight_VD)
    assert torch.equal(first, 2 * second)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")])
def test_only_the_gradients_that_are_needed_exist(trained: tuple[str, ...], engine: Any) -> None:
    problem = random_problem(20, 8, 50, bias=True)
    assert problem.bias_V is not None
    tensors = {"hidden": problem.hidden_ND, "weight": problem.weight_VD, "bias": problem.bias_V}
    leaves = {name: t.clone().requires_grad_(name in trained) for name, t in tensors.items()}
    losses = linear_nll(leaves["hidden"], leaves["weight"], problem.targets_N, bias_V=leaves["bias"], engine=engine)
    torch.autograd.backward([losses.nll_N, losses.lse_N], [problem.dnll_N, problem.dlse_N])
    everything = dict(zip(tensors, problem.run(linear_nll)[2:], strict=True))
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in trained)
        if leaf.grad is not None:
            assert_all_close([leaf.grad], [everything[name]], 1e-12)


def test_only_lse_may_be_used() -> None:
    problem = random_problem(20, 8, 50)
    leaves = problem.hidden_ND.requires_grad_(), problem.weight_VD.requires_grad_()
    found = torch.autograd.grad(linear_nll(*leaves, problem.targets_N).lse_N, leaves, problem.dlse_N)
    silent = replace(problem, dnll_N=torch.zeros_like(problem.dnll_N))
    assert_all_close(list(found), silent.run(linear_nll_reference)[2:], 1e-12)


def test_no_cache_is_kept_without_gradients() -> None:
    problem = random_problem(20, 8, 50)
    with torch.no_grad():
        losses = linear_nll(problem.hidden_ND.requires_grad_(), problem.weight_VD, problem.targets_N)
    assert not losses.nll_N.requires_grad
    assert torch.equal(losses.nll_N, problem.run(linear_nll, engine="recompute")[0])
    # Engine A writes its logits elsewhere: a matmul may round the last bit by where its result lies in memory.
    assert_all_close([losses.nll_N], [problem.run(linear_nll, engine="cached")[0]], 1e-15)


@pytest.mark.parametrize("engine", ENGINES)
def test_inputs_are_never_written_to(engine: Any) -> None:
    problem = random_problem(20, 8, 50, bias=True, softcap=2.0, ignored=0.2)
    tensors = [problem.hidden_ND, problem.weight_VD, problem.targets_N, problem.bias_V]
    before = [(t.clone(), t._version) for t in tensors if t is not None]
    leaves = [t.requires_grad_() for t in (problem.hidden_ND, problem.weight_VD)]
    losses = linear_nll(*leaves, problem.targets_N, bias_V=problem.bias_V, engine=engine, **problem.options)
    torch.autograd.backward([losses.nll_N, losses.lse_N], [problem.dnll_N, problem.dlse_N])
    for (values, version), tensor in zip(before, [t for t in tensors if t is not None], strict=True):
        assert torch.equal(tensor, values)
        assert tensor._version == version


class PartitionedHead(nn.Module):
    """A head whose parameter has its data only while the module runs, forward or backward, as under ZeRO-3."""

    def __init__(self, weight_VD: Tensor, engine: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_VD.clone())
        self.engine = engine
        self._shard = weight_VD.clone()
        self._release()
        self.register_full_backward_pre_hook(lambda *_: self._gather())

    def forward(self, hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        self._gather()
        losses = linear_nll(hidden_ND, self.weight, targets_N, engine=self.engine)
        self._release()
        return losses.nll_N, losses.lse_N

    def _gather(self) -> None:
        self.weight.data = self._shard

    def _release(self) -> None:
        self.weight.data = torch.empty(0, dtype=self._shard.dtype)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_weight_may_be_absent_between_forward_and_backward_as_under_zero_3(engine: Any) -> None:
    problem = random_problem(20, 8, 50)
    head = PartitionedHead(problem.weight_VD, engine)
    hidden_ND = problem.hidden_ND.requires_grad_()
    torch.autograd.backward(head(hidden_ND, problem.targets_N), [problem.dnll_N, problem.dlse_N])
    assert hidden_ND.grad is not None
    assert head.weight.grad is not None
    assert_all_close([hidden_ND.grad, head.weight.grad], problem.run(linear_nll_reference)[2:], 1e-12)


def bad_inputs() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    return {
        "hidden size": (
            {"weight_VD": torch.zeros(7, 5)},
            ValueError,
            r"hidden \[3, 4\] and weight \[7, 5\] do not fit",
        ),
        "rank": ({"hidden_ND": torch.zeros(1, 3, 4)}, ValueError, r"expected \[N, D\]"),
        "no class": ({"weight_VD": torch.zeros(0, 4)}, ValueError, "at least one class"),
        "targets' shape": (
            {"targets_N": torch.zeros(2, dtype=torch.int64)},
            ValueError,
            r"shape \[2\], expected \[3\]",
        ),
        "targets' dtype": ({"targets_N": torch.zeros(3, dtype=torch.int32)}, TypeError, "int32, expected torch.int64"),
        "integer hidden": ({"hidden_ND": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "expected one of float32"),
        "mixed dtypes": ({"weight_VD": torch.zeros(7, 4).bfloat16()}, TypeError, "weight is torch.bfloat16 but hidden"),
        "bias' shape": ({"bias_V": torch.zeros(6)}, ValueError, r"bias has shape \[6\], expected \[7\]"),
        "device": (
            {"weight_VD": torch.zeros(7, 4, device="meta")},
            ValueError,
            "weight is on meta but hidden is on cpu",
        ),
        "softcap": ({"softcap": 0.0}, ValueError, "softcap is 0.0, expected a positive"),
        "temperature": ({"temperature": -1.0}, ValueError, "temperature is -1.0, expected a positive"),
        "temperature rows": ({"temperature": torch.ones(2)}, ValueError, r"temperature has shape \[2\]"),
        "target too large": (
            {"targets_N": torch.tensor([0, 7, 1])},
            IndexError,
            r"target 7 at row 1 is outside 0\.\.6",
        ),
        "negative target": (
            {"targets_N": torch.tensor([0, 1, -1])},
            IndexError,
            "target -1 at row 2 .* ignore_index=-100",
        ),
    }


@pytest.mark.parametrize("case", bad_inputs())
def test_bad_inputs_are_refused_in_one_clear_line(case: str) -> None:
    changed, error, message = bad_inputs()[case]
    inputs = {
        "hidden_ND": torch.zeros(3, 4),
        "weight_VD": torch.zeros(7, 4),
        "targets_N": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(error, match=message) as caught:
        linear_nll(**(inputs | changed))
    assert "\n" not in str(caught.value)
    with pytest.raises(error, match=message):
        linear_loss(row_weight_N=torch.ones(3), **(inputs | changed))


def test_unknown_engine_negative_budget_and_trained_temperature_are_refused() -> None:
    problem = random_problem(3, 4, 5)
    inputs = problem.hidden_ND.requires_grad_(), problem.weight_VD, problem.targets_N
    with pytest.raises(ValueError, match="engine is 'stream', expected"):
        linear_nll(*inputs, engine="stream")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cache_bytes is -1"):
        linear_nll(*inputs, cache_bytes=-1)
    with pytest.raises(ValueError, match="temperature requires a gradient"):
        linear_nll(*inputs, temperature=torch.ones(3, requires_grad=True))


def test_row_weights_of_the_scalar_loss_are_checked() -> None:
    problem = random_problem(3, 4, 5)
    inputs = problem.hidden_ND, problem.weight_VD, problem.targets_N
    with pytest.raises(ValueError, match=r"row_weight has shape \[2\], expected \[3\]"):
        linear_loss(*inputs, torch.ones(2))
    with pytest.raises(ValueError, match="z_weight requires a gradient"):
        linear_loss(*inputs, torch.ones(3), z_weight_N=torch.ones(3, requires_grad=True))
    with pytest.raises(ValueError, match="z_loss is nan"):
        linear_loss(*inputs, torch.ones(3), z_loss=float("nan"))
