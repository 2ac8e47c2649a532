"""Distillation of K teachers into one student without logits of all tokens: KL(ensemble || student) per token.

    arithmetic   P = sum_k pi_k softmax(z_k / T)               the mean of predictions
    logits       P = softmax(sum_k pi_k z_k / T)               the mean of logits, a geometric mean of predictions

    KL = sum_v P_v (log P_v - log q_v),  q = softmax(z_student / T),  dKL/dz_student = (q - P) / T

Teachers are streamed through a block of rows: one accumulator and one scratch of [n, V] whatever K is. K + 3 matmuls in
all; the gradient is that of `soft_targets`. A teacher with fewer classes gives the others probability 0
(logits of -inf, never 0). N tokens, D hidden size of the student, V vocabulary, n tokens of a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mixwright.kernels.soft_targets import Scales, Target, TargetOf, lse_from_softmax, row_products, taught_losses

Pooling = Literal["arithmetic", "logits"]


class Teacher(NamedTuple):
    """Hidden states [N, D_k] and head [V_k, D_k] of one teacher, of one floating dtype, without gradients."""

    hidden_ND: Tensor
    weight_VD: Tensor


def linear_ensemble_kl(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    teachers: Sequence[Teacher],
    *,
    proportions: Sequence[float] | None = None,
    pooling: Pooling = "arithmetic",
    temperature: float = 1.0,
    counted_N: Tensor | None = None,
) -> Tensor:
    """KL divergence of the student from the ensemble, [N] in nats, float32 (float64 for double inputs).

    Gradients flow to `hidden_ND` and `weight_VD` for any upstream gradients, never to teachers. Rows that are not
    counted (bool [N]) are 0 and influence nothing. The usual factor T**2 is the caller's.

    Args:
        proportions: pi_k, non-negative, sum 1; default equal.

    Raises ValueError for shapes that do not fit, no teacher, wrong proportions, or a teacher with more classes than
    the student, which the student could never match. Source: spec/methods.md section 6, spec/kernels.md section 4.
    """
    num_rows = hidden_ND.shape[0]
    shares = shares_of(teachers, proportions)
    check_teachers(hidden_ND, weight_VD, teachers, shares, pooling, temperature)
    if counted_N is None:
        counted_N = torch.ones(num_rows, dtype=torch.bool, device=hidden_ND.device)
    elif counted_N.shape != (num_rows,):
        raise ValueError(f"counted has shape {list(counted_N.shape)}, expected [{num_rows}]")
    target_of = ensemble_target(teachers, shares, pooling, temperature, counted_N)
    return taught_losses(hidden_ND, weight_VD, target_of, counted_N, None, Scales(0.0, 1.0, temperature)).loss_N


def ensemble_kl_reference(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    teachers: Sequence[Teacher],
    proportions: Sequence[float],
    pooling: Pooling = "arithmetic",
    temperature: float = 1.0,
) -> Tensor:
    """The definition, in float64 with all logits at once; every teacher has the student's vocabulary."""
    logits = torch.stack([t.hidden_ND.double() @ t.weight_VD.double().T / temperature for t in teachers])
    share_K11 = torch.tensor(list(proportions), dtype=torch.float64, device=logits.device)[:, None, None]
    if pooling == "arithmetic":
        target_NV = (share_K11 * torch.softmax(logits, 2)).sum(0)
    else:
        target_NV = torch.softmax((share_K11 * logits).sum(0), 1)
    log_student_NV = torch.log_softmax(hidden_ND.double() @ weight_VD.double().T / temperature, 1)
    return torch.nn.functional.kl_div(log_student_NV, target_NV, reduction="none").sum(1)


def ensemble_target(
    teachers: Sequence[Teacher], shares: Sequence[float], pooling: Pooling, temperature: float, counted_N: Tensor
) -> TargetOf:
    """What the ensemble predicts for a block of rows; teachers are streamed through two [n, V] whatever K is."""

    def target_of(span: slice, scores_nV: Tensor) -> Target:
        pooled_nV = torch.empty_like(scores_nV)
        for number, (teacher, share) in enumerate(zip(teachers, shares, strict=True)):
            hidden_nD = teacher.hidden_ND[span].masked_fill(~counted_N[span, None], 0)
            if pooling == "logits":
                _add_logits(pooled_nV, hidden_nD, teacher.weight_VD, share / temperature, is_first=number == 0)
            else:
                _add_probabilities(pooled_nV, hidden_nD, teacher.weight_VD, share, temperature, is_first=number == 0)
        if pooling == "logits":
            return _softmax_(pooled_nV)
        log_nV = pooled_nV.clamp_min(torch.finfo(pooled_nV.dtype).tiny).log_()
        return Target(pooled_nV, row_products(pooled_nV, log_nV, log_nV))

    return target_of


def _add_logits(pooled_nV: Tensor, hidden_nD: Tensor, weight_vD: Tensor, scale: float, *, is_first: bool) -> None:
    """pooled += scale * logits; classes that the teacher lacks become -inf, unless its scale is 0."""
    known = weight_vD.shape[0]
    if hidden_nD.dtype == pooled_nV.dtype:
        head_nv = pooled_nV[:, :known]
        torch.addmm(head_nv, hidden_nD, weight_vD.T, beta=0 if is_first else 1, alpha=scale, out=head_nv)
    elif is_first:
        torch.mul(torch.mm(hidden_nD, weight_vD.T), scale, out=pooled_nV[:, :known])
    else:
        pooled_nV[:, :known].add_(torch.mm(hidden_nD, weight_vD.T), alpha=scale)
    if known < pooled_nV.shape[1] and (is_first or scale > 0):
        pooled_nV[:, known:] = -torch.inf if scale > 0 else 0


def _add_probabilities(
    pooled_nV: Tensor, hidden_nD: Tensor, weight_vD: Tensor, share: float, temperature: float, *, is_first: bool
) -> None:
    """pooled += share * softmax(logits / T); classes that the teacher lacks have probability 0."""
    logits_nv = torch.mm(hidden_nD, weight_vD.T).to(pooled_nV.dtype)
    logits_nv = logits_nv if temperature == 1 else logits_nv.div_(temperature)
    torch.softmax(logits_nv, 1, out=logits_nv)
    if is_first:
        pooled_nV.zero_()
    pooled_nV[:, : logits_nv.shape[1]].add_(logits_nv, alpha=share)


def _softmax_(logits_nV: Tensor) -> Target:
    """softmax of logits, which are lost; sum P log P = sum P z - lse(z)."""
    p_nV = torch.softmax(logits_nV, 1)
    lse_n = lse_from_softmax(logits_nV, p_nV)
    return Target(p_nV, row_products(p_nV, logits_nV, logits_nV) - lse_n)


def shares_of(teachers: Sequence[Teacher], proportions: Sequence[float] | None) -> list[float]:
    """pi_k; equal ones by default."""
    return [1 / max(1, len(teachers))] * len(teachers) if proportions is None else list(proportions)


def check_teachers(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    teachers: Sequence[Teacher],
    shares: list[float],
    pooling: str,
    temperature: float,
) -> None:
    """Raise ValueError or TypeError for what does not fit together."""
    if not teachers:
        raise ValueError("no teacher: an ensemble needs at least one")
    for name, hidden, weight in (("student", hidden_ND, weight_VD), *(("teacher", *teacher) for teacher in teachers)):
        fits = hidden.ndim == weight.ndim == 2 and hidden.shape[1] == weight.shape[1]
        if not fits or hidden.shape[0] != hidden_ND.shape[0]:
            raise ValueError(
                f"{name}: hidden {list(hidden.shape)} and weight {list(weight.shape)} do not fit [N, D], [V, D]"
            )
        if hidden.dtype != weight.dtype:
            raise TypeError(f"{name}: weight is {weight.dtype} but hidden is {hidden.dtype}: cast one of them first")
    if len(shares) != len(teachers) or min(shares) < 0 or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise ValueError(f"proportions are {shares}, expected {len(teachers)} non-negative numbers that sum to 1")
    for teacher in teachers:
        if teacher.weight_VD.shape[0] > weight_VD.shape[0]:
            classes = teacher.weight_VD.shape[0]
            raise ValueError(f"a teacher has {classes} classes, the student only {weight_VD.shape[0]}")
    if pooling not in ("arithmetic", "logits"):
        raise ValueError(f"pooling is {pooling!r}, expected 'arithmetic' or 'logits'")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}, expected a positive number")
