"""The loss of a student: cross-entropy mixed with its divergence from teachers, with one product for its logits.

    loss = (1 - share) * nll + share * T**2 * KL(P || softmax(z / T))

P is the pooled prediction of K teachers (ensemble_kl), K + 3 products in all; or what was kept of it, its k largest
classes and the mass of all others, 3 products. Then the KL is over k + 1 outcomes, the others being one:

    KL = sum_{v in top} p_v log(p_v / q_v) + p_rest log(p_rest / q_rest),   q_rest = 1 - sum_{v in top} q_v

This is the KL from the full target that has p_v in the top and spreads p_rest as the student does, p_rest q_v / q_rest;
and dKL/dz = q - target holds for it as well (the target's own derivative drops out, since KL does not change where the
rest is spread as q). Nothing is normalised again. N tokens, D hidden, V vocabulary, n tokens of a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mixwright.kernels.ensemble_kl import Pooling, Teacher, check_teachers, ensemble_target, shares_of
from mixwright.kernels.soft_targets import Scales, Target, TargetOf, row_products, taught_losses

IGNORED = -100


class TopK(NamedTuple):
    """The k likeliest classes, int64 [N, k], their log-probabilities, [N, k], and the log of what is left, [N].

    Classes of a row are distinct. Nothing left is -inf.
    """

    ids_Nk: Tensor
    log_p_Nk: Tensor
    log_tail_N: Tensor


class DistillationLosses(NamedTuple):
    """float32 [N] each (float64 for double inputs); `loss_N` has a gradient, the others are detached."""

    loss_N: Tensor
    nll_N: Tensor
    lse_N: Tensor
    kl_N: Tensor


def linear_distillation(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    teachers: Sequence[Teacher] | TopK,
    *,
    share: float,
    proportions: Sequence[float] | None = None,
    pooling: Pooling = "logits",
    temperature: float = 1.0,
) -> DistillationLosses:
    """(1 - share) * nll + share * T**2 * KL per token, with its parts; logits are never all in memory.

    Gradients flow to `hidden_ND` and `weight_VD` for any upstream gradient of `loss_N`. Rows labelled -100 are 0.

    Args:
        labels_N: int64 classes, or -100.
        share: of the teachers, 0 to 1.
        proportions: pi_k of the teachers, default equal.

    Raises ValueError for shapes or values that do not fit, and a temperature other than 1 with TopK, which was kept at
    one temperature. Source: spec/methods.md 6, spec/posttraining.md 5.3.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}, expected 0 to 1")
    if labels_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"labels have shape {list(labels_N.shape)}, expected [{hidden_ND.shape[0]}]")
    counted_N = labels_N != IGNORED
    if isinstance(teachers, TopK):
        _check_top_k(hidden_ND, weight_VD, teachers, temperature)
        target_of = _top_k_target(teachers)
    else:
        shares = shares_of(teachers, proportions)
        check_teachers(hidden_ND, weight_VD, teachers, shares, pooling, temperature)
        target_of = ensemble_target(teachers, shares, pooling, temperature, counted_N)
    scales = Scales(1.0 - share, share * temperature**2, temperature)
    return DistillationLosses(*taught_losses(hidden_ND, weight_VD, target_of, counted_N, labels_N, scales))


def distillation_reference(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, target_NV: Tensor, *, share: float, temperature: float = 1.0
) -> Tensor:
    """The definition in float64, with all logits at once and all of P."""
    logits_NV = hidden_ND.double() @ weight_VD.double().T
    nll_N = torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="none", ignore_index=IGNORED)
    log_q_NV = torch.log_softmax(logits_NV / temperature, 1)
    kl_N = torch.nn.functional.kl_div(log_q_NV, target_NV.double(), reduction="none").sum(1)
    loss_N: Tensor = (1 - share) * nll_N + share * temperature**2 * kl_N.masked_fill(labels_N == IGNORED, 0)
    return loss_N


def top_k_reference(hidden_ND: Tensor, weight_VD: Tensor, kept: TopK) -> Tensor:
    """KL over k + 1 outcomes by its definition, in float64, [N]."""
    log_q_NV = torch.log_softmax(hidden_ND.double() @ weight_VD.double().T, 1)
    log_q_Nk = log_q_NV.gather(1, kept.ids_Nk)
    rest_N = torch.ones_like(log_q_NV).scatter(1, kept.ids_Nk, 0)
    q_rest_N = (log_q_NV.exp() * rest_N).sum(1)
    p_Nk, p_rest_N = kept.log_p_Nk.double().exp(), kept.log_tail_N.double().exp()
    kept_N: Tensor = (p_Nk * (kept.log_p_Nk.double() - log_q_Nk)).sum(1)
    rest_kl_N: Tensor = torch.special.xlogy(p_rest_N, p_rest_N) - torch.special.xlogy(p_rest_N, q_rest_N)
    return kept_N + rest_kl_N


def _top_k_target(kept: TopK) -> TargetOf:
    def target_of(span: slice, scores_nV: Tensor) -> Target:
        ids_nk, p_nk = kept.ids_Nk[span], kept.log_p_Nk[span].to(scores_nV.dtype).exp()
        log_tail_n = kept.log_tail_N[span].to(scores_nV.dtype)
        rest_nV = scores_nV.scatter(1, ids_nk, -math.inf)
        lse_rest_n = torch.logsumexp(rest_nV, 1)
        # With all classes kept there is nowhere to spread what rounding left.
        shift_n = torch.where(lse_rest_n > -math.inf, log_tail_n - lse_rest_n, -math.inf)
        target_nV = rest_nV.add_(shift_n[:, None]).exp_()
        # sum P log P with log P = s + shift outside the top
        rest_n = row_products(target_nV, scores_nV, torch.empty_like(scores_nV))
        rest_n = rest_n + torch.where(shift_n > -math.inf, log_tail_n.exp() * shift_n, 0)
        return Target(target_nV.scatter_(1, ids_nk, p_nk), torch.special.xlogy(p_nk, p_nk).sum(1) + rest_n)

    return target_of


def _check_top_k(hidden_ND: Tensor, weight_VD: Tensor, kept: TopK, temperature: float) -> None:
    if temperature != 1:
        raise ValueError(f"temperature is {temperature}, but kept predictions are of temperature 1")
    rows, shape = hidden_ND.shape[0], kept.ids_Nk.shape
    if len(shape) != 2 or shape[0] != rows or kept.log_p_Nk.shape != shape or kept.log_tail_N.shape != (rows,):
        raise ValueError(
            f"kept predictions have shapes {list(shape)}, {list(kept.log_p_Nk.shape)}, {list(kept.log_tail_N.shape)}, "
            f"expected [{rows}, k], [{rows}, k], [{rows}]"
        )
    if shape[1] > weight_VD.shape[0]:
        raise ValueError(f"{shape[1]} classes are kept, the student has only {weight_VD.shape[0]}")
