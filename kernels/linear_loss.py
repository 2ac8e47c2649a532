"""The scalar loss of a linear head for row weights that are known beforehand: engine S, the least time and memory.

    L = sum_i row_weight_i * nll_i + z_loss * sum_i z_weight_i * lse_i**2

Plain token-mean training is `row_weight = 1 / (number of tokens of the whole optimizer step)`. Where the weights
depend on the losses of the same step, use `linear_nll`.  N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixwright.kernels.blocks import Needs
from mixwright.kernels.head_inputs import HeadInputs, check_head, inverse_temperature, refuse_targets_out_of_range
from mixwright.kernels.stream import Weights, forward_stream


class LinearLoss(NamedTuple):
    """`loss_sum` [] is differentiable; nll and lse, [N], are for reports. float32 (float64 for double inputs), nats."""

    loss_sum: Tensor
    nll_N: Tensor
    lse_N: Tensor


def linear_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    row_weight_N: Tensor,
    *,
    z_loss: float = 0.0,
    z_weight_N: Tensor | None = None,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    precise: bool = False,
) -> LinearLoss:
    """Weighted sum of losses; gradients to hidden, weight and bias are formed in this call and scaled in the backward.

    Args:
        row_weight_N: any numbers, constants of the loss; a row of weight 0 influences nothing, even if it is NaN.
        z_loss: alpha of PaLM's z-loss; `z_weight_N` are its own row weights, by default those of the nll.

    The other arguments, shapes and errors are those of `linear_nll`. Source: spec/kernels.md section 4, engine S.
    """
    check_head(hidden_ND, weight_VD, bias_V, targets_N, softcap)
    if not math.isfinite(z_loss):
        raise ValueError(f"z_loss is {z_loss}, expected a finite number")
    row_dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    row_weight_N = _checked_row_weight("row_weight", row_weight_N, hidden_ND, row_dtype)
    if z_weight_N is not None:
        z_weight_N = _checked_row_weight("z_weight", z_weight_N, hidden_ND, row_dtype)
    parameters = (hidden_ND, weight_VD, bias_V)
    needs = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in parameters]
    loss_sum, nll_N, lse_N, *_ = _stream_op(
        hidden_ND,
        weight_VD,
        bias_V,
        targets_N,
        row_weight_N,
        z_weight_N,
        inverse_temperature(temperature, hidden_ND, row_dtype),
        z_loss,
        softcap,
        ignore_index,
        needs,
        precise,
    )
    return LinearLoss(loss_sum, nll_N, lse_N)


def _checked_row_weight(name: str, row_weight_N: Tensor, hidden_ND: Tensor, row_dtype: torch.dtype) -> Tensor:
    if row_weight_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"{name} has shape {list(row_weight_N.shape)}, expected [{hidden_ND.shape[0]}] like hidden")
    if row_weight_N.requires_grad:
        raise ValueError(f"{name} requires a gradient, which linear_loss does not compute: detach it or use linear_nll")
    return row_weight_N.to(hidden_ND.device, row_dtype)


@torch.library.custom_op("mixwright::linear_loss", mutates_args=())
def _stream_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weight: Tensor,
    z_weight: Tensor | None,
    inv_temperature: Tensor | None,
    z_loss: float,
    softcap: float | None,
    ignore_index: int,
    needs: list[bool],
    precise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    head = HeadInputs(hidden, weight, bias, targets, inv_temperature, softcap, ignore_index)
    if targets.device.type == "cpu":
        refuse_targets_out_of_range(targets, weight.shape[0], ignore_index)
    weights = Weights(row_weight, row_weight if z_weight is None else z_weight, z_loss)
    result = forward_stream(head, weights, Needs(*needs), precise=precise)
    dhidden, dweight, dbias = (result.nll_N.new_empty(0) if grad is None else grad for grad in result.gradients)
    return result.loss_sum, result.nll_N, result.lse_N, dhidden, dweight, dbias


@_stream_op.register_fake
def _stream_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weight: Tensor,
    z_weight: Tensor | None,
    inv_temperature: Tensor | None,
    z_loss: float,
    softcap: float | None,
    ignore_index: int,
    needs: list[bool],
    precise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    nll_N = torch.empty_like(row_weight)

    def like(tensor: Tensor | None, needed: bool) -> Tensor:
        return nll_N.new_empty(tensor.shape if needed and tensor is not None else (0,))

    gradients = like(hidden, needs[0]), like(weight, needs[1]), like(bias, needs[2])
    return nll_N.new_empty(()), nll_N, torch.empty_like(nll_N), *gradients


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, needs = inputs[0], inputs[10]
    _, nll, lse, *gradients = output
    ctx.dtype, ctx.needs = hidden.dtype, needs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(nll, lse, *gradients)
    ctx.save_for_backward(*gradients)


def _scale_gradients(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    scaled = [
        (gradient * dloss).to(ctx.dtype) if needed and dloss is not None else None
        for gradient, needed in zip(ctx.saved_tensors, ctx.needs, strict=True)
    ]
    return (*scaled, *(None,) * 9)


_stream_op.register_autograd(_scale_gradients, setup_context=_keep_gradients)
