"""Passes over the rows of a head, block by block: what engines A, R and S have in common.

Matmuls are torch's (oneDNN, cuBLAS); the work on rows of logits is done by `rows_torch` or `rows_triton`. Blocks of
rows whose gradient is kept are formed in its place, as large as matmuls like them; the others share a bounded scratch.
Logits that are float32 beside 16-bit inputs have no such place: on a GPU their blocks keep to the bound of the scratch.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mixwright.kernels import rows_torch
from mixwright.kernels.head_inputs import HeadInputs
from mixwright.kernels.rows_torch import RowStats

CPU_SCRATCH_BYTES, CPU_SCRATCH_ROWS, CPU_CACHED_ROWS = 16 << 20, 512, 1024
GPU_SCRATCH_BYTES, GPU_SCRATCH_ROWS, GPU_CACHED_ROWS = 512 << 20, 8192, 8192


class RowOptions(NamedTuple):
    """What the row pass does beyond nll, lse and gradient. `precise` forms logits of 16-bit inputs in float32."""

    entropy: bool = False
    correct: bool = False
    precise: bool = False


class LogitBlock(NamedTuple):
    """Rows before the row pass: hidden with dead rows zeroed, raw logits, and the memory that their gradient goes to.

    The logits lie in `out_nV` already where the row kernels read its dtype.
    """

    span: slice
    rows: HeadInputs
    hidden_nD: Tensor
    logits_nV: Tensor
    out_nV: Tensor

    def row_kernels(self) -> ModuleType:
        """What transforms the logits."""
        return row_kernels(self.out_nV.device, self.out_nV.dtype)

    def gradient(self) -> Tensor:
        """`out_nV`, after the logits were replaced by their gradient: rounded to the dtype of the inputs once."""
        return self.out_nV if self.logits_nV is self.out_nV else self.out_nV.copy_(self.logits_nV)


class Block(NamedTuple):
    """A span of rows after the row pass: hidden with dead rows zeroed, and the unit gradient G of `rows_torch`."""

    span: slice
    hidden_nD: Tensor
    gradient_nV: Tensor
    stats: RowStats


class Gradients(NamedTuple):
    """Gradients of a head in the dtype of its inputs; None where nobody asked: a frozen head has no dW buffer."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None


class Needs(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool

    def empty(self, head: HeadInputs) -> Gradients:
        """Uninitialised buffers; the engines write every element."""
        return Gradients(
            torch.empty_like(head.hidden_ND, memory_format=torch.contiguous_format) if self.hidden else None,
            torch.empty_like(head.weight_VD, memory_format=torch.contiguous_format) if self.weight else None,
            torch.empty_like(head.bias_V) if self.bias and head.bias_V is not None else None,
        )


def row_kernels(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module with the row operations for a device: Triton on CUDA, except for float64."""
    if device.type != "cuda" or dtype == torch.float64:
        return rows_torch
    from mixwright.kernels import rows_triton  # triton is not installed on every CPU-only machine

    return rows_triton


def rows_per_scratch(vocabulary: int, row_dtype: torch.dtype, device: torch.device) -> int:
    """Rows of logits that fit the scratch of a block."""
    on_cpu = device.type == "cpu"
    budget, largest = (CPU_SCRATCH_BYTES, CPU_SCRATCH_ROWS) if on_cpu else (GPU_SCRATCH_BYTES, GPU_SCRATCH_ROWS)
    return max(64, min(largest, budget // max(1, vocabulary * row_dtype.itemsize)))


def rows_per_cached_block(vocabulary: int, dtype: torch.dtype, device: torch.device, *, precise: bool) -> int:
    """Rows of a block whose gradient is kept: on a GPU those of a scratch, unless the logits fit in its place."""
    if device.type == "cpu":
        return CPU_CACHED_ROWS
    if _formed_in_place(dtype, device, precise):
        return GPU_CACHED_ROWS
    return min(GPU_CACHED_ROWS, rows_per_scratch(vocabulary, torch.float32, device))


def gradient_blocks(head: HeadInputs, cache_CV: Tensor, options: RowOptions) -> Iterator[Block]:
    """Pass over all rows. The gradient of the first C rows stays in `cache_CV`, that of the others is overwritten."""

    def row_pass(block: LogitBlock) -> Block:
        stats = _unit_gradient_(block, head, options)
        return Block(block.span, block.hidden_nD, block.gradient(), stats)

    # unlike a loop, map drops the logits of a block before the next ones are made
    return map(row_pass, logit_blocks(head, cache_CV, precise=options.precise))


def logit_blocks(head: HeadInputs, cache_CV: Tensor, *, precise: bool) -> Iterator[LogitBlock]:
    """Raw logits of all rows, block by block: of the first C rows in `cache_CV`, of the others in one scratch."""
    num_rows, vocabulary = head.hidden_ND.shape[0], head.weight_VD.shape[0]
    num_cached, device = cache_CV.shape[0], head.hidden_ND.device
    cached_rows = rows_per_cached_block(vocabulary, head.hidden_ND.dtype, device, precise=precise)
    for span in _spans(0, num_cached, cached_rows):
        yield _logit_block(head, span, cache_CV[span], precise)
    block_rows = min(num_rows - num_cached, rows_per_scratch(vocabulary, head.row_dtype, device))
    scratch_nV = head.hidden_ND.new_empty(block_rows, vocabulary)
    for span in _spans(num_cached, num_rows, block_rows):
        yield _logit_block(head, span, scratch_nV[: span.stop - span.start], precise)


def raw_logits(
    hidden_nD: Tensor, weight_vD: Tensor, bias_v: Tensor | None, out_nv: Tensor, *, precise: bool = False
) -> Tensor:
    """hidden @ weight.T + bias, [n, v]: in `out_nv` where the row kernels read its dtype, else a new float32 tensor."""
    if _formed_in_place(out_nv.dtype, out_nv.device, precise):
        if bias_v is None:
            return torch.mm(hidden_nD, weight_vD.T, out=out_nv)
        return torch.addmm(bias_v, hidden_nD, weight_vD.T, out=out_nv)
    if precise:
        logits_nv = _float32_product(hidden_nD, weight_vD)
        return logits_nv if bias_v is None else logits_nv.add_(bias_v)
    logits_nv = torch.mm(hidden_nD, weight_vD.T) if bias_v is None else torch.addmm(bias_v, hidden_nD, weight_vD.T)
    return logits_nv.float()


def bind_rows(hidden_ND: Tensor, coefficient_N: Tensor) -> tuple[Tensor, Tensor | None]:
    """(coefficient * hidden) / scale in the dtype of hidden, and the scale.

    Token-mean coefficients of 1/N leave the range of float16; a power of two near the largest one keeps them in it.
    """
    if hidden_ND.dtype != torch.float16:
        return (hidden_ND * coefficient_N[:, None]).to(hidden_ND.dtype), None
    largest = coefficient_N.abs().amax() if coefficient_N.numel() else coefficient_N.new_zeros(())
    scale = torch.where(largest > 0, largest, 1).log2().floor().exp2()
    return (hidden_ND * (coefficient_N / scale)[:, None]).to(hidden_ND.dtype), scale


def add_product_(sum_nd: Tensor, left_nk: Tensor, right_kd: Tensor, scale: Tensor | None = None) -> None:
    """sum += (left @ right) * scale, in the precision of `sum` even where the factors have 16 bits."""
    if scale is None and sum_nd.dtype == left_nk.dtype:
        sum_nd.addmm_(left_nk, right_kd)
        return
    product_nd = torch.mm(left_nk, right_kd)
    sum_nd.add_(product_nd if scale is None else product_nd * scale)


def scatter_add_rows_(out_V: Tensor, index_N: Tensor, rows_N: Tensor) -> None:
    """out[index_n] += rows_n in an order that does not change from run to run: [V] += [N] or [V, D] += [N, D].

    On a CPU `index_add_` is sequential and `index_put_` is not; on CUDA `index_add_` is atomic and `index_put_` sorts.
    Into 16 bits, rows of one index are summed in float32 first: a frequent class would stop growing otherwise.
    """
    if out_V.dtype in (torch.bfloat16, torch.float16):
        index_N, rows_N = _sum_per_index(index_N, rows_N)
    if out_V.is_cuda:
        out_V.index_put_((index_N,), rows_N.to(out_V.dtype), accumulate=True)
    else:
        out_V.index_add_(0, index_N, rows_N.to(out_V.dtype))


def add_onehot_rows_(gradients: Gradients, head: HeadInputs, hidden_ND: Tensor, onehot_N: Tensor) -> None:
    """Add the gradient of sum_i onehot_i * x_i[y_i], x raw logits: one row of W and one row of dW per token.

    Targets in other shards of the vocabulary are left to them.
    """
    columns_N, num_columns = head.columns(), head.weight_VD.shape[0]
    if num_columns == 0:
        return
    inside_N = (columns_N >= 0) & (columns_N < num_columns)
    columns_N, onehot_N = torch.where(inside_N, columns_N, 0), torch.where(inside_N, onehot_N, 0)
    if gradients.hidden_ND is not None:
        gradients.hidden_ND.add_(onehot_N[:, None] * head.weight_VD[columns_N])
    if gradients.weight_VD is not None:
        scatter_add_rows_(gradients.weight_VD, columns_N, onehot_N[:, None] * hidden_ND)
    if gradients.bias_V is not None:
        scatter_add_rows_(gradients.bias_V, columns_N, onehot_N)


def _formed_in_place(dtype: torch.dtype, device: torch.device, precise: bool) -> bool:
    """Whether the row kernels read logits of the dtype of the inputs."""
    if dtype in (torch.float32, torch.float64):
        return True
    keeps_16_bits: bool = row_kernels(device, dtype).KEEPS_16_BITS
    return keeps_16_bits and not precise


def _sum_per_index(index_N: Tensor, rows_N: Tensor) -> tuple[Tensor, Tensor]:
    """The same sum with every index at most once, but for rows of zeros: [N] and float32 [N, ...], without a sync."""
    sorted_N, order_N = index_N.sort(stable=True)
    first_N = torch.ones_like(sorted_N, dtype=torch.bool)
    first_N[1:] = sorted_N[1:] != sorted_N[:-1]
    slot_N = first_N.cumsum(0) - 1
    sums_N = torch.zeros_like(rows_N, dtype=torch.float32)
    scatter_add_rows_(sums_N, slot_N, rows_N[order_N])
    return torch.zeros_like(index_N).scatter_(0, slot_N, sorted_N), sums_N


def _float32_product(hidden_nD: Tensor, weight_vD: Tensor) -> Tensor:
    if hidden_nD.is_cuda:
        return torch.mm(hidden_nD, weight_vD.T, out_dtype=torch.float32)
    return torch.mm(hidden_nD.float(), weight_vD.float().T)


def _spans(first: int, last: int, length: int) -> Iterator[slice]:
    return (slice(start, min(start + length, last)) for start in range(first, last, max(1, length)))


def _logit_block(head: HeadInputs, span: slice, out_nV: Tensor, precise: bool) -> LogitBlock:
    rows = head.rows(span)
    hidden_nD = rows.live_hidden()
    logits_nV = raw_logits(hidden_nD, head.weight_VD, head.bias_V, out_nV, precise=precise)
    return LogitBlock(span, rows, hidden_nD, logits_nV, out_nV)


def _unit_gradient_(block: LogitBlock, head: HeadInputs, options: RowOptions) -> RowStats:
    def logits_of(rows_k: Tensor) -> Tensor:
        out_kV = block.out_nV.new_empty(rows_k.shape[0], block.out_nV.shape[1])
        hidden_kD = block.hidden_nD[rows_k]
        return raw_logits(hidden_kD, head.weight_VD, head.bias_V, out_kV, precise=options.precise)

    stats: RowStats = block.row_kernels().unit_gradient_(
        block.logits_nV,
        block.rows.safe_targets(),
        head.softcap,
        block.rows.inv_temperature_N,
        logits_of,
        entropy=options.entropy,
        correct=options.correct,
    )
    return stats
