"""RowShardedSphericalZLoss on real gloo ranks against the dense head in one process that sees all tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from mixwright.kernels import spherical_z
from mixwright.kernels.spherical_z import SphericalZLoss, spherical_z_reference
from mixwright.kernels.spherical_z_sharded import RowShardedSphericalZLoss
from tests.ranks import run_ranks

WORLD, HIDDEN, CLASSES = 4, 6, 50
OPTIONS = {"sharpness": 1.3, "location": 0.4}


@dataclass(frozen=True)
class Case:
    """Classes and tokens of each rank; `parts` micro-batches to an optimizer step."""

    sizes: tuple[int, ...]
    tokens: tuple[int, ...]
    parts: int = 1
    dtype: torch.dtype = torch.float64
    ignored: float = 0.2


CASES = {
    "two ranks": Case((25, 25), (8, 8)),
    "uneven shards": Case((7, 43), (8, 8)),
    "uneven tokens": Case((20, 5, 25), (3, 11, 6)),
    "an empty shard": Case((20, 0, 30), (5, 6, 4)),
    "a last empty shard": Case((20, 30, 0), (5, 6, 4)),
    "a rank without tokens": Case((20, 5, 25), (9, 0, 7)),
    "nobody has a token": Case((25, 25), (0, 0)),
    "everything ignored": Case((20, 5, 25), (3, 4, 5), ignored=1.1),
    "accumulation": Case((20, 5, 25), (3, 11, 6), parts=3),
    "four ranks, accumulation, uneven": Case((1, 30, 0, 19), (8, 1, 0, 13), parts=4),
    "float32": Case((20, 5, 25), (3, 11, 6), parts=2, dtype=torch.float32),
}


def inputs_of(case: Case) -> tuple[list[Tensor], Tensor, list[Tensor], list[Tensor]]:
    """Per rank: hidden, targets and upstream gradients; and the whole weight, with an offset."""
    generator = torch.Generator().manual_seed(len(case.sizes))
    weight_VD = (torch.randn(CLASSES, HIDDEN, generator=generator, dtype=torch.float64) + 3).to(case.dtype)
    hidden, targets, upstream = [], [], []
    for num_tokens in case.tokens:
        hidden.append(torch.randn(num_tokens, HIDDEN, generator=generator, dtype=torch.float64).to(case.dtype))
        targets_N = torch.randint(0, CLASSES, (num_tokens,), generator=generator)
        targets_N[torch.rand(num_tokens, generator=generator) < case.ignored] = -100
        targets.append(targets_N)
        upstream.append(torch.randn(num_tokens, generator=generator, dtype=torch.float64).to(case.dtype))
    return hidden, weight_VD, targets, upstream


def run_step(head: Any, case: Case, hidden_ND: Tensor, targets_N: Tensor, upstream_N: Tensor) -> list[Tensor]:
    """[loss, dhidden, dweight] of one optimizer step in `case.parts` micro-batches, of which some may be empty."""
    hidden_ND = hidden_ND.clone().requires_grad_()
    losses = []
    for part in range(case.parts):
        rows = slice(part * len(targets_N) // case.parts, (part + 1) * len(targets_N) // case.parts)
        losses.append(head(hidden_ND[rows], targets_N[rows]))
        losses[-1].backward(upstream_N[rows])
    head.finish_gradient()
    assert hidden_ND.grad is not None
    return [torch.cat(losses).detach(), hidden_ND.grad, head.weight.grad.clone()]


def run_cases() -> dict[str, Any]:
    torch.set_num_threads(1)
    spherical_z.ROWS_PER_SLICE = 17
    dist.init_process_group("gloo")
    groups: dict[int, Any] = {world: dist.new_group(list(range(world))) for world in (2, 3, 4)}
    rank, results = dist.get_rank(), {}
    for name, case in CASES.items():
        if rank < len(case.sizes):
            hidden, weight_VD, targets, upstream = inputs_of(case)
            head = head_of_rank(weight_VD, case.sizes, groups[len(case.sizes)])
            results[name] = run_step(head, case, hidden[rank], targets[rank], upstream[rank])
    for optimizer in OPTIMIZERS:
        results[optimizer] = train(optimizer, groups[4])
    results["refused"] = run_refused(groups[4])
    results["forgotten"] = run_forgotten(groups[4])
    results["dead"] = run_dead_row(groups[4])
    results["one rank knows"] = run_changed_on_one_rank(groups[4])
    dist.destroy_process_group()
    return results


def head_of_rank(weight_VD: Tensor, sizes: tuple[int, ...], group: Any) -> RowShardedSphericalZLoss:
    first, last = (0, *accumulate(sizes))[dist.get_rank(group) :][:2]
    return RowShardedSphericalZLoss(nn.Parameter(weight_VD[first:last].clone()), shard_group=group, **OPTIONS)


OPTIMIZERS = ["SGD", "Adam", "AdamW fused", "RMSprop", "Adagrad"]
TRAINED = Case((1, 30, 0, 19), (8, 1, 0, 13), parts=2)


def train(optimizer: str, group: Any) -> list[Tensor]:
    """This rank's rows after three steps; a rank without rows never changes its weight, yet must form moments."""
    hidden, weight_VD, targets, upstream = inputs_of(TRAINED)
    rank = dist.get_rank(group)
    head = head_of_rank(weight_VD, TRAINED.sizes, group)
    return steps(head, optimizer, hidden[rank], targets[rank], upstream[rank])


def steps(head: Any, optimizer: str, hidden_ND: Tensor, targets_N: Tensor, upstream_N: Tensor) -> list[Tensor]:
    name, *form = optimizer.split()
    stepper = getattr(torch.optim, name)(head.parameters(), lr=0.05, **dict.fromkeys(form, True))
    for _ in range(3):
        stepper.zero_grad()
        run_step(head, TRAINED, hidden_ND, targets_N, upstream_N)
        stepper.step()
    return [head.weight.detach()]


def run_refused(group: Any) -> list[str]:
    """Rank 1 has a target that is no class, then a hidden state of another dtype."""
    hidden, weight_VD, targets, _ = inputs_of(TRAINED)
    rank, messages = dist.get_rank(group), []
    head = head_of_rank(weight_VD, TRAINED.sizes, group)
    for bad in ("target", "dtype"):
        hidden_ND, targets_N = hidden[rank], targets[rank].clone()
        if rank == 1 and bad == "target":
            targets_N[0] = CLASSES
        if rank == 1 and bad == "dtype":
            hidden_ND = hidden_ND.float()
        with pytest.raises((IndexError, TypeError, RuntimeError)) as caught:
            head(hidden_ND, targets_N)
        messages.append(f"{caught.type.__name__}: {caught.value}")
    return messages


def run_forgotten(group: Any) -> str:
    """A step without finish_gradient; the rank without rows does not notice by itself."""
    hidden, weight_VD, targets, upstream = inputs_of(TRAINED)
    rank = dist.get_rank(group)
    head = head_of_rank(weight_VD, TRAINED.sizes, group)
    head(hidden[rank], targets[rank]).backward(upstream[rank])
    torch.optim.SGD(head.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError) as caught:
        head(hidden[rank], targets[rank])
    return str(caught.value)


def run_dead_row(group: Any) -> list[Tensor]:
    hidden, weight_VD, targets, upstream = inputs_of(TRAINED)
    rank = dist.get_rank(group)
    if rank == 3:
        hidden[3][5], upstream[3][5], targets[3][5] = torch.nan, 0.0, 7
    return run_step(head_of_rank(weight_VD, TRAINED.sizes, group), TRAINED, hidden[rank], targets[rank], upstream[rank])


def run_changed_on_one_rank(group: Any) -> Tensor:
    """Losses after rank 1 alone changed its rows, past the version counter, and said so."""
    hidden, weight_VD, targets, _ = inputs_of(TRAINED)
    rank = dist.get_rank(group)
    head = head_of_rank(weight_VD, TRAINED.sizes, group)
    head(hidden[rank], targets[rank])
    if rank == 1:
        head.weight.data.mul_(2)
        head.invalidate()
    return head(hidden[rank], targets[rank]).detach()


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(run_cases, WORLD)


@pytest.mark.parametrize("name", CASES)
def test_rows_on_ranks_equal_the_dense_head_in_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    case = CASES[name]
    hidden, weight_VD, targets, upstream = inputs_of(case)
    found = [rank[name] for rank in ranks[: len(case.sizes)]]
    dense = SphericalZLoss(nn.Parameter(weight_VD.double()), **OPTIONS)
    everything = torch.cat(hidden).double(), torch.cat(targets), torch.cat(upstream).double()
    expected = run_step(dense, Case((CLASSES,), (sum(case.tokens),)), *everything)
    tolerance = 1e-12 if case.dtype == torch.float64 else 1e-6
    for position, exact in enumerate(expected):
        ours = torch.cat([rank[position] for rank in found]).double()
        torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance)


def test_the_dense_head_is_the_definition() -> None:
    hidden, weight_VD, targets, _ = inputs_of(Case((50,), (12,), ignored=0))
    found_N = SphericalZLoss(nn.Parameter(weight_VD), **OPTIONS)(hidden[0], targets[0]).detach()
    torch.testing.assert_close(found_N, spherical_z_reference(hidden[0], weight_VD, targets[0], **OPTIONS))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_moments_follow_the_shards_under_every_optimizer(ranks: list[dict[str, Any]], optimizer: str) -> None:
    hidden, weight_VD, targets, upstream = inputs_of(TRAINED)
    dense = SphericalZLoss(nn.Parameter(weight_VD.clone()), **OPTIONS)
    (expected_VD,) = steps(dense, optimizer, torch.cat(hidden), torch.cat(targets), torch.cat(upstream))
    found_VD = torch.cat([rank[optimizer][0] for rank in ranks])
    assert (expected_VD - weight_VD).abs().max() > 1e-3
    torch.testing.assert_close(found_VD, expected_VD, rtol=1e-9, atol=1e-10)


def test_what_one_rank_invalidates_all_of_them_form_again(ranks: list[dict[str, Any]]) -> None:
    hidden, weight_VD, targets, _ = inputs_of(TRAINED)
    weight_VD[1:31] *= 2
    expected_N = SphericalZLoss(nn.Parameter(weight_VD), **OPTIONS)(torch.cat(hidden), torch.cat(targets)).detach()
    torch.testing.assert_close(torch.cat([rank["one rank knows"] for rank in ranks]), expected_N)


def test_bad_input_of_one_rank_is_refused_on_all_of_them(ranks: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(ranks):
        if number == 1:
            assert rank["refused"][0] == "IndexError: target 50 at row 0 is outside 0..49"
            assert rank["refused"][1].startswith("TypeError: weight is torch.float64 but hidden is torch.float32")
        else:
            expected = "RuntimeError: SphericalZLoss: input was refused on ranks [1] of the shard group"
            assert rank["refused"] == [expected] * 2


def test_a_step_without_finish_gradient_is_refused_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    assert all("before finish_gradient()" in rank["forgotten"] for rank in ranks)


def test_a_dead_row_of_weight_zero_reaches_no_owner(ranks: list[dict[str, Any]]) -> None:
    assert ranks[3]["dead"][0][5].isnan()
    assert all(rank["dead"][2].isfinite().all() for rank in ranks)
