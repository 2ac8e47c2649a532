"""Distillation of K teachers into one student without logits of all tokens: KL(ensemble || student) per token.

    arithmetic   P = sum_k pi_k softmax(z_k / T)               the mean of predictions
    logits       P = softmax(sum_k pi_k z_k / T)               the mean of logits, a geometric mean of predictions

    KL = sum_v P_v (log P_v - log q_v),  q = softmax(z_student / T),  dKL/dz_student = (q - P) / T

Teachers are streamed through a block of rows: one accumulator and one scratch of [n, V] whatever K is. The student's
gradient is kept as in engine A of `late_bound`, N V elements, so that row weights may depend on the values; forming it
again would cost K + 1 more matmuls. K + 3 matmuls in all. A teacher with fewer classes gives the others probability 0
(logits of -inf, never 0). N tokens, D hidden size of the student, V vocabulary, n tokens of a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mixwright.kernels.blocks import bind_rows, rows_per_scratch

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
    num_rows, vocabulary = hidden_ND.shape[0], weight_VD.shape[0]
    shares = [1 / max(1, len(teachers))] * len(teachers) if proportions is None else list(proportions)
    _check(hidden_ND, weight_VD, teachers, shares, pooling, temperature)
    if counted_N is None:
        counted_N = torch.ones(num_rows, dtype=torch.bool, device=hidden_ND.device)
    elif counted_N.shape != (num_rows,):
        raise ValueError(f"counted has shape {list(counted_N.shape)}, expected [{num_rows}]")
    for teacher in teachers:
        if teacher.weight_VD.shape[0] > vocabulary:
            raise ValueError(f"a teacher has {teacher.weight_VD.shape[0]} classes, the student only {vocabulary}")
    kl_N: Tensor = _EnsembleKL.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, tuple(teachers), tuple(shares), pooling, temperature, counted_N
    )
    return kl_N


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


class _EnsembleKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        teachers: tuple[Teacher, ...],
        shares: tuple[float, ...],
        pooling: Pooling,
        temperature: float,
        counted_N: Tensor,
    ) -> Tensor:
        (num_rows, _), vocabulary = hidden_ND.shape, weight_VD.shape[0]
        row_dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        block = rows_per_scratch(vocabulary, row_dtype, hidden_ND.device)
        kl_N = hidden_ND.new_zeros(num_rows, dtype=row_dtype)
        gradient_NV = hidden_ND.new_empty(num_rows if needs_weight else 0, vocabulary)
        unit_dhidden_ND = torch.empty_like(hidden_ND) if needs_hidden else hidden_ND.new_empty(0)
        for first in range(0, num_rows, block):
            span = slice(first, min(first + block, num_rows))
            target_nV = _ensemble_prediction(teachers, shares, pooling, temperature, counted_N, span, vocabulary)
            student_nD = hidden_ND[span].masked_fill(~counted_N[span, None], 0)
            logits_nV = torch.mm(student_nD, weight_VD.T).to(row_dtype).div_(temperature)
            log_student_nV = torch.log_softmax(logits_nV, 1)
            kl_N[span] = (torch.special.xlogy(target_nV, target_nV) - _product(target_nV, log_student_nV)).sum(1)
            block_nV = log_student_nV.exp_().sub_(target_nV).to(hidden_ND.dtype)
            if needs_weight:
                gradient_NV[span] = block_nV
            if needs_hidden:
                torch.mm(block_nV, weight_VD, out=unit_dhidden_ND[span])
        ctx.save_for_backward(hidden_ND, gradient_NV, unit_dhidden_ND, counted_N)
        ctx.temperature = temperature
        return kl_N.masked_fill_(~counted_N, 0)

    @staticmethod
    def backward(ctx: Any, dkl_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, gradient_NV, unit_dhidden_ND, counted_N = ctx.saved_tensors
        coefficient_N = dkl_N.masked_fill(~counted_N, 0) / ctx.temperature
        dhidden_ND = dweight_VD = None
        if ctx.needs_input_grad[0]:
            dhidden_ND = (coefficient_N[:, None] * unit_dhidden_ND).to(hidden_ND.dtype)
        if ctx.needs_input_grad[1]:
            bound_ND, scale = bind_rows(hidden_ND.masked_fill(~counted_N[:, None], 0), coefficient_N)
            dweight_VD = torch.mm(gradient_NV.T, bound_ND)
            dweight_VD = dweight_VD if scale is None else dweight_VD.mul_(scale)
        return dhidden_ND, dweight_VD, None, None, None, None, None


def _ensemble_prediction(
    teachers: tuple[Teacher, ...],
    shares: tuple[float, ...],
    pooling: Pooling,
    temperature: float,
    counted_N: Tensor,
    span: slice,
    vocabulary: int,
) -> Tensor:
    """P of a block of rows, [n, V]; classes that a teacher lacks have probability 0 there."""
    first = teachers[0].hidden_ND
    row_dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    pooled_nV = first.new_zeros(span.stop - span.start, vocabulary, dtype=row_dtype)
    for teacher, share in zip(teachers, shares, strict=True):
        hidden_nD = teacher.hidden_ND[span].masked_fill(~counted_N[span, None], 0)
        logits_nv = torch.mm(hidden_nD, teacher.weight_VD.T).to(row_dtype).div_(temperature)
        known = logits_nv.shape[1]
        if pooling == "arithmetic":
            torch.softmax(logits_nv, 1, out=logits_nv)
        elif share > 0:
            pooled_nV[:, known:] = -torch.inf
        pooled_nV[:, :known].add_(logits_nv, alpha=share)
    if pooling == "logits":
        torch.softmax(pooled_nV, 1, out=pooled_nV)
    return pooled_nV


def _product(target_nV: Tensor, log_student_nV: Tensor) -> Tensor:
    """P log q with 0 where P is 0, also where q is 0."""
    return torch.where(target_nV > 0, target_nV * log_student_nV, 0)


def _check(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    teachers: Sequence[Teacher],
    shares: list[float],
    pooling: str,
    temperature: float,
) -> None:
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
    if pooling not in ("arithmetic", "logits"):
        raise ValueError(f"pooling is {pooling!r}, expected 'arithmetic' or 'logits'")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}, expected a positive number")
