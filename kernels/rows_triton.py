"""Row operations of the fused heads as Triton kernels: the same functions as `rows_torch`, for float32 and 16 bits.

    unit_gradient_    one program per row, two passes: online softmax for (m, s), then x -> (p - onehot) * slope
    shard_gradient_   the same kernel; the target may lie in another shard
    sliced_gradient_  one program per row and block of columns, one pass: x -> (e^(z - lse) - onehot) * slope

With z = softcap(x) / T, padded lanes are set to -inf after cap and temperature, never before: a capped -inf is -cap.
Logits are read as float32 whatever their dtype; nll = log s - (t - m), which no common offset of the logits harms. A
row is one program and a sum has one order, so two runs give the same bits. Row offsets are 64-bit: N V may exceed
2**31. Rows whose lse is not finite (16-bit overflow) get a zero gradient; the caller's coefficient makes them visible.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixwright.kernels.rows_torch import EntropyTerms, RowStats, ShardStats

KEEPS_16_BITS = True
NUM_WARPS = 8


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
    """As `rows_torch.unit_gradient_`, in place on rows of stride 1; `logits_of` is not needed here.

    A target that is no column has a NaN loss: nothing outside the row is read.
    """
    stats = shard_gradient_(logits_nv, targets_n, softcap, inv_temperature_n, entropy=entropy)
    is_class_n = (targets_n >= 0) & (targets_n < logits_nv.shape[1])
    target_logit_n = torch.where(is_class_n, stats.target_logit_n, torch.nan)
    nll_n = stats.log_sum_n - (target_logit_n - stats.peak_n)
    correct_n = target_logit_n >= stats.peak_n if correct else None
    lse_n = stats.peak_n + stats.log_sum_n
    return RowStats(nll_n, lse_n, target_logit_n, stats.target_slope_n, stats.entropy_n, correct_n)


def shard_gradient_(
    logits_nv: Tensor,
    columns_n: Tensor,
    softcap: float | None,
    inv_temperature_n: Tensor | None,
    *,
    entropy: bool = False,
) -> ShardStats:
    """As `rows_torch.shard_gradient_`, in place on rows of stride 1."""
    num_rows, num_columns = logits_nv.shape
    peak_n, log_sum_n = logits_nv.new_full((2, num_rows), -torch.inf, dtype=torch.float32)
    target_logit_n, slope_n, entropy_n = logits_nv.new_zeros(3, num_rows, dtype=torch.float32)
    if num_rows and num_columns:
        with _device_of(logits_nv):
            _unit_gradient_kernel[(num_rows,)](
                logits_nv,
                logits_nv.stride(0),
                columns_n,
                inv_temperature_n,
                peak_n,
                log_sum_n,
                target_logit_n,
                slope_n,
                entropy_n,
                num_columns,
                1.0 if softcap is None else float(softcap),
                HAS_CAP=softcap is not None,
                HAS_TEMPERATURE=inv_temperature_n is not None,
                ENTROPY=entropy,
                BLOCK=_columns_per_block(logits_nv),
                num_warps=NUM_WARPS,
            )
    return ShardStats(peak_n, log_sum_n, target_logit_n, slope_n, entropy_n if entropy else None)


def sliced_gradient_(
    logits_nv: Tensor,
    columns_n: Tensor,
    softcap: float | None,
    inv_temperature_n: Tensor | None,
    lse_n: Tensor,
    lse_error_n: Tensor,
    entropy_terms: EntropyTerms | None = None,
) -> None:
    """As `rows_torch.sliced_gradient_`, in place on rows of stride 1."""
    num_rows, num_columns = logits_nv.shape
    block = _columns_per_block(logits_nv)
    if num_rows:
        with _device_of(logits_nv):
            _sliced_gradient_kernel[(num_rows, triton.cdiv(num_columns, block))](
                logits_nv,
                logits_nv.stride(0),
                columns_n,
                inv_temperature_n,
                lse_n,
                lse_error_n,
                *(entropy_terms or (None, None, None)),
                num_columns,
                1.0 if softcap is None else float(softcap),
                HAS_CAP=softcap is not None,
                HAS_TEMPERATURE=inv_temperature_n is not None,
                ENTROPY=entropy_terms is not None,
                BLOCK=block,
                num_warps=NUM_WARPS,
            )


def _device_of(logits_nv: Tensor) -> AbstractContextManager[None]:
    """Makes the device of the logits current, as a launch requires; nothing for CPU tensors."""
    guard: AbstractContextManager[None] = torch.cuda.device_of(logits_nv)  # type: ignore[no-untyped-call]
    return guard


def _columns_per_block(logits_nv: Tensor) -> int:
    widest = 2048 if logits_nv.dtype == torch.float32 else 4096
    return int(min(widest, triton.next_power_of_2(logits_nv.shape[1])))


@triton.jit  # type: ignore[untyped-decorator]
def _cap_and_temperature(x, softcap, inv_temperature, HAS_CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """(z, slope) of raw logits. tanh(a) = 1 - 2 / (e^2a + 1) is exact to one rounding of 1 and saturates at +-1."""
    if HAS_CAP:
        tanh = 1.0 - 2.0 / (tl.exp(x / softcap * 2.0) + 1.0)
        slope = 1.0 - tanh * tanh
        x = tanh * softcap
    else:
        slope = 1.0
    return x * inv_temperature, slope


@triton.jit  # type: ignore[untyped-decorator]
def _unit_gradient_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [n, v], stride of rows in elements
    row_stride,
    targets_ptr,  # [n] int64; one outside 0..columns-1 lies in another shard
    inv_temperature_ptr,  # [n] float32, as all that follow
    peak_ptr,
    log_sum_ptr,
    target_logit_ptr,
    slope_ptr,
    entropy_ptr,
    columns,
    softcap,
    HAS_CAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base_ptr = logits_ptr + row * row_stride
    target = tl.load(targets_ptr + row)
    inv_temperature = 1.0
    if HAS_TEMPERATURE:
        inv_temperature = tl.load(inv_temperature_ptr + row)
    is_here = (target >= 0) & (target < columns)
    raw_target = tl.load(base_ptr + tl.where(is_here, target, 0)).to(tl.float32)
    target_logit, target_slope = _cap_and_temperature(raw_target, softcap, inv_temperature, HAS_CAP)

    # Pass 1, online softmax: m = max z, s = sum e^(z - m). A block of nothing but -inf leaves s at 0.
    peak = -float("inf")
    total = 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        x = tl.load(base_ptr + column, mask=inside, other=0.0).to(tl.float32)
        z, _ = _cap_and_temperature(x, softcap, inv_temperature, HAS_CAP)
        z = tl.where(inside, z, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(z, axis=0))
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(z - shift), axis=0)
        peak = new_peak
    log_total = tl.log(total)
    lse = peak + log_total

    # Pass 2: p = e^((z - m) - log s), subtracting before anything is scaled; g = (p - onehot) slope.
    finite = (lse == lse) & (tl.abs(lse) < float("inf"))
    entropy = 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        x = tl.load(base_ptr + column, mask=inside, other=0.0).to(tl.float32)
        z, slope = _cap_and_temperature(x, softcap, inv_temperature, HAS_CAP)
        log_prob = tl.where(inside, (z - peak) - log_total, -float("inf"))
        prob = tl.exp(log_prob)
        if ENTROPY:
            entropy -= tl.sum(tl.where(prob > 0.0, prob * log_prob, 0.0), axis=0)
        gradient = tl.where(column == target, prob - 1.0, prob) * slope
        gradient = tl.where(finite, gradient, 0.0)
        tl.store(base_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=inside)

    tl.store(peak_ptr + row, peak)
    tl.store(log_sum_ptr + row, log_total)
    tl.store(target_logit_ptr + row, tl.where(is_here, target_logit, 0.0))
    tl.store(slope_ptr + row, tl.where(is_here & (target_slope == target_slope), target_slope, 0.0))
    if ENTROPY:
        tl.store(entropy_ptr + row, entropy)


@triton.jit  # type: ignore[untyped-decorator]
def _sliced_gradient_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [n, v] some columns of the logits
    row_stride,
    targets_ptr,  # [n] int64; one outside 0..columns-1 is none of these columns
    inv_temperature_ptr,
    lse_ptr,
    lse_error_ptr,
    alpha_ptr,
    epsilon_ptr,
    entropy_ptr,
    columns,
    softcap,
    HAS_CAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    target = tl.load(targets_ptr + row)
    lse = tl.load(lse_ptr + row)
    lse_error = tl.load(lse_error_ptr + row)
    inv_temperature = 1.0
    if HAS_TEMPERATURE:
        inv_temperature = tl.load(inv_temperature_ptr + row)
    pointer = logits_ptr + row * row_stride + column
    x = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
    z, slope = _cap_and_temperature(x, softcap, inv_temperature, HAS_CAP)
    if ENTROPY:
        alpha = tl.load(alpha_ptr + row)
        log_prob = tl.maximum((z - lse) - lse_error, -1e30)
        surplus = log_prob + tl.load(entropy_ptr + row)
        dense = tl.exp(log_prob) * (alpha - tl.load(epsilon_ptr + row) * surplus)
        gradient = tl.where(column == target, dense - alpha, dense) * slope
    else:
        prob = tl.exp(z - lse)
        gradient = tl.where(column == target, prob - tl.exp(lse_error), prob) * slope
    tl.store(pointer, gradient.to(logits_ptr.dtype.element_ty), mask=inside)
