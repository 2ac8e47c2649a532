"""linear_distillation against its definition: online teachers, kept predictions, gradients, edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mixwright.kernels.distillation import TopK, distillation_reference, linear_distillation, top_k_reference
from mixwright.kernels.ensemble_kl import Teacher
from mixwright.kernels.linear_nll import linear_nll

SHARES = [0.5, 0.2, 0.3]


def problem(num_tokens: int = 30, vocabulary: int = 40) -> tuple[Tensor, Tensor, Tensor, list[Teacher], Tensor]:
    """Student hidden and weight, labels with two ignored, three teachers, upstream gradients; float64."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels_N = torch.randint(0, vocabulary, (num_tokens,), generator=generator)
    labels_N[3:5] = -100
    teachers = [Teacher(normal(num_tokens, size), normal(vocabulary, size)) for size in (4, 7, 9)]
    leaves = normal(num_tokens, 6).requires_grad_(), normal(vocabulary, 6).requires_grad_()
    return *leaves, labels_N, teachers, normal(num_tokens)


def pooled(teachers: list[Teacher], pooling: str, temperature: float) -> Tensor:
    """P, [N, V]."""
    logits = torch.stack([t.hidden_ND @ t.weight_VD.T / temperature for t in teachers])
    shares = torch.tensor(SHARES, dtype=torch.float64)[:, None, None]
    if pooling == "logits":
        return torch.softmax((shares * logits).sum(0), 1)
    return (shares * torch.softmax(logits, 2)).sum(0)


def keep(target_NV: Tensor, k: int) -> TopK:
    p_Nk, ids_Nk = target_NV.topk(k, dim=1)
    rest_N = (1 - p_Nk.sum(1)).clamp_min(0)
    return TopK(ids_Nk, p_Nk.log(), rest_N.log())


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("pooling", ["logits", "arithmetic"])
def test_losses_and_gradients_equal_the_definition(pooling: Any, temperature: float, share: float) -> None:
    hidden_ND, weight_VD, labels_N, teachers, upstream_N = problem()
    found = linear_distillation(
        hidden_ND, weight_VD, labels_N, teachers, share=share, proportions=SHARES, pooling=pooling,
        temperature=temperature,
    )  # fmt: skip
    target_NV = pooled(teachers, pooling, temperature)
    expected_N = distillation_reference(hidden_ND, weight_VD, labels_N, target_NV, share=share, temperature=temperature)
    torch.testing.assert_close(found.loss_N, expected_N, rtol=1e-12, atol=1e-13)
    plain = linear_nll(hidden_ND.detach(), weight_VD.detach(), labels_N)
    torch.testing.assert_close(found.nll_N, plain.nll_N)
    torch.testing.assert_close(found.lse_N[labels_N >= 0], plain.lse_N[labels_N >= 0])
    assert [found.nll_N.requires_grad, found.lse_N.requires_grad, found.kl_N.requires_grad] == [False] * 3
    leaves = hidden_ND, weight_VD
    gradients = torch.autograd.grad(found.loss_N, leaves, upstream_N)
    for a, b in zip(gradients, torch.autograd.grad(expected_N, leaves, upstream_N), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("k", [1, 5, 39])
def test_kept_predictions_are_matched_over_k_plus_one_outcomes(k: int) -> None:
    hidden_ND, weight_VD, labels_N, teachers, upstream_N = problem()
    labels_N = labels_N.clamp_min(0)
    kept = keep(pooled(teachers, "logits", 1.0), k)
    found = linear_distillation(hidden_ND, weight_VD, labels_N, kept, share=1.0)
    expected_N = top_k_reference(hidden_ND, weight_VD, kept)
    torch.testing.assert_close(found.loss_N, expected_N, rtol=1e-10, atol=1e-11)
    leaves = hidden_ND, weight_VD
    gradients = torch.autograd.grad(found.loss_N, leaves, upstream_N)
    for a, b in zip(gradients, torch.autograd.grad(expected_N, leaves, upstream_N), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_all_classes_kept_is_the_whole_distribution() -> None:
    hidden_ND, weight_VD, labels_N, teachers, _ = problem()
    kept = keep(pooled(teachers, "logits", 1.0), 40)
    kept = kept._replace(log_tail_N=torch.full_like(kept.log_tail_N, -math.inf))
    whole = linear_distillation(hidden_ND, weight_VD, labels_N, teachers, share=0.7, proportions=SHARES)
    found = linear_distillation(hidden_ND, weight_VD, labels_N, kept, share=0.7)
    torch.testing.assert_close(found.loss_N, whole.loss_N)
    torch.autograd.grad(found.loss_N.sum(), (hidden_ND, weight_VD))


def test_renormalising_the_top_would_be_another_loss() -> None:
    hidden_ND, weight_VD, labels_N, teachers, _ = problem()
    kept = keep(pooled(teachers, "logits", 1.0), 3)
    log_kept_N = torch.logsumexp(kept.log_p_Nk, 1)
    normalised = TopK(kept.ids_Nk, kept.log_p_Nk - log_kept_N[:, None], torch.full_like(log_kept_N, -math.inf))
    exact = linear_distillation(hidden_ND, weight_VD, labels_N, kept, share=1.0)
    biased = linear_distillation(hidden_ND, weight_VD, labels_N, normalised, share=1.0)
    assert float((biased.loss_N - exact.loss_N).detach().mean()) > 0.1


def test_a_student_that_is_certain_of_the_top_gets_finite_losses_and_gradients() -> None:
    kept = TopK(torch.tensor([[0]]), torch.tensor([[math.log(0.5)]]), torch.tensor([math.log(0.5)]))
    hidden_ND = torch.ones(1, 1, requires_grad=True)
    weight_VD = torch.tensor([[200.0], [0.0], [0.0]], requires_grad=True)
    found = linear_distillation(hidden_ND, weight_VD, torch.tensor([0]), kept, share=1.0)
    assert float(found.loss_N) == pytest.approx(0.5 * math.log(0.5) + 0.5 * (math.log(0.5) + 200 - math.log(2)))
    found.loss_N.sum().backward()
    assert weight_VD.grad is not None
    assert weight_VD.grad[:, 0].tolist() == pytest.approx([0.5, -0.25, -0.25], rel=1e-5)


def test_distilling_a_model_into_itself_has_no_gradient() -> None:
    hidden_ND, weight_VD, labels_N, _, _ = problem()
    teacher = Teacher(hidden_ND.detach().clone(), weight_VD.detach().clone())
    losses = linear_distillation(hidden_ND, weight_VD, labels_N, [teacher], share=1.0)
    gradients = torch.autograd.grad(losses.loss_N.sum(), (hidden_ND, weight_VD))
    assert float(losses.kl_N.abs().max()) < 1e-12
    assert max(float(g.abs().max()) for g in gradients) < 1e-12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 1.5}, "share is 1.5, expected 0 to 1"),
        ({"labels_N": torch.zeros(3, dtype=torch.int64)}, r"labels have shape \[3\], expected \[30\]"),
        ({"teachers": []}, "no teacher"),
        ({"temperature": 2.0, "kept": 3}, "temperature is 2.0, but kept predictions"),
        ({"kept": 41}, "41 classes are kept, the student has only 40"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    hidden_ND, weight_VD, labels_N, teachers, _ = problem()
    arguments: dict[str, Any] = {"labels_N": labels_N, "teachers": teachers, "share": 0.5, **changes}
    if "kept" in changes:
        ids_Nk = torch.arange(arguments.pop("kept")).repeat(30, 1)
        arguments["teachers"] = TopK(ids_Nk, torch.zeros(ids_Nk.shape), torch.zeros(30))
    with pytest.raises(ValueError, match=message):
        linear_distillation(hidden_ND, weight_VD, **arguments)
