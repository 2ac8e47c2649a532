"""Spherical Z-loss: a head whose cost does not depend on N times V (de Brebisson and Vincent, arXiv 1604.08859).

With logits o = W h, their mean mu and standard deviation sigma over the V classes, z = (o_y - mu) / sigma:

    L = softplus(a (b - z)) / a                          a > 0 sharpness, b location

L needs only two moments of W, formed once per optimizer step (2 V D^2 operations), never the logits:

    w = mean_i W_i,  Q = sum_i (W_i - w)(W_i - w)^T,  v = h^T Q h = V sigma^2,  t = (W_y - w) h,  z = t sqrt(V / v)

Backward, g = upstream gradient of a row: delta = -g sigmoid(a (b - z)), g_t = delta sqrt(V / v), g_v = -delta z / (2 v)

    dH = 2 g_v (H Q) + g_t (W_y - w)          dQ = H^T diag(g_v) H          dw = -sum_n g_t h_n
    dW = (W - w)(dQ + dQ^T) + 1 dw^T / V  + the rows g_t h_n added at y_n

Centred moments in float32: raw ones lose v where W has an offset or h lies where W varies little. Every weight of a row
may depend on the losses of the step. L is no probability: `fit_temperature` gives a perplexity, and says with which T.
N tokens, D hidden size, V classes.
"""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook

from mixwright.kernels.blocks import scatter_add_rows_
from mixwright.kernels.linear_nll import linear_nll

ROWS_PER_SLICE = 8192
SMALLEST_VARIANCE = 1e-10  # of v, relative to |h|^2 trace(Q) / D: below it all logits are equal but for rounding


class ClassMoments(NamedTuple):
    """Mean row [D] and centred second moment [D, D] of a weight, float32 (float64 for a double weight)."""

    mean_D: Tensor
    scatter_DD: Tensor


class FittedPerplexity(NamedTuple):
    """Perplexity of softmax(logits / temperature) with the temperature that suits these very rows best."""

    perplexity: float
    temperature: float
    num_tokens: int


class SphericalZLoss(nn.Module):
    """Head with the spherical Z-loss on a given weight [V, D], which may be tied to an embedding.

    The moments of the weight are kept until its version counter or storage changes or a torch optimizer steps (fused
    ones bypass the counter). Other updates that bypass it (`weight.data`) must be followed by `invalidate()`.

    With `deferred` the dense part of the weight's gradient is formed only by `finish_gradient()`, once for all
    micro-batches of an optimizer step: call it before clipping and stepping.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        *,
        sharpness: float = 1.0,
        location: float = 0.0,
        ignore_index: int = -100,
        deferred: bool = False,
    ) -> None:
        super().__init__()
        if not sharpness > 0:
            raise ValueError(f"sharpness is {sharpness}, expected a positive number")
        self.weight = weight
        self.sharpness, self.location = sharpness, location
        self.ignore_index, self.deferred = ignore_index, deferred
        self._moments: ClassMoments | None = None
        self._moments_of: tuple[int, int] | None = None
        invalidate_after_optimizer_steps(self)

    def forward(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        """Loss of each token, [N], float32 (float64 for double inputs); 0 where the target is ignored."""
        check_inputs(hidden_ND, self.weight, targets_N)
        moments = self._current_moments()
        if not self.deferred:
            moments = ClassMoments(*_AttachMoments.apply(self.weight, *moments))  # type: ignore[no-untyped-call]
        options = (self.sharpness, self.location, self.ignore_index, self.weight.shape[0])
        loss_N: Tensor = SphericalRows.apply(hidden_ND, self.weight, targets_N, *moments, options)  # type: ignore[no-untyped-call]
        return loss_N

    def invalidate(self) -> None:
        """Take the moments for outdated; the next forward forms them from the weight as it is then."""
        self._moments_of = None

    def has_pending_gradient(self) -> bool:
        """Whether micro-batches left a gradient in the moments that `finish_gradient()` has not added yet."""
        return self._moments is not None and self._moments.mean_D.grad is not None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has a weight of its own."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.invalidate()
        invalidate_after_optimizer_steps(self)

    def finish_gradient(self) -> None:
        """Add to `weight.grad` what the micro-batches since the last call left in the moments (`deferred` only)."""
        moments = self._moments
        if moments is None or moments.mean_D.grad is None or moments.scatter_DD.grad is None:
            return
        with torch.no_grad():
            moments_grad = ClassMoments(moments.mean_D.grad, moments.scatter_DD.grad)
            dense_VD = dense_gradient(self.weight, moments, moments_grad, self.weight.shape[0])
            self.weight.grad = dense_VD if self.weight.grad is None else self.weight.grad.add_(dense_VD)
        moments.mean_D.grad = moments.scatter_DD.grad = None

    def _current_moments(self) -> ClassMoments:
        key = self.weight._version, self.weight.data_ptr()
        if self._moments is None or self._moments_of != key:
            self._refuse_to_lose_gradients()
            self._moments, self._moments_of = class_moments(self.weight.detach()), key
            if self.deferred and self.weight.requires_grad:
                self._moments.mean_D.requires_grad_()
                self._moments.scatter_DD.requires_grad_()
        return self._moments

    def _refuse_to_lose_gradients(self) -> None:
        if self.has_pending_gradient():
            raise RuntimeError("SphericalZLoss: the weight changed before finish_gradient() added its dense gradient")


class FollowsOptimizers(Protocol):
    """A head whose moments are those of a weight that optimizers change."""

    weight: nn.Parameter

    def invalidate(self) -> None: ...

    def has_pending_gradient(self) -> bool: ...


def invalidate_after_optimizer_steps(head: FollowsOptimizers) -> None:
    """Invalidate the head's moments after steps of any torch optimizer, as long as the head lives.

    A fused step changes a weight without its version counter, and a partitioned one (ZeRO) does not even know it. While
    a gradient is pending, steps of optimizers that do not hold the weight are taken for those of other models.
    """
    alive = weakref.ref(head)

    def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        head = alive()
        if head is None:
            return
        holds_weight = any(head.weight is tensor for group in optimizer.param_groups for tensor in group["params"])
        if holds_weight or not head.has_pending_gradient():
            head.invalidate()

    weakref.finalize(head, register_optimizer_step_post_hook(after_step).remove)


def class_moments(weight_VD: Tensor) -> ClassMoments:
    """Mean and centred second moment in two passes over slices of the rows: 2 V D^2 operations."""
    row_dtype = torch.float64 if weight_VD.dtype == torch.float64 else torch.float32
    mean_D = weight_VD.mean(0, dtype=row_dtype)
    return ClassMoments(mean_D, centred_scatter(weight_VD, mean_D))


def centred_scatter(weight_VD: Tensor, mean_D: Tensor) -> Tensor:
    """sum_i (W_i - mean)(W_i - mean)^T, [D, D] in the dtype of the mean."""
    scatter_DD = mean_D.new_zeros(weight_VD.shape[1], weight_VD.shape[1])
    for first in range(0, weight_VD.shape[0], ROWS_PER_SLICE):
        centred_vD = weight_VD[first : first + ROWS_PER_SLICE] - mean_D
        scatter_DD.addmm_(centred_vD.T, centred_vD)
    return scatter_DD


def spherical_z_reference(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, sharpness: float = 1.0, location: float = 0.0
) -> Tensor:
    """The definition, in float64 with materialised logits; every target must be a class."""
    logits_NV = hidden_ND.double() @ weight_VD.double().T
    variance_N, mean_N = torch.var_mean(logits_NV, dim=1, correction=0)
    z_N = (logits_NV.gather(1, targets_N[:, None])[:, 0] - mean_N) / variance_N.sqrt()
    return functional.softplus(sharpness * (location - z_N)) / sharpness


def fit_temperature(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, ignore_index: int = -100, num_steps: int = 40
) -> FittedPerplexity:
    """Fit the temperature of softmax(logits / T) to held-out rows by golden section over log T in 1e-4 .. 1e4.

    The perplexity belongs to rows, temperature and softmax together; report it with the temperature. It is never lower
    than that of a model of the same logits calibrated by other means on these rows only.
    """
    num_tokens = int((targets_N != ignore_index).sum())
    if num_tokens == 0:
        raise ValueError("no row has a target: there is nothing to fit a temperature to")

    def mean_nll(log_temperature: float) -> float:
        with torch.no_grad():
            options: dict[str, Any] = {"temperature": math.exp(log_temperature), "ignore_index": ignore_index}
            losses = linear_nll(hidden_ND, weight_VD, targets_N, **options)
        return float(losses.nll_N.double().sum()) / num_tokens

    low, high, ratio = math.log(1e-4), math.log(1e4), (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = mean_nll(left), mean_nll(right)
    for _ in range(num_steps):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = mean_nll(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = mean_nll(right)
    best, at_best = (left, at_left) if at_left < at_right else (right, at_right)
    return FittedPerplexity(math.exp(at_best), math.exp(best), num_tokens)


class SphericalRows(torch.autograd.Function):
    """Losses of rows from the moments. The weight's own gradient is that of the target rows alone.

    `options` are sharpness, location, ignore_index and V; the weight may be a table of fetched rows instead.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        mean_D: Tensor,
        scatter_DD: Tensor,
        options: tuple[float, float, int, int],
    ) -> Tensor:
        sharpness, location, ignore_index, num_classes = options
        has_target_N = targets_N != ignore_index
        finite_N = hidden_ND.sum(1, dtype=mean_D.dtype).isfinite()
        rows_ND = hidden_ND.to(mean_D.dtype).masked_fill(~(finite_N & has_target_N)[:, None], 0)
        classes_N = torch.where(has_target_N, targets_N, 0)
        product_ND = rows_ND @ scatter_DD
        variance_sum_N = (product_ND * rows_ND).sum(1)
        target_N = ((weight_VD[classes_N] - mean_D) * rows_ND).sum(1)
        scale_N = rows_ND.square().sum(1) * scatter_DD.trace() / scatter_DD.shape[0]
        varied_N = variance_sum_N > SMALLEST_VARIANCE * scale_N
        inv_sigma_N = torch.where(varied_N, num_classes / variance_sum_N, 0).sqrt()
        margin_N = sharpness * (location - target_N * inv_sigma_N)
        masks = has_target_N, finite_N
        ctx.save_for_backward(rows_ND, weight_VD, classes_N, mean_D, product_ND, margin_N, inv_sigma_N, *masks)
        ctx.options = options
        loss_N = functional.softplus(margin_N) / sharpness
        return torch.where(has_target_N, torch.where(finite_N, loss_N, torch.nan), 0)

    @staticmethod
    def backward(ctx: Any, dloss_N: Tensor) -> tuple[Tensor | None, ...]:
        rows_ND, weight_VD, classes_N, mean_D, product_ND, margin_N, inv_sigma_N, *masks = ctx.saved_tensors
        sharpness, location, _, num_classes = ctx.options
        has_target_N, finite_N = masks
        dloss_N = torch.where(has_target_N, dloss_N, 0)
        dloss_N = torch.where(finite_N | (dloss_N == 0), dloss_N, torch.nan)
        delta_N = -dloss_N * torch.sigmoid(margin_N)
        z_N = location - margin_N / sharpness
        dtarget_N = delta_N * inv_sigma_N
        dvariance_N = -delta_N * z_N * inv_sigma_N.square() / (2 * num_classes)
        dhidden_ND = dweight_VD = dmean_D = dscatter_DD = None
        if ctx.needs_input_grad[0]:
            dhidden_ND = 2 * dvariance_N[:, None] * product_ND
            dhidden_ND.add_(dtarget_N[:, None] * (weight_VD[classes_N] - mean_D))
            dhidden_ND = dhidden_ND.to(weight_VD.dtype)
        if ctx.needs_input_grad[1]:
            dweight_VD = torch.zeros_like(weight_VD)
            scatter_add_rows_(dweight_VD, classes_N, dtarget_N[:, None] * rows_ND)
        if ctx.needs_input_grad[4]:
            dmean_D = -(dtarget_N @ rows_ND)
            dscatter_DD = rows_ND.T @ (dvariance_N[:, None] * rows_ND)
        return dhidden_ND, dweight_VD, None, dmean_D, dscatter_DD, None


class _AttachMoments(torch.autograd.Function):
    """Moments that were formed earlier, made functions of the weight again: backward forms the dense gradient."""

    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, mean_D: Tensor, scatter_DD: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight_VD, mean_D, scatter_DD)
        return mean_D.view_as(mean_D), scatter_DD.view_as(scatter_DD)

    @staticmethod
    def backward(ctx: Any, dmean_D: Tensor, dscatter_DD: Tensor) -> tuple[Tensor, None, None]:
        weight_VD, *moments = ctx.saved_tensors
        upstream = ClassMoments(dmean_D, dscatter_DD)
        return dense_gradient(weight_VD, ClassMoments(*moments), upstream, weight_VD.shape[0]), None, None


def dense_gradient(weight_VD: Tensor, moments: ClassMoments, upstream: ClassMoments, num_classes: int) -> Tensor:
    """dW = (W - mean)(dQ + dQ^T) + dmean / V for all rows, or some, slice by slice in the dtype of the weight."""
    symmetric_DD = upstream.scatter_DD + upstream.scatter_DD.T
    dweight_VD = torch.empty_like(weight_VD, memory_format=torch.contiguous_format)
    for first in range(0, weight_VD.shape[0], ROWS_PER_SLICE):
        rows = slice(first, first + ROWS_PER_SLICE)
        centred_vD = weight_VD.detach()[rows] - moments.mean_D
        dweight_VD[rows] = torch.addmm(upstream.mean_D / num_classes, centred_vD, symmetric_DD)
    return dweight_VD


def check_inputs(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> None:
    """Raise ValueError or TypeError, in one line, for shapes or dtypes that do not fit together."""
    if hidden_ND.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1] or targets_N.shape != hidden_ND.shape[:1]:
        shapes = f"hidden {list(hidden_ND.shape)}, weight {list(weight_VD.shape)}, targets {list(targets_N.shape)}"
        raise ValueError(f"{shapes} do not fit: expected [N, D], [V, D], [N]")
    if hidden_ND.dtype != weight_VD.dtype:
        raise TypeError(f"weight is {weight_VD.dtype} but hidden is {hidden_ND.dtype}: cast one of them first")
