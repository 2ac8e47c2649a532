"""Engine S: gradients formed block by block in the forward, for row coefficients that are known before it.

    L  = sum_i w_i nll_i + alpha sum_i v_i lse_i**2         a_i = (w_i + 2 alpha v_i lse_i) / T_i
    dH = a * (G W)        dW += G^T (a * H) per block        + 2 alpha v_i lse_i / T_i on one row of W per token

Three matmuls and one block of logits. The price is that dW exists from forward to backward, in float32 for 16-bit
inputs, so that neither the number of blocks nor a loss scale applied later costs accuracy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixwright.kernels.blocks import (
    Block,
    Gradients,
    Needs,
    RowOptions,
    add_onehot_rows_,
    add_product_,
    bind_rows,
    gradient_blocks,
)
from mixwright.kernels.head_inputs import HeadInputs
from mixwright.kernels.token_losses import weighted_sum


class Weights(NamedTuple):
    """Row weights of nll and of lse**2, both [N] in the row dtype, and the factor alpha of the latter."""

    nll_N: Tensor
    squared_lse_N: Tensor
    z_loss: float


class StreamResult(NamedTuple):
    """Loss [] and statistics [N] as in `linear_nll`, and the gradients of the loss, accumulated in the row dtype."""

    loss_sum: Tensor
    nll_N: Tensor
    lse_N: Tensor
    gradients: Gradients


def forward_stream(head: HeadInputs, weights: Weights, needs: Needs, *, precise: bool) -> StreamResult:
    """Loss and gradients in one pass over the rows. Rows of weight 0 influence nothing, even if they are NaN."""
    num_rows, vocabulary = head.hidden_ND.shape[0], head.weight_VD.shape[0]
    nll_N, lse_N, onehot_N = torch.zeros(3, num_rows, dtype=head.row_dtype, device=head.hidden_ND.device)
    out = _zero_gradients(head, needs)
    live_N = head.live_rows()
    no_cache = head.hidden_ND.new_empty(0, vocabulary)
    for block in gradient_blocks(head, no_cache, RowOptions(precise=precise)):
        span, stats = block.span, block.stats
        nll_N[span], lse_N[span] = stats.nll_n, stats.lse_n
        finite_n, has_target_n = live_N[span] & stats.lse_n.isfinite(), head.has_target()[span]
        z_weight_n = 2 * weights.z_loss * weights.squared_lse_N[span]
        dlse_n = torch.where(z_weight_n == 0, 0, z_weight_n * stats.lse_n)
        coefficient_n = weights.nll_N[span] + dlse_n
        if head.inv_temperature_N is not None:
            coefficient_n, dlse_n = (part_n * head.inv_temperature_N[span] for part_n in (coefficient_n, dlse_n))
        onehot_N[span] = _settle(dlse_n, finite_n, has_target_n) * stats.target_slope_n
        _accumulate_(out, head.weight_VD, block, _settle(coefficient_n, finite_n, has_target_n))
    if weights.z_loss != 0:
        add_onehot_rows_(out, head, head.live_hidden(), onehot_N)
    nll_N, lse_N = (torch.where(live_N, loss_N, torch.nan) for loss_N in (nll_N, lse_N))
    nll_N, lse_N = (torch.where(head.has_target(), loss_N, 0) for loss_N in (nll_N, lse_N))
    loss_sum = weighted_sum(nll_N, weights.nll_N)
    if weights.z_loss != 0:
        loss_sum = loss_sum + weights.z_loss * weighted_sum(lse_N.square(), weights.squared_lse_N)
    return StreamResult(loss_sum, nll_N, lse_N, out)


def _zero_gradients(head: HeadInputs, needs: Needs) -> Gradients:
    def zeros(like: Tensor | None, needed: bool) -> Tensor | None:
        return (
            torch.zeros(like.shape, dtype=head.row_dtype, device=like.device) if needed and like is not None else None
        )

    return Gradients(
        zeros(head.hidden_ND, needs.hidden), zeros(head.weight_VD, needs.weight), zeros(head.bias_V, needs.bias)
    )


def _settle(coefficient_n: Tensor, finite_n: Tensor, has_target_n: Tensor) -> Tensor:
    """0 for ignored rows; NaN for a row that is not finite and does count, so that the step is seen to be lost."""
    coefficient_n = torch.where(has_target_n, coefficient_n, 0)
    return torch.where(finite_n | (coefficient_n == 0), coefficient_n, torch.nan)


def _accumulate_(out: Gradients, weight_VD: Tensor, block: Block, coefficient_n: Tensor) -> None:
    gradient_nV = block.gradient_nV
    if out.hidden_ND is not None:
        torch.mul(torch.mm(gradient_nV, weight_VD), coefficient_n[:, None], out=out.hidden_ND[block.span])
    if out.weight_VD is not None:
        bound_nD, scale = bind_rows(block.hidden_nD, coefficient_n)
        add_product_(out.weight_VD, gradient_nV.T, bound_nD, scale)
    if out.bias_V is not None:
        out.bias_V.add_(torch.mv(gradient_nV.T.to(out.bias_V.dtype), coefficient_n))
