"""Negative log-likelihood of a linear head without keeping its logits, differentiable with any upstream gradients.

    z = softcap(hidden @ weight.T + bias) / temperature        lse = log sum_v e^z_v        nll = lse - z_y

Everything a language model trains on is plain torch on (nll, lse): means, per-row weights computed from the losses,
z-loss, comp-sum, preference losses. The weights may depend on the losses of this very step and still cost no fourth
matmul (engine A of `late_bound`). Which engine runs is a matter of bytes: the first `cache_bytes / (itemsize V)` rows
keep their gradient G (A, three matmuls), the others form it again in the backward (R, four).

N tokens, D hidden size, V vocabulary. Inputs are never overwritten, nothing waits for the device, and two runs give
the same bits. Gradients are first order: differentiating twice raises.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mixwright.kernels.blocks import Needs, RowOptions
from mixwright.kernels.head_inputs import HeadInputs, check_head, inverse_temperature, refuse_targets_out_of_range
from mixwright.kernels.late_bound import (
    Saved,
    Upstream,
    backward_late_bound,
    backward_with_entropy,
    forward_late_bound,
)

Engine = Literal["auto", "cached", "recompute"]
CPU_CACHE_BYTES, GPU_CACHE_BYTES = 256 << 20, 4 << 30


class TokenLosses(NamedTuple):
    """Per token, [N], float32 (float64 for double inputs), in nats; 0 and False where the target is ignored."""

    nll_N: Tensor
    lse_N: Tensor
    entropy_N: Tensor | None = None
    correct_N: Tensor | None = None


def linear_nll(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    cache_bytes: int | None = None,
    engine: Engine = "auto",
    entropy: bool = False,
    correct: bool = False,
    precise: bool = False,
) -> TokenLosses:
    """Losses of every token under a linear head; gradients flow from nll, lse, entropy to hidden, weight and bias.

    Args:
        hidden_ND: float32, bfloat16, float16 or float64; weight and bias have the same dtype.
        targets_N: int64 classes, or `ignore_index`.
        temperature: a positive number, or one per row, [N]; not differentiated.
        softcap: model logits are `cap * tanh(x / cap)`.
        cache_bytes: memory that may be kept from forward to backward; default 256 MiB on a CPU, 4 GiB on a GPU.
        engine: `cached` or `recompute` force engine A or R for all rows. R is independent of `cache_bytes` bit by bit.
        entropy: also return the entropy of the prediction. A gradient that reaches it is no multiple of G: that
            backward forms the logits of all rows again, so use `engine="recompute"` (four matmuls) to train on it.
        correct: also return whether no class has a larger logit than the target.
        precise: with 16-bit inputs, form logits in float32 (for sums of many log-probabilities).

    Rows whose hidden state is not finite have NaN losses; they influence nothing else as long as the upstream
    gradient is 0 there. Raises ValueError, TypeError or IndexError (CPU) in one line for inputs that do not fit.
    Source: spec/kernels.md section 4.
    """
    check_head(hidden_ND, weight_VD, bias_V, targets_N, softcap)
    row_dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    inv_temperature_N = inverse_temperature(temperature, hidden_ND, row_dtype)
    needs = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden_ND, weight_VD, bias_V)
    ]
    num_cached = num_cached_rows(hidden_ND, weight_VD.shape[0], engine, cache_bytes) if any(needs) else 0
    nll_N, lse_N, entropy_N, correct_N, *_ = _forward_op(
        hidden_ND,
        weight_VD,
        bias_V,
        targets_N,
        inv_temperature_N,
        softcap,
        ignore_index,
        num_cached,
        needs,
        entropy,
        correct,
        precise,
    )
    return TokenLosses(nll_N, lse_N, entropy_N if entropy else None, correct_N if correct else None)


def linear_nll_reference(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> TokenLosses:
    """The definition, in float64 with materialised logits; differentiable by autograd in every output but correct."""
    logits_NV = hidden_ND.double() @ weight_VD.double().T
    if bias_V is not None:
        logits_NV = logits_NV + bias_V.double()
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    logits_NV = logits_NV / (temperature.double().reshape(-1, 1) if isinstance(temperature, Tensor) else temperature)
    has_target_N = targets_N != ignore_index
    target_N1 = torch.where(has_target_N, targets_N, 0)[:, None]
    log_prob_NV = torch.log_softmax(logits_NV, dim=1)
    per_token = (
        -log_prob_NV.gather(1, target_N1)[:, 0],
        torch.logsumexp(logits_NV, dim=1),
        torch.special.entr(log_prob_NV.exp()).sum(1),
    )
    nll_N, lse_N, entropy_N = (torch.where(has_target_N, value_N, 0) for value_N in per_token)
    correct_N = (logits_NV.gather(1, target_N1)[:, 0] >= logits_NV.amax(1)) & has_target_N
    return TokenLosses(nll_N, lse_N, entropy_N, correct_N)


def num_cached_rows(hidden_ND: Tensor, vocabulary: int, engine: Engine, cache_bytes: int | None) -> int:
    """How many rows engine A takes: as many as the budget holds, unless an engine was asked for."""
    num_rows = hidden_ND.shape[0]
    if engine == "cached":
        return num_rows
    if engine == "recompute":
        return 0
    if engine != "auto":
        raise ValueError(f"engine is {engine!r}, expected 'auto', 'cached' or 'recompute'")
    if cache_bytes is None:
        cache_bytes = CPU_CACHE_BYTES if hidden_ND.device.type == "cpu" else GPU_CACHE_BYTES
    if cache_bytes < 0:
        raise ValueError(f"cache_bytes is {cache_bytes}, expected 0 or more")
    return min(num_rows, cache_bytes // max(1, vocabulary * hidden_ND.dtype.itemsize))


@torch.library.custom_op("mixwright::linear_nll_forward", mutates_args=())
def _forward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    inv_temperature: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    num_cached: int,
    needs: list[bool],
    entropy: bool,
    correct: bool,
    precise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    head = HeadInputs(hidden, weight, bias, targets, inv_temperature, softcap, ignore_index)
    if targets.device.type == "cpu":
        refuse_targets_out_of_range(targets, weight.shape[0], ignore_index)
    losses, saved = forward_late_bound(head, num_cached, needs[0], RowOptions(entropy, correct, precise))
    return *losses, *saved[1:]


@_forward_op.register_fake
def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    inv_temperature: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    num_cached: int,
    needs: list[bool],
    entropy: bool,
    correct: bool,
    precise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rows, hidden_size = hidden.shape
    row_N = hidden.new_empty(num_rows, dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    return (
        row_N,
        torch.empty_like(row_N),
        row_N.new_empty(num_rows if entropy else 0),
        row_N.new_empty(num_rows if correct else 0, dtype=torch.bool),
        torch.empty_like(row_N),
        torch.empty_like(row_N),
        hidden.new_empty(num_cached, weight.shape[0]),
        hidden.new_empty(num_cached if needs[0] else 0, hidden_size),
    )


@torch.library.custom_op("mixwright::linear_nll_backward", mutates_args=())
def _backward_op(
    dnll: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    inv_temperature: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    lse_error: Tensor,
    target_slope: Tensor,
    gradient: Tensor,
    unit_dhidden: Tensor,
    softcap: float | None,
    ignore_index: int,
    needs: list[bool],
    precise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    head = HeadInputs(hidden, weight, bias, targets, inv_temperature, softcap, ignore_index)
    saved = Saved(lse, lse_error, target_slope, gradient, unit_dhidden)
    if dentropy is None:
        out = backward_late_bound(head, saved, dnll, dlse, Needs(*needs), precise=precise)
    else:
        upstream = Upstream(dnll, dlse, dentropy)
        out = backward_with_entropy(head, saved, entropy, upstream, Needs(*needs), precise=precise)
    dhidden, dweight, dbias = (hidden.new_empty(0) if grad is None else grad for grad in out)
    return dhidden, dweight, dbias


@_backward_op.register_fake
def _backward_fake(
    dnll: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    inv_temperature: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    lse_error: Tensor,
    target_slope: Tensor,
    gradient: Tensor,
    unit_dhidden: Tensor,
    softcap: float | None,
    ignore_index: int,
    needs: list[bool],
    precise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None, needed: bool) -> Tensor:
        return hidden.new_empty(0) if tensor is None or not needed else hidden.new_empty(tensor.shape)

    return like(hidden, needs[0]), like(weight, needs[1]), like(bias, needs[2])


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, inv_temperature, softcap, ignore_index, _, needs, _, _, precise = inputs
    _, lse, entropy, correct, lse_error, target_slope, gradient, unit_dhidden = output
    ctx.options = softcap, ignore_index, needs, precise
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(correct, lse_error, target_slope, gradient, unit_dhidden)
    # Parameters are saved by reference: under ZeRO-3 the weight is there again when the module's backward runs.
    ctx.save_for_backward(
        hidden, weight, bias, targets, inv_temperature, lse, entropy, lse_error, target_slope, gradient, unit_dhidden
    )


def _backward(ctx: Any, dnll: Tensor | None, dlse: Tensor | None, dentropy: Tensor | None, *_: None) -> tuple[Any, ...]:
    dentropy = None if dentropy is None or dentropy.numel() == 0 else dentropy  # no entropy was asked for
    no_gradient = (None,) * 9
    if dnll is None and dlse is None and dentropy is None:
        return (None, None, None, *no_gradient)
    softcap, ignore_index, needs, precise = ctx.options
    gradients = _backward_op(dnll, dlse, dentropy, *ctx.saved_tensors, softcap, ignore_index, needs, precise)
    dhidden, dweight, dbias = (grad if needed else None for grad, needed in zip(gradients, needs, strict=True))
    return (dhidden, dweight, dbias, *no_gradient)


_forward_op.register_autograd(_backward, setup_context=_keep_for_backward)
