"""linear_nll_vocab_parallel on real gloo ranks against the float64 definition on the whole weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from mixwright.kernels import blocks, late_bound
from mixwright.kernels.linear_nll import TokenLosses, linear_nll, linear_nll_reference
from mixwright.kernels.vocab_parallel import linear_nll_vocab_parallel
from tests.kernels.problems import Problem, assert_all_close, random_problem
from tests.ranks import run_ranks

WORLD = 4
SHARDS = [(150, 107), (64, 193), (100, 1, 156), (70, 60, 127, 0), (0, 200, 7, 50)]  # of 257 classes
ENGINES: dict[str, dict[str, Any]] = {
    "cached": {"engine": "cached"},
    "recompute": {"engine": "recompute"},
    "half": {"cache_bytes": 8 * 20 * 64},
}
FEATURES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "bias and ignored": {"bias": True, "ignored": 0.3},
    "softcap": {"softcap": 3.0},
    "softcap and bias": {"softcap": 3.0, "bias": True},
    "temperature": {"temperature": 0.7},
    "row temperature and softcap": {"temperature": torch.linspace(0.5, 2.0, 37, dtype=torch.float64), "softcap": 2.0},
    "large logits": {"scale": 60.0},
    "entropy": {"entropy": True, "ignored": 0.3},
    "entropy, softcap, temperature, bias": {"entropy": True, "softcap": 3.0, "temperature": 0.7, "bias": True},
    "no token": {"num_tokens": 0},
}


@dataclass(frozen=True)
class Case:
    """A problem on the first `len(sizes)` ranks; rank r holds `sizes[r]` classes."""

    sizes: tuple[int, ...]
    problem: Problem
    options: dict[str, Any] = field(default_factory=dict)


def problem_of(feature: str) -> Problem:
    return random_problem(**({"num_tokens": 37, "hidden_size": 8, "vocabulary": 257} | FEATURES[feature]))


def targets_at_the_edges() -> Problem:
    """First and last class of every shard of (100, 1, 156)."""
    problem = random_problem(10, 8, 257, softcap=3.0)
    return replace(problem, targets_N=torch.tensor([0, 99, 100, 101, 255, 256, 256, 0, 100, 99]))


def shifted(problem: Problem, first: int, last: int, shift: float) -> Problem:
    assert problem.bias_V is not None
    bias_V = problem.bias_V.clone()
    bias_V[first:last] += shift
    return replace(problem, bias_V=bias_V)


def nearly_certain(dtype: torch.dtype) -> Problem:
    """p_y = 1 - 4e-6 or so, in a shard that holds nearly all of the mass."""
    problem = random_problem(6, 2, 8)
    weight_VD = torch.zeros(8, 2, dtype=torch.float64)
    weight_VD[5, 0] = 14.0
    fixed = {"hidden_ND": torch.ones(6, 2, dtype=torch.float64), "targets_N": torch.full((6,), 5)}
    problem = replace(problem, weight_VD=weight_VD, dnll_N=torch.ones(6), dlse_N=torch.zeros(6), **fixed)
    return problem.to(dtype)


def frequent_class_in_16_bits() -> Problem:
    """A thousand rows of one class: what is owed to its shard is a sum that 16 bits cannot count."""
    problem = random_problem(1000, 16, 30, bias=True).to(torch.bfloat16)
    upstream_N = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.5
    one_class = {"hidden_ND": problem.hidden_ND.abs(), "targets_N": torch.full((1000,), 3)}
    return replace(problem, dnll_N=upstream_N, dlse_N=torch.zeros(1000), **one_class)


def dead_rows(weight: float) -> Problem:
    problem = random_problem(37, 8, 257, bias=True)
    problem.hidden_ND[[3, 36]] = torch.nan
    for upstream_N in (problem.dnll_N, problem.dlse_N):
        upstream_N[[3, 36]] = weight
    return problem


def cases() -> dict[str, Case]:
    biased = random_problem(37, 8, 257, bias=True, softcap=5.0)
    plain = random_problem(37, 8, 257, bias=True)
    found = {
        f"{feature} {sizes} {engine}": Case(sizes, problem_of(feature), ENGINES[engine])
        for feature in FEATURES
        for sizes in (SHARDS if feature in ("nothing", "softcap and bias") else SHARDS[2:4])
        for engine in ENGINES
    }
    for engine, options in ENGINES.items():
        found |= {
            f"edges {engine}": Case((100, 1, 156), targets_at_the_edges(), options),
            f"small shard {engine}": Case((150, 107), shifted(plain, 150, 257, -400.0), options),
            f"small first shard {engine}": Case((150, 107), shifted(plain, 0, 150, -30.0), options),
            f"capped below zero {engine}": Case((100, 1, 156), shifted(biased, 0, 257, -20.0), options),
            f"lse far below zero {engine}": Case((100, 1, 156), shifted(plain, 0, 257, -40.0), options),
            f"silent row {engine}": Case((100, 1, 156), dead_rows(0.0), options),
            f"lost row {engine}": Case((100, 1, 156), dead_rows(1.0), options),
            f"all ignored {engine}": Case((100, 1, 156), random_problem(9, 8, 257, ignored=1.1), options),
            f"float32 {engine}": Case((100, 1, 156), plain.to(torch.float32), options),
            f"certain float32 {engine}": Case((3, 5), nearly_certain(torch.float32), options),
            f"certain bfloat16 {engine}": Case((3, 5), nearly_certain(torch.bfloat16), options),
            f"frequent {engine}": Case((15, 15), frequent_class_in_16_bits(), options),
        }
    padded = replace(plain, targets_N=plain.targets_N % 150)
    found["padding shard"] = Case((150, 107), shifted(padded, 150, 257, -torch.inf), ENGINES["cached"])
    rounded = {name: (getattr(plain, name) * 4).round() / 4 for name in ("hidden_ND", "weight_VD", "bias_V")}
    base = replace(plain, dlse_N=torch.zeros_like(plain.dlse_N), **rounded).to(torch.float32)
    for engine, options in ENGINES.items():
        found[f"base {engine}"] = Case((100, 1, 156), base, options)
        found[f"offset {engine}"] = Case((100, 1, 156), shifted(base, 0, 257, 8192.0), options)
    return found


def head_of_shard(group: Any, sizes: tuple[int, ...]) -> Callable[..., TokenLosses]:
    """The vocabulary-parallel head as a function of the whole weight: gradients of other shards' rows stay 0."""
    rank = dist.get_rank(group)
    first, last = (0, *accumulate(sizes))[rank : rank + 2]

    def head(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, bias_V: Tensor | None, **options: Any) -> Any:
        options["bias_v"] = None if bias_V is None else bias_V[first:last]
        shard = {"vocab_group": group, "vocab_start": first}
        return linear_nll_vocab_parallel(hidden_ND, weight_VD[first:last], targets_N, **shard, **options)

    return head


def run_cases() -> dict[str, list[Tensor] | str]:
    """On one rank: results of every case that this rank has a shard of."""
    torch.set_num_threads(1)
    blocks.CPU_CACHED_ROWS, blocks.CPU_SCRATCH_ROWS, late_bound.CPU_SLICE_BYTES = 13, 11, 1
    dist.init_process_group("gloo")
    groups = {world: dist.new_group(list(range(world))) for world in (2, 3, 4)}
    results: dict[str, list[Tensor] | str] = {}
    for name, case in cases().items():
        group = groups[len(case.sizes)]
        if dist.get_rank() < len(case.sizes):
            results[name] = case.problem.run(head_of_shard(group, case.sizes), **case.options)
    results["correct"] = run_statistics(groups[3])
    results["refused"] = run_refused(groups[4])
    results["twice"] = run_twice(groups[2])
    dist.destroy_process_group()
    return results


def run_statistics(group: Any) -> list[Tensor]:
    if dist.get_rank() > 2:
        return []
    problem = random_problem(37, 8, 257, ignored=0.3, scale=10.0)
    head = head_of_shard(group, (100, 1, 156))
    with torch.no_grad():
        inputs = problem.hidden_ND, problem.weight_VD, problem.targets_N
        losses = head(*inputs, bias_V=None, entropy=True, correct=True)
    assert losses.entropy_N is not None
    assert losses.correct_N is not None
    return [losses.nll_N, losses.entropy_N, losses.correct_N]


def run_refused(group: Any) -> str:
    """A class that no shard holds: every rank must raise, none may wait for the others."""
    problem = random_problem(5, 8, 20)
    problem.targets_N[2] = 20
    with pytest.raises(IndexError) as caught:
        problem.run(head_of_shard(group, (5, 5, 5, 5)))
    return str(caught.value)


def run_twice(group: Any) -> list[Tensor]:
    """Gradients of a retained graph, second use, after a first with other upstream gradients."""
    if dist.get_rank() > 1:
        return []
    problem = random_problem(20, 8, 50)
    leaves = problem.hidden_ND.requires_grad_(), problem.weight_VD.requires_grad_()
    losses = head_of_shard(group, (30, 20))(*leaves, problem.targets_N, bias_V=None, engine="cached")
    torch.autograd.grad(losses.lse_N, leaves, problem.dlse_N, retain_graph=True)
    upstream = [problem.dnll_N, problem.dlse_N]
    return list(torch.autograd.grad([losses.nll_N, losses.lse_N], leaves, upstream))


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(run_cases, WORLD)


def assembled(ranks: list[dict[str, Any]], name: str) -> list[Tensor]:
    """Losses and dH of rank 0, which all ranks must share bit by bit, and dW, db put together from the shards."""
    case = cases()[name]
    found = [rank[name] for rank in ranks[: len(case.sizes)]]
    num_shared = 3 if case.problem.dentropy_N is None else 4
    for other in found[1:]:
        for ours, theirs in zip(found[0][:num_shared], other[:num_shared], strict=True):
            assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))
    starts = (0, *accumulate(case.sizes))
    joined = [
        torch.cat([found[r][k][starts[r] : starts[r + 1]] for r in range(len(case.sizes))])
        for k in range(num_shared, len(found[0]))
    ]
    return [*found[0][:num_shared], *joined]


EXACT = [name for name, case in cases().items() if case.problem.hidden_ND.dtype == torch.float64 and "row" not in name]
EXACT += [name for name in cases() if name.startswith("row temperature")]


@pytest.mark.parametrize("name", EXACT)
def test_shards_together_equal_the_whole(ranks: list[dict[str, Any]], name: str) -> None:
    found, expected = assembled(ranks, name), cases()[name].problem.run(linear_nll_reference)
    assert_all_close(found, [tensor.nan_to_num(0.0) for tensor in expected], 1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_float32_shards_are_within_rounding_of_the_reference(ranks: list[dict[str, Any]], engine: str) -> None:
    name = f"float32 {engine}"
    assert_all_close(assembled(ranks, name), cases()[name].problem.run(linear_nll_reference), 2e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_constant_added_to_all_logits_of_all_shards_changes_nothing(ranks: list[dict[str, Any]], engine: str) -> None:
    base, moved = assembled(ranks, f"base {engine}"), assembled(ranks, f"offset {engine}")
    assert_all_close([moved[0], *moved[2:]], [base[0], *base[2:]], 2e-6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_nearly_certain_target_keeps_its_gradient(ranks: list[dict[str, Any]], dtype: str, engine: str) -> None:
    name = f"certain {dtype} {engine}"
    dweight_VD = assembled(ranks, name)[3]
    exact = cases()[name].problem.to(torch.float64).run(linear_nll_reference)[3]
    assert -4e-5 < exact[5, 0] < -2e-5
    assert abs(dweight_VD[5, 0] - exact[5, 0]) <= (4e-7 if dtype == "float32" else 1e-2 * 4e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_frequent_class_is_not_summed_in_16_bits(ranks: list[dict[str, Any]], engine: str) -> None:
    name = f"frequent {engine}"
    exact = cases()[name].problem.to(torch.float64).run(linear_nll_reference)
    for found, expected in zip(assembled(ranks, name)[3:], exact[3:], strict=True):  # of weight and bias
        assert (found.double() - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_row_that_is_not_finite_influences_others_only_if_it_counts(ranks: list[dict[str, Any]], engine: str) -> None:
    silent, lost = assembled(ranks, f"silent row {engine}"), assembled(ranks, f"lost row {engine}")
    problem = cases()[f"silent row {engine}"].problem
    healthy = replace(problem, hidden_ND=problem.hidden_ND.nan_to_num(0.0)).run(linear_nll_reference)
    assert silent[0][[3, 36]].isnan().all()
    assert_all_close([t.nan_to_num(0.0) for t in silent[2:]], healthy[2:], 1e-12)
    assert not silent[3].isnan().any()
    assert lost[2][3].isnan().all()
    assert lost[3].isnan().all()


def test_entropy_and_correct_over_shards_equal_the_reference(ranks: list[dict[str, Any]]) -> None:
    problem = random_problem(37, 8, 257, ignored=0.3, scale=10.0)
    reference = linear_nll_reference(problem.hidden_ND, problem.weight_VD, problem.targets_N)
    assert reference.entropy_N is not None
    for rank in ranks[:3]:
        nll_N, entropy_N, correct_N = rank["correct"]
        assert_all_close([nll_N, entropy_N], [reference.nll_N, reference.entropy_N], 1e-12)
        assert torch.equal(correct_N, reference.correct_N)


def test_a_target_without_an_owner_is_refused_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(ranks):
        assert "target 20 at row 2 is a class of 0 ranks' shards" in rank["refused"]
        assert f"here {5 * number}..{5 * number + 4}" in rank["refused"]


def test_a_retained_graph_of_shards_can_be_used_again(ranks: list[dict[str, Any]]) -> None:
    expected = random_problem(20, 8, 50).run(linear_nll)[2:]
    (dhidden_ND, first_VD), (_, second_VD) = ranks[0]["twice"], ranks[1]["twice"]
    assert_all_close([dhidden_ND, first_VD + second_VD], expected, 1e-12)
