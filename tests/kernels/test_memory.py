"""Memory that the heads ask for: nothing is read before it is written, and nothing is made that nobody asked for."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mixwright.kernels import blocks, vocab_parallel
from mixwright.kernels.blocks import Needs, RowOptions, rows_per_cached_block
from mixwright.kernels.head_inputs import HeadInputs
from mixwright.kernels.late_bound import backward_late_bound, forward_late_bound
from mixwright.kernels.linear_loss import linear_loss
from mixwright.kernels.linear_nll import linear_nll
from mixwright.kernels.spherical_z import SphericalZLoss
from tests.kernels.problems import random_problem

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, and an operation whose result may depend on the order of threads raises."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"engine": "cached"}, {"engine": "recompute"}, {"cache_bytes": 4000}])
@pytest.mark.parametrize("entropy", [False, True])
def test_late_bound_heads_write_before_they_read(entropy: bool, options: Any, dtype: torch.dtype) -> None:
    problem = random_problem(37, 8, 257, bias=True, ignored=0.3, softcap=3.0, entropy=entropy).to(dtype)
    assert all(tensor.isfinite().all() for tensor in problem.run(linear_nll, correct=True, **options))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scalar_loss_writes_before_it_reads(dtype: torch.dtype) -> None:
    problem = random_problem(37, 8, 257, ignored=0.3).to(dtype)
    leaves = problem.hidden_ND.requires_grad_(), problem.weight_VD.requires_grad_()
    loss = linear_loss(*leaves, problem.targets_N, problem.dnll_N, z_loss=0.1).loss_sum
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, leaves))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("deferred", [False, True])
def test_the_spherical_head_writes_before_it_reads(deferred: bool) -> None:
    problem = random_problem(37, 8, 257)
    head = SphericalZLoss(nn.Parameter(problem.weight_VD), deferred=deferred)
    head(problem.hidden_ND, problem.targets_N).backward(problem.dnll_N)
    head.finish_gradient()
    assert head.weight.grad is not None
    assert head.weight.grad.isfinite().all()


class Shapes(TorchDispatchMode):
    """Remembers the shape of everything that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen |= {tuple(value.shape) for value in tree_iter(result) if isinstance(value, Tensor)}
        return result


def shapes_of(needs: Needs, num_cached: int) -> set[tuple[int, ...]]:
    problem = random_problem(200, 8, 257)
    head = HeadInputs(problem.hidden_ND, problem.weight_VD, None, problem.targets_N, None, None, -100)
    with Shapes() as shapes:
        _, saved = forward_late_bound(head, num_cached, needs.hidden, RowOptions())
        backward_late_bound(head, saved, problem.dnll_N, problem.dlse_N, needs, precise=False)
    return shapes.seen


@pytest.mark.parametrize("num_cached", [0, 200])
def test_a_frozen_head_has_no_buffer_of_the_size_of_its_weight(num_cached: int) -> None:
    assert (257, 8) in shapes_of(Needs(True, True, False), num_cached)
    assert (257, 8) not in shapes_of(Needs(True, False, False), num_cached)


def test_the_recomputing_engine_never_holds_logits_of_all_tokens_and_classes() -> None:
    needs = Needs(True, True, False)
    largest = [max(shape[0] * shape[1] for shape in shapes_of(needs, n) if len(shape) == 2) for n in (200, 0)]
    assert largest[0] == 200 * 257
    assert largest[1] <= 200 * 256  # one slice of the backward, at its least width


def test_logits_that_do_not_fit_the_cache_take_blocks_of_a_bounded_scratch_on_a_gpu() -> None:
    pytest.importorskip("triton")
    vocabulary, gpu = 131_072, torch.device("cuda")
    assert rows_per_cached_block(vocabulary, torch.bfloat16, gpu, precise=False) == 8192
    assert rows_per_cached_block(vocabulary, torch.float32, gpu, precise=True) == 8192
    rows = rows_per_cached_block(vocabulary, torch.bfloat16, gpu, precise=True)
    assert rows * vocabulary * 4 == blocks.GPU_SCRATCH_BYTES
    assert rows_per_cached_block(100, torch.bfloat16, gpu, precise=True) == 8192


@pytest.mark.parametrize("sharded", [False, True])
def test_float32_logits_of_a_block_are_dropped_before_the_next_are_made(
    sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Tensor]] = []
    raw_logits = blocks.raw_logits

    def watched(*inputs: Any, **options: Any) -> Tensor:
        assert not made or made[-1]() is None
        logits_nv = raw_logits(*inputs, **options)
        made.append(weakref.ref(logits_nv))
        return logits_nv

    monkeypatch.setattr(blocks, "raw_logits", watched)
    problem = random_problem(37, 8, 50).to(torch.bfloat16)
    head = HeadInputs(problem.hidden_ND, problem.weight_VD, None, problem.targets_N, None, None, -100)
    if sharded:
        cache_NV, unit_ND = problem.hidden_ND.new_empty(37, 50), torch.empty_like(problem.hidden_ND)
        vocab_parallel._shard_pass(head, cache_NV, unit_ND, RowOptions(precise=True))
    else:
        forward_late_bound(head, 37, True, RowOptions(precise=True))
    assert len(made) == 3
