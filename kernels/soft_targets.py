"""Cross-entropy and divergence from soft targets of a linear head, from one product of logits, without keeping them.

    loss = ce_scale * nll + kl_scale * KL(P || q_T)
    nll  = lse(z) - z_y                    KL = sum_v P_v (log P_v - log q_v),   q_T = softmax(z / T)
    dloss/dz = ce_scale * (q_1 - onehot_y) + kl_scale / T * (q_T - P)

P comes block by block from a function, which may look at log q_T of the block. The gradient with respect to the logits
is kept as in engine A of `late_bound`, N V elements, so that upstream gradients may depend on the values; forming it
again would cost one product more, and those that P takes. Three products beside P's. N tokens, D hidden, V vocabulary,
n tokens of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixwright.kernels.blocks import bind_rows, rows_per_scratch


class Target(NamedTuple):
    """P of a block, [n, V], and sum_v P_v log P_v, [n]."""

    probability_nV: Tensor
    negative_entropy_n: Tensor


TargetOf = Callable[[slice, Tensor], Target]
"""The target of the rows `slice`, given the student's z / T of them, [n, V], which it must not change."""

SCRATCH_PARTS = 2
"""A block is so many times smaller than one that has a scratch for itself: logits of student and teachers, P."""


class TaughtLosses(NamedTuple):
    """`loss_N` has a gradient, the others have not; all [N] in the row dtype. Without labels nll and lse are empty."""

    loss_N: Tensor
    nll_N: Tensor
    lse_N: Tensor
    kl_N: Tensor


class Scales(NamedTuple):
    """ce_scale, kl_scale and T of the formulas above."""

    ce: float
    kl: float
    temperature: float


def taught_losses(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_of: TargetOf,
    counted_N: Tensor,
    labels_N: Tensor | None,
    scales: Scales,
) -> TaughtLosses:
    """Losses of every token; gradients flow from `loss_N` to `hidden_ND` and `weight_VD`.

    Rows that are not counted (bool [N]) are 0 and influence nothing. Without labels there is no cross-entropy. Counted
    rows that are not finite influence nothing while their upstream gradient is 0; otherwise the gradients are NaN.
    """
    return TaughtLosses(
        *_Taught.apply(hidden_ND, weight_VD, target_of, counted_N, labels_N, scales)  # type: ignore[no-untyped-call]
    )


class _Taught(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        target_of: TargetOf,
        counted_N: Tensor,
        labels_N: Tensor | None,
        scales: Scales,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (num_rows, _), vocabulary = hidden_ND.shape, weight_VD.shape[0]
        row_dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        live_N = counted_N.clone()
        kl_N, nll_N, lse_N = (hidden_ND.new_zeros(num_rows, dtype=row_dtype) for _ in range(3))
        gradient_NV = hidden_ND.new_empty(num_rows if needs_weight else 0, vocabulary)
        unit_dhidden_ND = torch.empty_like(hidden_ND) if needs_hidden else hidden_ND.new_empty(0)
        block = max(rows_per_scratch(vocabulary, row_dtype, hidden_ND.device) // SCRATCH_PARTS, 32)
        for first in range(0, num_rows, block):
            span = slice(first, min(first + block, num_rows))
            student_nD = hidden_ND[span].masked_fill(~counted_N[span, None], 0)
            logits_nV = torch.mm(student_nD, weight_VD.T).to(row_dtype)
            labels_n1 = None if labels_N is None else labels_N[span].where(counted_N[span], 0)[:, None]
            direct = needs_weight and row_dtype == hidden_ND.dtype
            out_nV = gradient_NV[span] if direct else torch.empty_like(logits_nV)
            kl_N[span], nll_N[span], lse_N[span] = _rows(logits_nV, span, target_of, labels_n1, scales, out_nV)
            finite_n = lse_N[span].isfinite() & ~kl_N[span].isnan()
            live_N[span] &= finite_n
            block_nV = out_nV.to(hidden_ND.dtype)
            if not _all_on_cpu(finite_n):  # 0 * NaN shall meet no sum
                block_nV.masked_fill_(~finite_n[:, None], 0)
            if needs_weight and not direct:
                gradient_NV[span] = block_nV
            if needs_hidden:
                torch.mm(block_nV, weight_VD, out=unit_dhidden_ND[span])
        for losses_N in (kl_N, nll_N, lse_N):
            losses_N.masked_fill_(~counted_N, 0)
        ctx.save_for_backward(hidden_ND, gradient_NV, unit_dhidden_ND, counted_N, live_N)
        ctx.mark_non_differentiable(nll_N, lse_N, kl_N)
        ctx.set_materialize_grads(False)
        return scales.ce * nll_N + scales.kl * kl_N, nll_N, lse_N, kl_N

    @staticmethod
    def backward(ctx: Any, dloss_N: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dloss_N is None:
            return None, None, None, None, None, None
        hidden_ND, gradient_NV, unit_dhidden_ND, counted_N, live_N = ctx.saved_tensors
        coefficient_N = dloss_N.masked_fill(~counted_N, 0)
        coefficient_N = torch.where(live_N | (coefficient_N == 0), coefficient_N, torch.nan)
        dhidden_ND = dweight_VD = None
        if ctx.needs_input_grad[0]:
            dhidden_ND = (coefficient_N[:, None] * unit_dhidden_ND).to(hidden_ND.dtype)
        if ctx.needs_input_grad[1]:
            bound_ND, scale = bind_rows(hidden_ND.masked_fill(~live_N[:, None], 0), coefficient_N)
            dweight_VD = torch.mm(gradient_NV.T, bound_ND)
            dweight_VD = dweight_VD if scale is None else dweight_VD.mul_(scale)
        return dhidden_ND, dweight_VD, None, None, None, None


def _rows(
    logits_nV: Tensor, span: slice, target_of: TargetOf, labels_n1: Tensor | None, scales: Scales, out_nV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """KL, nll and lse of a block, [n] each; `out_nV` becomes the gradient of the loss with respect to its logits."""
    ce, kl, temperature = scales
    scores_nV = logits_nV if temperature == 1 else logits_nV / temperature
    target = target_of(span, scores_nV)
    expected_n = row_products(target.probability_nV, scores_nV, out_nV)
    torch.softmax(scores_nV, 1, out=out_nV)
    scores_lse_n = lse_from_softmax(scores_nV, out_nV)
    # sum P log q = sum P s - lse(s), since P sums to 1
    kl_n = target.negative_entropy_n - expected_n + scores_lse_n
    lse_n = scores_lse_n
    if temperature != 1:
        plain_nV = torch.softmax(logits_nV, 1)
        lse_n = lse_from_softmax(logits_nV, plain_nV)
        out_nV.mul_(kl / temperature).add_(plain_nV, alpha=ce)
    elif ce + kl != 1:
        out_nV.mul_(ce + kl)
    nll_n = torch.zeros_like(lse_n) if labels_n1 is None else lse_n - logits_nV.gather(1, labels_n1)[:, 0]
    out_nV.sub_(target.probability_nV, alpha=kl / temperature)
    if labels_n1 is not None and ce:
        out_nV.scatter_add_(1, labels_n1, out_nV.new_full(labels_n1.shape, -ce))
    return kl_n, nll_n, lse_n


def lse_from_softmax(scores_nV: Tensor, softmax_nV: Tensor) -> Tensor:
    """log-sum-exp of rows whose softmax is known, [n], without an exp of all again.

    Any class will do as long as its probability is not 0, and none does as well as the likeliest; the first is read at
    no cost.
    """
    first_n = softmax_nV[:, 0]
    if _all_on_cpu(first_n > torch.finfo(first_n.dtype).tiny):
        return scores_nV[:, 0] - first_n.log()
    return scores_nV.amax(1) - softmax_nV.amax(1).log()


def row_products(probability_nV: Tensor, scores_nV: Tensor, scratch_nV: Tensor) -> Tensor:
    """sum_v P_v s_v, [n], with the terms in `scratch_nV`; 0 where P is 0, also where s is infinite."""
    expected_n = torch.mul(probability_nV, scores_nV, out=scratch_nV).sum(1)
    if _all_on_cpu(torch.isfinite(expected_n)):
        return expected_n
    return scratch_nV.masked_fill_(probability_nV == 0, 0).sum(1)


def _all_on_cpu(flag_n: Tensor) -> bool:
    """Whether the quick way will do. On a GPU asking would make the host wait, so there the careful way is taken."""
    return not flag_n.is_cuda and bool(flag_n.all())
