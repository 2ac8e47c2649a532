"""Row operations of the fused heads in plain torch: the CPU form, and the yardstick of the Triton kernels.

The functions work in place on a block of raw logits x [n, v] (float32 or float64) and know nothing of matmuls.
With z = softcap(x) / T, p = softmax(z) and slope = dsoftcap/dx = 1 - tanh(x/cap)**2 (1 without a cap):

    unit_gradient_    x -> (p - onehot) * slope          over a whole row; also nll, lse, target logit
    shard_gradient_   x -> (p - onehot) * slope          over the columns of one shard, p = softmax over these alone
    sliced_gradient_  x -> (e^(z - lse) - onehot) * slope over some columns, from a known lse

The factor 1/T of dz/dx is a number per row and is left to the caller, who multiplies rows of [n, D] by it.
`torch.softmax(z, 1, out=z)` is one vectorised pass. No pass looks for the row maximum: with t = z[y] and p_y read
back after the softmax, nll = -log p_y and lse = t + nll. Rows whose p_y underflows are computed once more.
A shard may not hold the target, so that its pass does look for the maximum. Rows whose lse is not finite (overflow)
get a zero gradient, so that weight 0 silences them; the caller's coefficient makes those that count visible.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

KEEPS_16_BITS = False  # logits of 16-bit matmuls are widened to float32 before these functions see them


class RowStats(NamedTuple):
    """What a pass over whole rows learns, each [n]: nll and lse in nats, target logit, dsoftcap/dx at the target."""

    nll_n: Tensor
    lse_n: Tensor
    target_logit_n: Tensor
    target_slope_n: Tensor
    entropy_n: Tensor | None
    correct_n: Tensor | None


class ShardStats(NamedTuple):
    """What a pass over one shard's columns learns, each [n]: m = max z, log sum e^(z - m), z and slope at the target.

    A shard without a finite logit has m = log sum = -inf. Entropy is that of the shard's own softmax.
    """

    peak_n: Tensor
    log_sum_n: Tensor
    target_logit_n: Tensor
    target_slope_n: Tensor
    entropy_n: Tensor | None


class EntropyTerms(NamedTuple):
    """Per row, [n]: the gradient to form is alpha * d nll + epsilon * d entropy; entropy in nats."""

    alpha_n: Tensor
    epsilon_n: Tensor
    entropy_n: Tensor


def unit_gradient_(
    logits_nv: Tensor,
    targets_n: Tensor,
    softcap: float | None,
    inv_temperature_n: Tensor | None,
    logits_of: Callable[[Tensor], Tensor],
    *,
    entropy: bool = False,
    correct: bool = False,
) -> RowStats:
    """Replace raw logits by the gradient of nll, up to 1/T, and return the statistics of the rows.

    `logits_of(rows)` yields the raw logits of some rows again. `correct` counts ties of the target as correct.
    """
    target_n1 = targets_n[:, None]
    slope_nv = _apply_cap_and_temperature_(logits_nv, softcap, inv_temperature_n)
    target_logit_n = logits_nv.gather(1, target_n1)[:, 0]
    correct_n = target_logit_n >= logits_nv.amax(1) if correct else None
    peak_n1 = logits_nv.amax(1, keepdim=True) if entropy else None
    shifted_nv = None if peak_n1 is None else logits_nv - peak_n1

    torch.softmax(logits_nv, 1, out=logits_nv)
    target_prob_n1 = logits_nv.gather(1, target_n1)
    nll_n = -target_prob_n1[:, 0].log()
    lse_n = target_logit_n + nll_n
    _redo_underflowed_(nll_n, lse_n, target_prob_n1[:, 0], targets_n, softcap, inv_temperature_n, logits_of)
    entropy_n = None
    if peak_n1 is not None and shifted_nv is not None:
        entropy_n = (lse_n - peak_n1[:, 0]) - torch.where(logits_nv > 0, logits_nv * shifted_nv, 0).sum(1)
    logits_nv.scatter_(1, target_n1, target_prob_n1 - 1)

    target_slope_n = torch.ones_like(nll_n)
    if slope_nv is not None:
        logits_nv.mul_(slope_nv)
        target_slope_n = slope_nv.gather(1, target_n1)[:, 0].nan_to_num(0)
    logits_nv[(~lse_n.isfinite()).nonzero()[:, 0]] = 0
    return RowStats(nll_n, lse_n, target_logit_n, target_slope_n, entropy_n, correct_n)


def shard_gradient_(
    logits_nv: Tensor,
    columns_n: Tensor,
    softcap: float | None,
    inv_temperature_n: Tensor | None,
    *,
    entropy: bool = False,
) -> ShardStats:
    """Replace the raw logits of one shard by the gradient that nll would have if the shard were the whole vocabulary.

    `columns_n` outside 0..v-1 are targets of other shards: target logit and slope are 0 there and no onehot is
    subtracted. Rows without a finite logit get a zero gradient.
    """
    if logits_nv.shape[1] == 0:
        return _empty_shard(logits_nv, entropy)
    slope_nv = _apply_cap_and_temperature_(logits_nv, softcap, inv_temperature_n)
    inside_n = (columns_n >= 0) & (columns_n < logits_nv.shape[1])
    column_n1 = torch.where(inside_n, columns_n, 0)[:, None]
    target_logit_n = torch.where(inside_n, logits_nv.gather(1, column_n1)[:, 0], 0)
    peak_n = logits_nv.amax(1)
    shifted_nv = logits_nv - peak_n[:, None] if entropy else None

    torch.softmax(logits_nv, 1, out=logits_nv)
    log_sum_n = -logits_nv.amax(1).log()  # the largest p is 1 / sum e^(z - m), and never underflows
    finite_n = peak_n.isfinite()
    log_sum_n.masked_fill_(peak_n == -torch.inf, -torch.inf)
    entropy_n = None
    if shifted_nv is not None:
        entropy_n = log_sum_n - torch.where(logits_nv > 0, logits_nv * shifted_nv, 0).sum(1)
        entropy_n = torch.where(finite_n, entropy_n, 0)
    logits_nv.scatter_add_(1, column_n1, -(inside_n & finite_n).to(logits_nv.dtype)[:, None])
    target_slope_n = inside_n.to(logits_nv.dtype)
    if slope_nv is not None:
        logits_nv.mul_(slope_nv)
        target_slope_n = target_slope_n * slope_nv.gather(1, column_n1)[:, 0].nan_to_num(0)
    logits_nv[(~finite_n).nonzero()[:, 0]] = 0
    return ShardStats(peak_n, log_sum_n, target_logit_n, target_slope_n, entropy_n)


def sliced_gradient_(
    logits_nv: Tensor,
    columns_n: Tensor,
    softcap: float | None,
    inv_temperature_n: Tensor | None,
    lse_n: Tensor,
    lse_error_n: Tensor,
    entropy_terms: EntropyTerms | None = None,
) -> None:
    """Replace the raw logits of some columns by e^lse_error times the gradient of nll, up to 1/T.

    lse_error = nll - (lse - t) is what rounding took from lse; it is large when a constant was added to all logits.
    e^(z - lse) needs two passes and the factor e^-lse_error goes with the other factors of the row. With entropy terms
    it is subtracted at once, and the gradient is alpha (p - onehot) - epsilon p (log p + entropy).
    """
    slope_nv = _apply_cap_and_temperature_(logits_nv, softcap, inv_temperature_n)
    logits_nv.sub_(lse_n[:, None])
    if entropy_terms is None:
        logits_nv.exp_()
        onehot_n = lse_error_n.exp()
    else:
        onehot_n = entropy_terms.alpha_n
        _mix_entropy_(logits_nv.sub_(lse_error_n[:, None]), entropy_terms)
    inside_n = (columns_n >= 0) & (columns_n < logits_nv.shape[1])
    column_n1 = torch.where(inside_n, columns_n, 0)[:, None]
    logits_nv.scatter_add_(1, column_n1, -torch.where(inside_n, onehot_n, 0)[:, None])
    if slope_nv is not None:
        logits_nv.mul_(slope_nv)


def _mix_entropy_(log_prob_nv: Tensor, terms: EntropyTerms) -> None:
    """log p -> alpha p - epsilon p (log p + entropy); 0 where p is."""
    log_prob_nv.clamp_(min=-1e30)
    prob_nv = log_prob_nv.exp()
    log_prob_nv.add_(terms.entropy_n[:, None]).mul_(-terms.epsilon_n[:, None]).add_(terms.alpha_n[:, None])
    log_prob_nv.mul_(prob_nv)


def _empty_shard(logits_n0: Tensor, entropy: bool) -> ShardStats:
    zero_n = logits_n0.new_zeros(logits_n0.shape[0])
    nothing_n = torch.full_like(zero_n, -torch.inf)
    return ShardStats(nothing_n, nothing_n, zero_n, zero_n, zero_n if entropy else None)


def _apply_cap_and_temperature_(
    logits_nv: Tensor, softcap: float | None, inv_temperature_n: Tensor | None
) -> Tensor | None:
    slope_nv = None
    if softcap is not None:
        logits_nv.div_(softcap).tanh_()
        slope_nv = logits_nv.square().neg_().add_(1)
        logits_nv.mul_(softcap)
    if inv_temperature_n is not None:
        logits_nv.mul_(inv_temperature_n[:, None])
    return slope_nv


def _redo_underflowed_(
    nll_n: Tensor,
    lse_n: Tensor,
    target_prob_n: Tensor,
    targets_n: Tensor,
    softcap: float | None,
    inv_temperature_n: Tensor | None,
    logits_of: Callable[[Tensor], Tensor],
) -> None:
    """Where p_y is too small for its logarithm to be exact (nll beyond about 69 nats), start from the row maximum."""
    smallest = 1e-30 if target_prob_n.dtype == torch.float32 else 1e-290
    rows_k = (target_prob_n < smallest).nonzero()[:, 0]
    if rows_k.numel() == 0:
        return
    logits_kv = logits_of(rows_k)
    inv_temperature_k = None if inv_temperature_n is None else inv_temperature_n[rows_k]
    _apply_cap_and_temperature_(logits_kv, softcap, inv_temperature_k)
    peak_k = logits_kv.amax(1)
    log_sum_k = (logits_kv - peak_k[:, None]).exp().sum(1).log()
    target_logit_k = logits_kv.gather(1, targets_n[rows_k, None])[:, 0]
    nll_n[rows_k] = log_sum_k + (peak_k - target_logit_k)
    lse_n[rows_k] = log_sum_k + peak_k
