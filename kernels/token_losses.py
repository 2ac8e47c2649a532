"""Losses in plain torch on what `linear_nll` returns: no kernel knows of any of them.

nll = -log p_y and lse = log sum_k e^z_k per token, [N], nats. Gradients flow through both; because the head binds them
late, none of these losses costs another matmul. Tokens whose target is ignored have nll = lse = 0 and stay 0 in all of
them except `ldr_kl`, whose value at nll 0 is a constant: leave such tokens out by a weight of 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def weighted_sum(losses_N: Tensor, weight_N: Tensor) -> Tensor:
    """sum_i weight_i * loss_i, where a weight of 0 silences even a loss that is NaN."""
    return torch.where(weight_N == 0, 0, losses_N).mul(weight_N).sum()


def palm_z_loss(lse_N: Tensor, weight_N: Tensor, alpha: float = 1e-4) -> Tensor:
    """alpha * sum_i v_i lse_i**2, kept apart from the cross-entropy that perplexity is made of.

    `weight_N` is the term's own row scale: the instance weights, or 1 / number of tokens so that tokens of small
    weight stay stabilised too. Source: PaLM (arXiv 2204.02311), spec/methods.md section 5.
    """
    return alpha * torch.where(weight_N == 0, 0, lse_N).square().mul(weight_N).sum()


def comp_sum(nll_N: Tensor, tau: float, straight_beyond: float = 20.0) -> Tensor:
    """Comp-sum losses (p_y**(tau-1) - 1) / (1 - tau): 0 sum-exponential, 1 cross-entropy, 1..2 generalised CE, 2 MAE.

    For tau < 1 the loss grows as e^((1-tau) nll); beyond `straight_beyond` nats it goes on as a straight line, so that
    one token neither overflows nor takes the whole step. Range of tau: 0..2. Source: Mao, Mohri, Zhong 2023.
    """
    if not 0 <= tau <= 2:
        raise ValueError(f"tau is {tau}, expected 0..2")
    if tau == 1:
        return nll_N
    if tau > 1:
        return torch.expm1((1 - tau) * nll_N) / (1 - tau)
    curved_N = nll_N.clamp(max=straight_beyond)
    slope = math.exp((1 - tau) * straight_beyond)
    return torch.expm1((1 - tau) * curved_N) / (1 - tau) + torch.relu(nll_N - straight_beyond) * slope


def mean_logit(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None = None, temperature: float | Tensor = 1.0
) -> Tensor:
    """Mean over the vocabulary of the logits of a head without soft-cap, float32 [N], without forming them.

    mean_v (h W_v + b_v) = h mean(W) + mean(b): 2 N D + V D operations. float64 for double inputs.
    """
    row_dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    mean_N = hidden_ND.to(row_dtype) @ weight_VD.mean(0, dtype=row_dtype)
    if bias_V is not None:
        mean_N = mean_N + bias_V.mean(dtype=row_dtype)
    return mean_N / temperature


def label_smoothing(nll_N: Tensor, lse_N: Tensor, mean_logit_N: Tensor, epsilon: float) -> Tensor:
    """Cross-entropy to (1 - epsilon) onehot + epsilon / V: (1 - epsilon) nll + epsilon (lse - mean logit).

    Exactly 0 where nll and lse are (ignored tokens). There is no form of it for a soft-capped head.
    """
    if not 0 <= epsilon < 1:
        raise ValueError(f"epsilon is {epsilon}, expected 0 <= epsilon < 1")
    counted_N = (nll_N != 0) | (lse_N != 0)
    return torch.where(counted_N, (1 - epsilon) * nll_N + epsilon * (lse_N - mean_logit_N), 0)


def ldr_kl(nll_N: Tensor, vocabulary: int, temperature: float | Tensor, margin: float = 0.0) -> Tensor:
    """LDR-KL: lambda log((1/K) sum_k exp((f_k + c [k != y] - f_y) / lambda)), from nll at temperature lambda.

    The margin needs no kernel: with sum_{k != y} = e^nll - 1 the loss is
    lambda (nll + log1p((e^(c/lambda) - 1)(1 - e^-nll)) - log K). lambda = 1, c = 0 is cross-entropy - log K; a small
    lambda nears the max-margin loss. `temperature` is the one nll was computed with, a number or [N].
    Raises ValueError where margin / temperature exceeds 80. Source: Zhu, Ying, Yang 2023, spec/methods.md section 7.
    """
    if margin < 0 or (isinstance(temperature, float) and margin > 80 * temperature):
        raise ValueError(f"margin is {margin}, expected 0 .. 80 times the temperature")
    raised_N = torch.as_tensor(margin / temperature, dtype=nll_N.dtype, device=nll_N.device).expm1()
    return temperature * (nll_N + torch.log1p(raised_N * -torch.expm1(-nll_N)) - math.log(vocabulary))


def aldr_temperature(entropy_N: Tensor, vocabulary: int, temperature: float = 1.0, alpha: float = 2.0) -> Tensor:
    """ALDR-KL's temperature per row, detached: lambda0 (1 - KL(p || uniform) / (alpha log K)), [N].

    `entropy_N` is that of p at lambda0 (`linear_nll(..., temperature=lambda0, entropy=True)`), KL = log K - entropy.
    The range is lambda0 (1 - 1/alpha) .. lambda0, so alpha must exceed 1. The paper's table per sample has no place in
    a language model; this closed form needs none.
    """
    if alpha <= 1:
        raise ValueError(f"alpha is {alpha}, expected more than 1, else a temperature may reach 0")
    if vocabulary < 2:
        raise ValueError(f"vocabulary is {vocabulary}, expected at least 2 classes")
    divergence_N = math.log(vocabulary) - entropy_N.detach()
    return temperature * (1 - divergence_N / (alpha * math.log(vocabulary)))


def elr_penalty(agreement_N: Tensor) -> Tensor:
    """Early-learning regularisation log(1 - <t, p>), to be added to nll with a factor (3 to 7 in the paper).

    Source: Liu et al. 2020, spec/methods.md section 10.
    """
    return torch.log1p(-agreement_N)


def target_agreement(nll_N: Tensor, teacher_nll_N: Tensor, floor: float = 1e-4) -> Tensor:
    """<t, p> restricted to the target class: t_y p_y, with t the prediction of an EMA of the model itself.

    The paper keeps a table of t per sample and class, which no language model can hold; the EMA model's loss of the
    target is one number per token. It is a lower bound of the full product, so the penalty is weaker, never stronger.
    Both probabilities are clamped to floor .. 1 - floor as in the paper's code. Differentiable in nll alone.
    """
    prob_N, teacher_prob_N = (torch.exp(-loss_N).clamp(floor, 1 - floor) for loss_N in (nll_N, teacher_nll_N.detach()))
    return prob_N * teacher_prob_N


def segment_means(values_N: Tensor, segment_N: Tensor, num_segments: int, counted_N: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the counted values of each segment, and their number; both [num_segments], 0 for an empty segment.

    Segments are the samples of packed rows: int64 ids below `num_segments` in any order. `counted_N` (bool) leaves out
    ignored tokens, whose values may be NaN. The order of summation is that of the tokens: two runs give the same bits.
    """
    order_N = segment_N.argsort(stable=True)
    sizes_S = torch.bincount(segment_N, minlength=num_segments)
    if sizes_S.shape[0] > num_segments:
        raise ValueError(f"segment ids reach {sizes_S.shape[0] - 1}, expected 0..{num_segments - 1}")
    values_N = torch.where(counted_N, values_N, 0)
    counts_N = counted_N[order_N].to(values_N.dtype)
    lengths: dict[str, Any] = {
        "lengths": sizes_S,
        "unsafe": True,
    }  # torch's own check of lengths fails if there is none
    sum_S = torch.segment_reduce(values_N[order_N], "sum", **lengths)
    count_S = torch.segment_reduce(counts_N, "sum", **lengths)
    return sum_S / count_S.clamp(min=1), count_S


def spread_over_tokens(weight_S: Tensor, segment_N: Tensor, count_S: Tensor, counted_N: Tensor) -> Tensor:
    """Row coefficients that give every segment's mean loss its weight: w_s / n_s on counted tokens, else 0; [N]."""
    return torch.where(counted_N, (weight_S / count_S.clamp(min=1))[segment_N], 0)
