"""linear_ensemble_kl against its definition; golden ensemble predictions; vocabularies of different sizes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixwright.kernels.ensemble_kl import Teacher, ensemble_kl_reference, linear_ensemble_kl

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "kernel_vectors.json").read_text())
SHARES = [0.5, 0.2, 0.3]


def random_ensemble(num_tokens: int = 30, vocabulary: int = 40) -> tuple[Tensor, Tensor, list[Teacher], Tensor]:
    """Student hidden and weight, three teachers of different hidden sizes, upstream gradients; float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    teachers = [Teacher(normal(num_tokens, size), normal(vocabulary, size)) for size in (4, 7, 9)]
    return normal(num_tokens, 6), normal(vocabulary, 6), teachers, normal(num_tokens)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("pooling", ["arithmetic", "logits"])
@pytest.mark.parametrize("num_tokens", [0, 1, 30])
def test_values_and_gradients_equal_the_definition(num_tokens: int, pooling: Any, temperature: float) -> None:
    hidden_ND, weight_VD, teachers, upstream_N = random_ensemble(num_tokens)
    leaves = hidden_ND.requires_grad_(), weight_VD.requires_grad_()
    options: dict[str, Any] = {"proportions": SHARES, "pooling": pooling, "temperature": temperature}
    found_N = linear_ensemble_kl(*leaves, teachers, **options)
    expected_N = ensemble_kl_reference(*leaves, teachers, **options)
    torch.testing.assert_close(found_N, expected_N, rtol=1e-12, atol=1e-13)
    found = torch.autograd.grad(found_N, leaves, upstream_N)
    for a, b in zip(found, torch.autograd.grad(expected_N, leaves, upstream_N), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("pooling", "name"), [("logits", "logit_avg_p"), ("arithmetic", "prob_avg_p")])
def test_golden_ensemble_predictions(pooling: Any, name: str) -> None:
    """KL to a student with one certain class is inf elsewhere; the gradient at a uniform student is 1/V - P."""
    member_logits = ([2.0, 0.0, -1.0], [1.0, 0.5, -1.0])
    one = torch.ones(1, 1, dtype=torch.float64)
    teachers = [Teacher(one, torch.tensor(logits, dtype=torch.float64)[:, None]) for logits in member_logits]
    weight_VD = torch.zeros(3, 1, dtype=torch.float64, requires_grad=True)
    linear_ensemble_kl(one, weight_VD, teachers, pooling=pooling).sum().backward()
    assert weight_VD.grad is not None
    assert (1 / 3 - weight_VD.grad[:, 0]).tolist() == pytest.approx(GOLDEN["ensemble"][name], abs=1e-9)
    cross_entropy = -math.log(1 / 3 - weight_VD.grad[0, 0].item())
    assert cross_entropy == pytest.approx(GOLDEN["ensemble"]["ce0_" + name.removesuffix("_p")], abs=1e-9)


def test_logit_averaging_is_no_worse_than_the_mean_member() -> None:
    assert GOLDEN["ensemble"]["ce0_logit_avg"] <= GOLDEN["ensemble"]["mean_member_ce0"]


@pytest.mark.parametrize("pooling", ["arithmetic", "logits"])
def test_classes_that_a_teacher_lacks_have_probability_zero_there(pooling: Any) -> None:
    """Liger padded the smaller vocabulary with logits of 0, which are ordinary classes."""
    hidden_ND, weight_VD, teachers, _ = random_ensemble()
    short = [Teacher(teachers[0].hidden_ND, teachers[0].weight_VD[:25]), teachers[1]]
    logits = [teacher.hidden_ND @ teacher.weight_VD.T for teacher in short]
    logits[0] = torch.cat([logits[0], torch.full((30, 15), -torch.inf, dtype=torch.float64)], 1)
    target_NV = torch.softmax((logits[0] + logits[1]) / 2, 1)
    if pooling == "arithmetic":
        target_NV = (torch.softmax(logits[0], 1) + torch.softmax(logits[1], 1)) / 2
    log_student_NV = torch.log_softmax(hidden_ND @ weight_VD.T, 1)
    expected_N = (torch.special.xlogy(target_NV, target_NV) - target_NV * log_student_NV).sum(1)
    found_N = linear_ensemble_kl(hidden_ND, weight_VD, short, pooling=pooling)
    torch.testing.assert_close(found_N, expected_N, rtol=1e-12, atol=1e-13)


def test_a_student_equal_to_its_only_teacher_has_no_divergence_and_no_gradient() -> None:
    hidden_ND, weight_VD, _, _ = random_ensemble()
    leaf_VD = weight_VD.clone().requires_grad_()
    kl_N = linear_ensemble_kl(hidden_ND, leaf_VD, [Teacher(hidden_ND, weight_VD)])
    kl_N.sum().backward()
    assert leaf_VD.grad is not None
    assert kl_N.abs().max() < 1e-13
    assert leaf_VD.grad.abs().max() < 1e-13


def test_rows_that_are_not_counted_are_zero_and_influence_nothing() -> None:
    hidden_ND, weight_VD, teachers, upstream_N = random_ensemble()
    counted_N = torch.arange(30) % 3 != 0
    poisoned = [Teacher(t.hidden_ND.masked_fill(~counted_N[:, None], torch.nan), t.weight_VD) for t in teachers]
    grads = []
    for hidden, ensemble in ((hidden_ND, teachers), (hidden_ND.masked_fill(~counted_N[:, None], torch.inf), poisoned)):
        leaf_VD = weight_VD.clone().requires_grad_()
        kl_N = linear_ensemble_kl(hidden, leaf_VD, ensemble, counted_N=counted_N)
        kl_N.backward(upstream_N)
        assert not kl_N[~counted_N].any()
        grads.append(leaf_VD.grad)
    assert grads[0] is not None
    assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_row_whose_logits_overflow_is_lost_only_if_it_counts(temperature: float, dtype: torch.dtype) -> None:
    hidden_ND, weight_VD, teachers, upstream_N = random_ensemble()
    hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
    weight_VD[5] = 60
    overflowing_ND = hidden_ND.clone()
    overflowing_ND[3] = 6e4 if dtype == torch.float16 else 5e37
    teachers = [Teacher(t.hidden_ND.float(), t.weight_VD.float()) for t in teachers]
    poisoned = [Teacher(t.hidden_ND.index_fill(0, torch.tensor([3]), torch.nan), t.weight_VD) for t in teachers]

    def gradients(hidden_ND: Tensor, teachers: list[Teacher], weight: float) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden_ND, weight_VD)]
        kl_N = linear_ensemble_kl(*leaves, teachers, temperature=temperature)
        return list(torch.autograd.grad(kl_N, leaves, upstream_N.float().index_fill(0, torch.tensor([3]), weight)))

    base = gradients(hidden_ND, teachers, 0.0)
    cases = [
        (overflowing_ND, teachers),
        (hidden_ND, poisoned),
        (hidden_ND.index_fill(0, torch.tensor([3]), torch.inf), teachers),
    ]
    for case in cases:
        silent, lost = gradients(*case, 0.0), gradients(*case, 1.0)
        assert all(torch.equal(a, b) for a, b in zip(silent, base, strict=True))
        assert lost[0][3].isnan().all()
        assert lost[1].isnan().all()


def test_16_bit_student_has_float32_values_and_teachers_of_another_dtype() -> None:
    hidden_ND, weight_VD, teachers, _ = random_ensemble()
    hidden_bf, weight_bf = hidden_ND.bfloat16(), weight_VD.bfloat16().requires_grad_()
    single = [Teacher(t.hidden_ND.float(), t.weight_VD.float()) for t in teachers]
    found_N = linear_ensemble_kl(hidden_bf, weight_bf, single)
    found_N.sum().backward()
    exact_N = ensemble_kl_reference(hidden_bf, weight_bf, teachers, [1 / 3] * 3)
    assert found_N.dtype == torch.float32
    assert weight_bf.grad is not None
    assert weight_bf.grad.dtype == torch.bfloat16
    torch.testing.assert_close(found_N.double(), exact_N, rtol=2e-2, atol=2e-2)


def test_bad_ensembles_are_refused() -> None:
    hidden_ND, weight_VD, teachers, _ = random_ensemble()
    with pytest.raises(ValueError, match="no teacher"):
        linear_ensemble_kl(hidden_ND, weight_VD, [])
    with pytest.raises(ValueError, match=r"proportions are \[0\.5, 0\.2\], expected 3"):
        linear_ensemble_kl(hidden_ND, weight_VD, teachers, proportions=[0.5, 0.2])
    with pytest.raises(ValueError, match="a teacher has 40 classes, the student only 39"):
        linear_ensemble_kl(hidden_ND, weight_VD[:39], teachers)
    with pytest.raises(ValueError, match=r"teacher: hidden \[29, 4\]"):
        linear_ensemble_kl(hidden_ND, weight_VD, [Teacher(teachers[0].hidden_ND[:29], teachers[0].weight_VD)])
    with pytest.raises(ValueError, match="pooling is 'max'"):
        linear_ensemble_kl(hidden_ND, weight_VD, teachers, pooling="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature is 0"):
        linear_ensemble_kl(hidden_ND, weight_VD, teachers, temperature=0.0)
