"""Engines A and R: gradients whose row coefficients are known only in the backward.

    A cached     forward makes G = (p - onehot) * slope block by block, keeps it, and U = G W            3 matmuls
                 backward, with a_i = the upstream coefficient, known only now:
                     dH = a * U                    dW = G^T (a * H)
    R recompute  forward as A, but G is thrown away; backward forms it again per slice of the vocabulary  4 matmuls
                     dH = a * sum_j G_j W_j        dW_j = G_j^T (a * H): each row of dW written by one matmul

Upstream gradients: with dn = dL/dnll, dl = dL/dlse the logits' gradient is (a p - dn onehot) dz/dx, a = dn + dl,
that is a G / T + dl onehot dz/dx: the second term touches one row of W and of dW per token. With dE = dL/dentropy it
gains -dE p (log p + entropy) dz/dx, no multiple of G: all rows of that backward are formed again, as in R.

Extra bytes beyond inputs and gradients, e bytes per element: A  e N V + 2 e N D;  R  e N v + 2 e N D, v columns of a
slice. A coefficient multiplies rows of N x D, never of N x V, and no sum depends on the order of threads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixwright.kernels import blocks
from mixwright.kernels.blocks import (
    Gradients,
    Needs,
    RowOptions,
    add_onehot_rows_,
    add_product_,
    bind_rows,
    gradient_blocks,
    raw_logits,
)
from mixwright.kernels.head_inputs import HeadInputs
from mixwright.kernels.rows_torch import EntropyTerms, RowStats

CPU_SLICE_BYTES, GPU_SLICE_BYTES = 4 << 20, 512 << 20


class RowLosses(NamedTuple):
    """Statistics [N]: 0 where the target is ignored, NaN where hidden is not finite; the last two may be empty."""

    nll_N: Tensor
    lse_N: Tensor
    entropy_N: Tensor
    correct_N: Tensor


class Upstream(NamedTuple):
    """Upstream gradients [N]; None where none arrived."""

    dnll_N: Tensor | None
    dlse_N: Tensor | None
    dentropy_N: Tensor | None


class Saved(NamedTuple):
    """What the backward needs beside the inputs; the first C rows are the cached ones.

    `lse_error_N` is defined in `rows_torch.sliced_gradient_`.
    """

    lse_N: Tensor
    lse_error_N: Tensor
    target_slope_N: Tensor
    gradient_CV: Tensor
    unit_dhidden_CD: Tensor


def forward_late_bound(
    head: HeadInputs, num_cached: int, needs_dhidden: bool, options: RowOptions
) -> tuple[RowLosses, Saved]:
    """Forward of engine A for the first `num_cached` rows and of engine R for the others."""
    cache_CV = head.hidden_ND.new_empty(num_cached, head.weight_VD.shape[0])
    unit_dhidden_CD = head.hidden_ND.new_empty(num_cached if needs_dhidden else 0, head.hidden_ND.shape[1])
    losses = _empty_losses(head, options)
    lse_error_N, slope_N = torch.empty_like(losses.nll_N), torch.empty_like(losses.nll_N)
    for block in gradient_blocks(head, cache_CV, options):
        span, stats = block.span, block.stats
        _store(losses, span, stats)
        slope_N[span] = stats.target_slope_n
        lse_error_N[span] = lse_error(stats.nll_n, stats.lse_n, stats.target_logit_n)
        if needs_dhidden and span.stop <= num_cached:
            torch.mm(block.gradient_nV, head.weight_VD, out=unit_dhidden_CD[span])
    mark_dead_rows_(losses, head)
    return losses, Saved(losses.lse_N, lse_error_N, slope_N, cache_CV, unit_dhidden_CD)


def backward_late_bound(
    head: HeadInputs, saved: Saved, dnll_N: Tensor | None, dlse_N: Tensor | None, needs: Needs, *, precise: bool
) -> Gradients:
    """Gradients for any upstream gradients of nll and lse. Nothing in `saved` changes: it may be called again."""
    num_cached = saved.gradient_CV.shape[0]
    coefficient_N, onehot_N = row_coefficients(head, saved, dnll_N, dlse_N)
    coefficient_N[num_cached:].mul_((-saved.lse_error_N[num_cached:]).exp())
    return bind_coefficients(head, saved, coefficient_N, onehot_N, needs, precise=precise)


def backward_with_entropy(
    head: HeadInputs, saved: Saved, entropy_N: Tensor, upstream: Upstream, needs: Needs, *, precise: bool
) -> Gradients:
    """Gradients where one reaches the entropy too: a G - dE p (log p + entropy) = c (alpha G - epsilon p (...)).

    The coefficient c = |a| + |dE| stays outside the matrix, so that 16 bits hold what is inside.
    """
    dnll_N = torch.zeros_like(saved.lse_N) if upstream.dnll_N is None else upstream.dnll_N
    unit_N, onehot_N = row_coefficients(head, saved, dnll_N, upstream.dlse_N)
    entropy_part_N, _ = row_coefficients(head, saved, upstream.dentropy_N, None)
    coefficient_N = unit_N.abs() + entropy_part_N.abs()
    terms = EntropyTerms(
        torch.where(coefficient_N > 0, unit_N / coefficient_N, 0),
        torch.where(coefficient_N > 0, entropy_part_N / coefficient_N, 0),
        torch.where(entropy_N.isfinite(), entropy_N, 0),
    )
    saved = saved._replace(gradient_CV=saved.gradient_CV[:0], unit_dhidden_CD=saved.unit_dhidden_CD[:0])
    return bind_coefficients(head, saved, coefficient_N, onehot_N, needs, precise=precise, entropy_terms=terms)


def bind_coefficients(
    head: HeadInputs,
    saved: Saved,
    coefficient_N: Tensor,
    onehot_N: Tensor | None,
    needs: Needs,
    *,
    precise: bool,
    entropy_terms: EntropyTerms | None = None,
) -> Gradients:
    """Gradients of sum_i coefficient_i * G_i + onehot_i * x_i[y_i]; G was cached or is formed again."""
    num_cached = saved.gradient_CV.shape[0]
    # lse is NaN in dead rows, and not finite where logits overflowed: 0 * NaN shall meet no sum
    lost_N = ~(saved.lse_N.isfinite() & head.has_target())
    hidden_ND = head.hidden_ND.masked_fill(lost_N[:, None], 0)
    bound_ND, scale = bind_rows(hidden_ND, coefficient_N)
    out = needs.empty(head)
    cached, others = slice(0, num_cached), slice(num_cached, None)
    _cached_rows_into(out, saved, coefficient_N[cached], bound_ND[cached])
    if num_cached < hidden_ND.shape[0]:
        rows = head.rows(others)._replace(hidden_ND=hidden_ND[others])
        _recomputed_rows_into(out, rows, saved, coefficient_N[others], bound_ND[others], precise, entropy_terms)
    if out.weight_VD is not None and scale is not None:
        out.weight_VD.mul_(scale)
    if onehot_N is not None:
        add_onehot_rows_(out, head, hidden_ND, onehot_N)
    return out


def row_coefficients(
    head: HeadInputs, saved: Saved, dnll_N: Tensor | None, dlse_N: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Row coefficients of G and of onehot (None without dlse). Ignored rows: 0; dead rows: 0 stays, all else is NaN."""
    parts = [part_N for part_N in (dnll_N, dlse_N) if part_N is not None]
    has_target_N, finite_N = head.has_target(), saved.lse_N.isfinite()

    def settle(upstream_N: Tensor) -> Tensor:
        if head.inv_temperature_N is not None:
            upstream_N = upstream_N * head.inv_temperature_N
        upstream_N = torch.where(has_target_N, upstream_N, 0)
        return torch.where(finite_N | (upstream_N == 0), upstream_N, torch.nan)

    coefficient_N = settle(parts[0] if len(parts) == 1 else parts[0] + parts[1])
    return coefficient_N, None if dlse_N is None else settle(dlse_N) * saved.target_slope_N


def lse_error(nll_n: Tensor, lse_n: Tensor, target_logit_n: Tensor) -> Tensor:
    """nll - (lse - t), what rounding took from lse; 0 in rows that are not finite, which have no such thing."""
    error_n = nll_n - (lse_n - target_logit_n)
    return torch.where(error_n.isfinite(), error_n, 0)


def _cached_rows_into(out: Gradients, saved: Saved, coefficient_C: Tensor, bound_CD: Tensor) -> None:
    num_cached = coefficient_C.shape[0]
    if out.hidden_ND is not None:
        torch.mul(saved.unit_dhidden_CD, coefficient_C[:, None], out=out.hidden_ND[:num_cached])
    if out.weight_VD is not None:
        torch.mm(saved.gradient_CV.T, bound_CD, out=out.weight_VD)
    if out.bias_V is not None:
        torch.mv(saved.gradient_CV.T, coefficient_C.to(out.bias_V.dtype), out=out.bias_V)


def _recomputed_rows_into(
    out: Gradients,
    rows: HeadInputs,
    saved: Saved,
    coefficient_n: Tensor,
    bound_nD: Tensor,
    precise: bool,
    entropy_terms: EntropyTerms | None,
) -> None:
    """Rows that were not cached: G slice by slice of the vocabulary, added to what the cached rows left in dW."""
    hidden_nD, weight_VD, bias_V = rows.hidden_ND, rows.weight_VD, rows.bias_V
    vocabulary, columns_n, num_rows = weight_VD.shape[0], rows.columns(), hidden_nD.shape[0]
    lse_n, lse_error_n = saved.lse_N[-num_rows:], saved.lse_error_N[-num_rows:]
    lse_n = torch.where(lse_n.isfinite(), lse_n, torch.inf)
    width = columns_per_slice(num_rows, rows.row_dtype, hidden_nD.device)
    row_kernels = blocks.row_kernels(hidden_nD.device, hidden_nD.dtype)
    scratch = hidden_nD.new_empty(num_rows * min(width, vocabulary))
    sum_nD = _sum_buffer(out, rows)
    for first in range(0, vocabulary, width):
        columns = slice(first, min(first + width, vocabulary))
        out_nv = scratch[: num_rows * (columns.stop - first)].view(num_rows, -1)
        bias_v = None if bias_V is None else bias_V[columns]
        logits_nv = raw_logits(hidden_nD, weight_VD[columns], bias_v, out_nv, precise=precise)
        row_kernels.sliced_gradient_(
            logits_nv, columns_n - first, rows.softcap, rows.inv_temperature_N, lse_n, lse_error_n, entropy_terms
        )
        gradient_nv = logits_nv.to(hidden_nD.dtype)
        if out.hidden_ND is not None:
            add_product_(sum_nD, gradient_nv, weight_VD[columns])
        if out.weight_VD is not None:
            out.weight_VD[columns].addmm_(gradient_nv.T, bound_nD)
        if out.bias_V is not None:
            out.bias_V[columns].addmv_(gradient_nv.T, coefficient_n.to(out.bias_V.dtype))
    if out.hidden_ND is not None:
        torch.mul(sum_nD, coefficient_n[:, None], out=out.hidden_ND[-num_rows:])


def _sum_buffer(out: Gradients, rows: HeadInputs) -> Tensor:
    """Zeros to sum dH over slices in: where dH will lie, or a float32 buffer for 16-bit inputs."""
    if out.hidden_ND is None:
        return rows.hidden_ND.new_empty(0)
    if out.hidden_ND.dtype == rows.row_dtype:
        return out.hidden_ND[-rows.hidden_ND.shape[0] :].zero_()
    return torch.zeros_like(rows.hidden_ND, dtype=rows.row_dtype)


def columns_per_slice(num_rows: int, row_dtype: torch.dtype, device: torch.device) -> int:
    """Columns of logits that fit the scratch budget of engine R, a multiple of 64."""
    budget = CPU_SLICE_BYTES if device.type == "cpu" else GPU_SLICE_BYTES
    return max(256, budget // (max(1, num_rows) * row_dtype.itemsize) // 64 * 64)


def _empty_losses(head: HeadInputs, options: RowOptions) -> RowLosses:
    num_rows = head.hidden_ND.shape[0]
    nll_N = head.hidden_ND.new_empty(num_rows, dtype=head.row_dtype)
    return RowLosses(
        nll_N,
        torch.empty_like(nll_N),
        nll_N.new_empty(num_rows if options.entropy else 0),
        nll_N.new_empty(num_rows if options.correct else 0, dtype=torch.bool),
    )


def _store(losses: RowLosses, span: slice, stats: RowStats) -> None:
    losses.nll_N[span], losses.lse_N[span] = stats.nll_n, stats.lse_n
    if stats.entropy_n is not None:
        losses.entropy_N[span] = stats.entropy_n
    if stats.correct_n is not None:
        losses.correct_N[span] = stats.correct_n


def mark_dead_rows_(losses: RowLosses, head: HeadInputs) -> None:
    """Dead rows went through the matmuls as zeros: give them 0 where the target is ignored, else NaN."""
    live_N, has_target_N = head.live_rows(), head.has_target()
    for losses_N in (losses.nll_N, losses.lse_N, losses.entropy_N):
        if losses_N.numel():
            losses_N.masked_fill_(~live_N, torch.nan).masked_fill_(~has_target_N, 0)
    if losses.correct_N.numel():
        losses.correct_N.logical_and_(live_N)
