"""linear_nll against its float64 reference, on problems that do not fit blocks, slices or tiles."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mixwright.kernels.linear_nll import linear_nll, linear_nll_reference
from tests.kernels.problems import OVERFLOWS, assert_all_close, overflowing, random_problem

ENGINES: dict[str, dict[str, Any]] = {
    "cached": {"engine": "cached"},
    "recompute": {"engine": "recompute"},
    "half": {"cache_bytes": 8 * 257 * 20},
}
FEATURES: dict[str, dict[str, Any]] = {
    "bias": {"bias": True},
    "ignored": {"ignored": 0.3},
    "softcap": {"softcap": 3.0},
    "temperature": {"temperature": 0.7},
    "row temperature": {"temperature": torch.linspace(0.5, 2.0, 37, dtype=torch.float64)},
    "large logits": {"scale": 30.0},
    "entropy": {"entropy": True},
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 64, 65, 257, 1003])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 37, 64])
def test_every_engine_equals_the_reference_on_awkward_sizes(num_tokens: int, vocabulary: int, engine: str) -> None:
    problem = random_problem(num_tokens, 17, vocabulary)
    assert_all_close(problem.run(linear_nll, **ENGINES[engine]), problem.run(linear_nll_reference), 1e-12)


@pytest.mark.parametrize("hidden_size", [1, 48])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_vocabulary_of_real_size_equals_the_reference(engine: str, hidden_size: int) -> None:
    problem = random_problem(3, hidden_size, 50257, bias=True, softcap=5.0)
    problem.targets_N[:] = torch.tensor([0, 50256, 50176])  # the last two lie in the tail of any block
    assert_all_close(problem.run(linear_nll, **ENGINES[engine]), problem.run(linear_nll_reference), 1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(FEATURES, 2)))
def test_every_pair_of_features_equals_the_reference(first: str, second: str, engine: str) -> None:
    problem = random_problem(37, 8, 257, **(FEATURES[first] | FEATURES[second]))
    assert_all_close(problem.run(linear_nll, **ENGINES[engine]), problem.run(linear_nll_reference), 1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_float32_is_within_rounding_of_the_reference(engine: str) -> None:
    problem = random_problem(64, 48, 1003, bias=True, ignored=0.25, softcap=5.0)
    found = problem.to(torch.float32).run(linear_nll, **ENGINES[engine])
    assert [tensor.dtype for tensor in found] == [torch.float32] * 5
    assert_all_close(found, problem.run(linear_nll_reference), 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", ENGINES)
def test_16_bit_gradients_are_as_exact_as_those_of_torch(dtype: torch.dtype, engine: str) -> None:
    problem = random_problem(64, 48, 257)
    problem = replace(problem, dlse_N=problem.dlse_N * 1e-2).to(dtype)
    exact = problem.to(torch.float64).run(linear_nll_reference)
    hidden_ND, weight_VD = (t.clone().requires_grad_() for t in (problem.hidden_ND, problem.weight_VD))
    logits_NV = functional.linear(hidden_ND, weight_VD).float()
    lse_N = logits_NV.logsumexp(1)
    nll_N = lse_N - logits_NV.gather(1, problem.targets_N[:, None])[:, 0]
    torch.autograd.backward([nll_N, lse_N], [problem.dnll_N, problem.dlse_N])
    found = problem.run(linear_nll, **ENGINES[engine])
    assert found[0].dtype == found[1].dtype == torch.float32
    for ours, torchs, truth in zip(found[2:], (hidden_ND.grad, weight_VD.grad), exact[2:], strict=True):
        assert torchs is not None
        assert (ours.double() - truth).norm() <= 1.5 * (torchs.double() - truth).norm()


def test_precise_losses_of_16_bit_inputs_are_exact_to_float32() -> None:
    problem = random_problem(64, 48, 257, scale=5.0).to(torch.bfloat16)
    exact = problem.to(torch.float64).run(linear_nll_reference)
    assert_all_close(problem.run(linear_nll, precise=True)[:2], exact[:2], 1e-6)


def test_recompute_does_not_depend_on_the_cache_budget_bit_by_bit() -> None:
    problem = random_problem(64, 16, 257).to(torch.float32)
    first = problem.run(linear_nll, engine="recompute", cache_bytes=0)
    second = problem.run(linear_nll, engine="recompute", cache_bytes=1 << 30)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_two_runs_give_the_same_bits(engine: str) -> None:
    problem = random_problem(64, 16, 257, bias=True).to(torch.float32)
    first, second = (problem.run(linear_nll, **ENGINES[engine]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_auto_caches_as_many_rows_as_the_budget_holds() -> None:
    problem = random_problem(40, 8, 100).to(torch.float32)
    exact = [problem.run(linear_nll, engine=engine) for engine in ("cached", "recompute")]
    auto = [problem.run(linear_nll, cache_bytes=budget) for budget in (1 << 30, 399)]
    assert all(torch.equal(a, b) for a, b in zip(exact[0] + exact[1], auto[0] + auto[1], strict=True))


def test_entropy_and_correct_equal_the_reference() -> None:
    problem = random_problem(37, 8, 257, ignored=0.3, bias=True, softcap=3.0, scale=10.0)
    inputs = problem.hidden_ND, problem.weight_VD, problem.targets_N
    ours = linear_nll(*inputs, bias_V=problem.bias_V, entropy=True, correct=True, **problem.options)
    reference = linear_nll_reference(*inputs, bias_V=problem.bias_V, **problem.options)
    assert ours.entropy_N is not None
    torch.testing.assert_close(ours.entropy_N, reference.entropy_N, rtol=1e-12, atol=1e-12)
    assert torch.equal(ours.correct_N, reference.correct_N)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("num_tokens", [0, 1, 37])
@pytest.mark.parametrize("vocabulary", [1, 2, 1003])
def test_entropy_gradients_equal_the_reference_on_awkward_sizes(num_tokens: int, vocabulary: int, engine: str) -> None:
    problem = random_problem(num_tokens, 8, vocabulary, entropy=True, bias=True)
    assert_all_close(problem.run(linear_nll, **ENGINES[engine]), problem.run(linear_nll_reference), 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_entropy_gradients_of_small_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    """Coefficients of a token mean stay outside the matrix of G, which float16 could not hold."""
    problem = random_problem(64, 16, 257, entropy=True).to(dtype)
    assert problem.dentropy_N is not None
    upstream = {name: getattr(problem, name) * 2e-5 for name in ("dnll_N", "dlse_N", "dentropy_N")}
    problem = replace(problem, hidden_ND=problem.hidden_ND * 0.25, **upstream)
    exact = problem.to(torch.float64).run(linear_nll_reference)
    assert_all_close(problem.run(linear_nll)[4:], exact[4:], tolerance)


def test_a_row_without_entropy_gradient_has_the_gradient_of_the_recomputing_engine() -> None:
    problem = random_problem(37, 8, 257, entropy=True)
    silent = replace(problem, dentropy_N=torch.zeros_like(problem.dnll_N))
    plain = replace(problem, dentropy_N=None)
    assert_all_close(silent.run(linear_nll)[3:], plain.run(linear_nll, engine="recompute")[2:], 1e-14)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_dead_row_of_weight_zero_has_no_influence_through_the_entropy(bad: float) -> None:
    problem = random_problem(30, 8, 257, bias=True, entropy=True)
    for upstream_N in (problem.dnll_N, problem.dlse_N, problem.dentropy_N):
        assert upstream_N is not None
        upstream_N[3] = 0.0
    expected = problem.run(linear_nll)
    problem.hidden_ND[3] = bad
    found = problem.run(linear_nll)
    assert found[2][3].isnan()
    assert all(torch.equal(a, b) for a, b in zip(found[3:], expected[3:], strict=True))


def test_extras_are_none_unless_asked_for() -> None:
    problem = random_problem(3, 8, 5)
    losses = linear_nll(problem.hidden_ND, problem.weight_VD, problem.targets_N)
    assert losses.entropy_N is None
    assert losses.correct_N is None


def test_losses_beyond_the_range_of_exp_are_exact() -> None:
    hidden_ND = torch.tensor([[1.0], [1.0]])
    weight_VD = torch.tensor([[0.0], [300.0], [200.0]])
    losses = linear_nll(hidden_ND, weight_VD, torch.tensor([0, 2]))
    assert torch.equal(losses.nll_N, torch.tensor([300.0, 100.0]))
    assert torch.equal(losses.lse_N, torch.tensor([300.0, 300.0]))


@pytest.mark.parametrize("offset", [-10_000.0, -20.0, 20.0, 10_000.0])
@pytest.mark.parametrize("engine", ENGINES)
def test_adding_a_constant_to_all_logits_changes_no_loss_and_no_gradient_of_nll(offset: float, engine: str) -> None:
    problem = random_problem(20, 8, 100, bias=True)
    problem = replace(problem, dlse_N=torch.zeros_like(problem.dlse_N))
    assert problem.bias_V is not None
    moved = replace(problem, bias_V=problem.bias_V + offset)
    base, shifted = (p.run(linear_nll, **ENGINES[engine]) for p in (problem, moved))
    assert_all_close([shifted[0], *shifted[2:]], [base[0], *base[2:]], 1e-11)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_large_exact_offset_costs_float32_no_digit(engine: str) -> None:
    problem = random_problem(20, 8, 100, bias=True)
    assert problem.bias_V is not None
    rounded = {name: (getattr(problem, name) * 4).round() / 4 for name in ("hidden_ND", "weight_VD", "bias_V")}
    problem = replace(problem, dlse_N=torch.zeros_like(problem.dlse_N), **rounded).to(torch.float32)
    assert problem.bias_V is not None
    moved = replace(problem, bias_V=problem.bias_V + 8192.0)  # logits stay multiples of 1/16, lse does not
    base, shifted = (p.run(linear_nll, **ENGINES[engine]) for p in (problem, moved))
    assert_all_close([shifted[0], *shifted[2:]], [base[0], *base[2:]], 2e-6)


def test_permuting_the_vocabulary_permutes_rows_of_the_weight_gradient() -> None:
    problem = random_problem(20, 8, 100)
    order_V = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    permuted = replace(problem, weight_VD=problem.weight_VD[order_V], targets_N=order_V.argsort()[problem.targets_N])
    base, found = problem.run(linear_nll), permuted.run(linear_nll)
    assert_all_close([*found[:3], found[3]], [*base[:3], base[3][order_V]], 1e-12)


def test_permuting_tokens_permutes_losses_and_hidden_gradients() -> None:
    problem = random_problem(20, 8, 100)
    order_N = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    names = ("hidden_ND", "targets_N", "dnll_N", "dlse_N")
    permuted = replace(problem, **{name: getattr(problem, name)[order_N] for name in names})
    base, found = problem.run(linear_nll), permuted.run(linear_nll)
    assert_all_close(found, [*(tensor[order_N] for tensor in base[:3]), base[3]], 1e-12)


def test_splitting_the_batch_sums_the_weight_gradients() -> None:
    problem = random_problem(20, 8, 100)
    names = ("hidden_ND", "targets_N", "dnll_N", "dlse_N")
    halves = [
        replace(problem, **{name: getattr(problem, name)[span] for name in names})
        for span in (slice(7), slice(7, None))
    ]
    parts = [half.run(linear_nll) for half in halves]
    assert_all_close([parts[0][3] + parts[1][3]], [problem.run(linear_nll)[3]], 1e-12)


def test_doubling_the_upstream_gradients_doubles_the_gradients_bit_by_bit() -> None:
    problem = random_problem(20, 8, 100).to(torch.float32)
    doubled = replace(problem, dnll_N=problem.dnll_N * 2, dlse_N=problem.dlse_N * 2)
    base, found = problem.run(linear_nll), doubled.run(linear_nll)
    assert all(torch.equal(a, 2 * b) for a, b in zip(found[2:], base[2:], strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_of_logits_sum_to_zero_over_the_vocabulary(engine: str) -> None:
    problem = random_problem(20, 8, 100, bias=True)
    problem = replace(problem, dlse_N=torch.zeros_like(problem.dlse_N))
    dbias_V = problem.run(linear_nll, **ENGINES[engine])[4]
    assert dbias_V.sum().abs() < 1e-12


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_row_of_weight_zero_has_no_influence_even_if_it_is_not_finite(bad: float, engine: str) -> None:
    problem = random_problem(30, 8, 257, bias=True)
    dead_N = torch.zeros(30, dtype=torch.bool)
    dead_N[[3, 29]] = True
    silenced = replace(problem, **{name: getattr(problem, name) * ~dead_N for name in ("dnll_N", "dlse_N")})
    poisoned = replace(silenced, hidden_ND=torch.where(dead_N[:, None], bad, problem.hidden_ND))
    base, found = (p.run(linear_nll, **ENGINES[engine]) for p in (silenced, poisoned))
    assert found[0][dead_N].isnan().all()
    assert all(torch.equal(a, b) for a, b in zip(found[2:], base[2:], strict=True))


@pytest.mark.parametrize("options", [{}, {"entropy": True}, {"softcap": 3.0}, {"temperature": 0.7}])
@pytest.mark.parametrize("kind", OVERFLOWS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_row_whose_logits_overflow_is_lost_only_if_it_counts(engine: str, kind: str, options: dict[str, Any]) -> None:
    problem = random_problem(30, 8, 257, bias=True, **options)
    for weight in (0.0, 1.0):
        base, found = (p.run(linear_nll, **ENGINES[engine]) for p in overflowing(problem, kind, 3, weight))
        if "softcap" in options and kind != "inf - inf":  # the cap holds infinite logits
            assert all(tensor.isfinite().all() for tensor in found)
        elif weight == 0:
            assert not found[0][3].isfinite()
            assert all(torch.equal(a, b) for a, b in zip(found[-3:], base[-3:], strict=True))
        else:
            assert found[-3][3].isnan().all()
            assert found[-2].isnan().all()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_target_of_probability_zero_and_weight_zero_has_no_influence(engine: str) -> None:
    problem = random_problem(30, 8, 257, bias=True)
    assert problem.bias_V is not None
    problem.bias_V[7] = -torch.inf
    problem.targets_N[problem.targets_N == 7] = 8
    problem.dnll_N[3] = problem.dlse_N[3] = 0
    base = problem.run(linear_nll, **ENGINES[engine])
    problem.targets_N[3] = 7
    found = problem.run(linear_nll, **ENGINES[engine])
    assert found[0][3] == torch.inf
    assert all(torch.equal(a, b) for a, b in zip(found[2:], base[2:], strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_row_that_is_not_finite_and_counts_makes_the_step_visibly_lost(engine: str) -> None:
    problem = random_problem(30, 8, 257)
    problem.hidden_ND[3, 2] = float("nan")
    problem.dnll_N[3] = 1.0
    found = problem.run(linear_nll, **ENGINES[engine])
    assert found[2][3].isnan().all()
    assert found[3].isnan().all()


@pytest.mark.parametrize("engine", ENGINES)
def test_ignored_rows_that_are_not_finite_have_loss_zero_and_no_influence(engine: str) -> None:
    problem = random_problem(30, 8, 257, ignored=0.4)
    ignored_N = problem.targets_N == -100
    poisoned = replace(problem, hidden_ND=torch.where(ignored_N[:, None], torch.nan, problem.hidden_ND))
    base, found = (p.run(linear_nll, **ENGINES[engine]) for p in (problem, poisoned))
    assert all(torch.equal(a, b) for a, b in zip(found, base, strict=True))
    assert not found[2][ignored_N].any()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_without_targets_has_zero_loss_and_a_connected_graph(engine: str) -> None:
    problem = random_problem(5, 8, 20, ignored=1.1, bias=True)
    found = problem.run(linear_nll, **ENGINES[engine])
    assert not any(tensor.any() for tensor in found)
    assert len(found) == 5


def test_a_logit_of_minus_infinity_is_a_class_of_probability_zero() -> None:
    problem = random_problem(10, 8, 20, bias=True)
    assert problem.bias_V is not None
    problem.bias_V[7] = -torch.inf
    problem.targets_N[problem.targets_N == 7] = 8
    found = problem.run(linear_nll)
    assert all(tensor.isfinite().all() for tensor in found)
    assert not found[3][7].any()


def test_equal_logits_give_the_logarithm_of_the_vocabulary() -> None:
    hidden_ND = torch.zeros(3, 4, dtype=torch.float64)
    losses = linear_nll(hidden_ND, torch.ones(50, 4, dtype=torch.float64), torch.tensor([0, 1, 49]), correct=True)
    torch.testing.assert_close(losses.nll_N, torch.full((3,), 50.0, dtype=torch.float64).log())
    assert losses.correct_N is not None
    assert losses.correct_N.all()


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("engine", ENGINES)
def test_layouts_of_inputs_do_not_matter(layout: str, engine: str) -> None:
    problem = random_problem(30, 8, 257)

    def relaid(tensor: Tensor) -> Tensor:
        if layout == "transposed":
            return tensor.T.contiguous().T
        if layout == "sliced":  # a view into poisoned storage: nothing outside it may be read
            storage = torch.full((tensor.shape[0] + 4, tensor.shape[1] + 6), torch.nan, dtype=tensor.dtype)
            storage[2:-2, 3:-3] = tensor
            return storage[2:-2, 3:-3]
        return tensor.unsqueeze(0).expand(1, *tensor.shape)[0]

    hidden_ND, weight_VD = relaid(problem.hidden_ND), relaid(problem.weight_VD)
    leaves = hidden_ND.requires_grad_(), weight_VD.requires_grad_()
    losses = linear_nll(*leaves, problem.targets_N, **ENGINES[engine])
    grads = torch.autograd.grad([losses.nll_N, losses.lse_N], leaves, [problem.dnll_N, problem.dlse_N])
    assert_all_close([losses.nll_N.detach(), losses.lse_N.detach(), *grads], problem.run(linear_nll_reference), 1e-12)
