"""`linear_nll` for a head whose weight is sharded by rows, that is by vocabulary, over a process group.

Each rank runs the row pass on its own columns as if they were the whole vocabulary: G_r = (p_r - onehot) dz/dx with
p_r = softmax over the shard, and U_r = G_r W_r. One all-gather then tells every rank the m_r = max z and
s_r = sum e^(z - m_r) of all shards, and with m = max_r m_r

    lse = m + log sum_r s_r e^(m_r - m)        share_r = s_r e^(m_r - m) / sum_q s_q e^(m_q - m)        p = share_r p_r

The share of a shard is one more number per row, so it is bound as late as the weights of the rows: nothing of size
N x V waits for the other ranks, and there are three local matmuls. With a = dnll + dlse as in `late_bound`

    dx = a share_r G_r + (dlse - a (1 - share_r)) onehot dz/dx        (1 - share_r is the sum of the other shares)

and the second term, one row of W and dW per token, is the business of the shard that holds the target. It has the sign
of G_r there, so a nearly certain target loses no digit. Recomputed rows use the merged lse itself. dH is summed over
the ranks once per backward; dW and db are local. Messages: 4 N numbers per rank (5 with entropy) in the forward, N D
in the backward. Losses are folded in rank order and are bitwise the same on every rank.

N tokens, D hidden size, V vocabulary, v classes of this rank, K statistics, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from mixwright.kernels.blocks import Needs, RowOptions, logit_blocks
from mixwright.kernels.head_inputs import HeadInputs, check_head, inverse_temperature
from mixwright.kernels.late_bound import (
    RowLosses,
    Saved,
    Upstream,
    backward_with_entropy,
    bind_coefficients,
    lse_error,
    mark_dead_rows_,
    row_coefficients,
)
from mixwright.kernels.linear_nll import Engine, TokenLosses, num_cached_rows


def linear_nll_vocab_parallel(
    hidden_ND: Tensor,
    weight_vD: Tensor,
    targets_N: Tensor,
    *,
    vocab_group: dist.ProcessGroup,
    vocab_start: int,
    bias_v: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    cache_bytes: int | None = None,
    engine: Engine = "auto",
    entropy: bool = False,
    correct: bool = False,
    precise: bool = False,
) -> TokenLosses:
    """Losses of every token, the same on every rank of the group. A collective call: all ranks make it in one order.

    Args:
        hidden_ND: the same on every rank.
        weight_vD: this rank's classes `vocab_start ... vocab_start + v - 1`; v differs freely and may be 0.
        targets_N: classes of the whole vocabulary, the same on every rank.
        vocab_group: the ranks that hold the vocabulary; every class has exactly one owner.
        bias_v: of this rank's classes.

    The other arguments, dtypes and errors are those of `linear_nll`; a target that not exactly one rank owns raises
    IndexError on all of them (CPU) or has a NaN loss (GPU). Every rank must compute the same loss from the result: its
    backward adds up the ranks' parts of the hidden states' gradient, and is collective too.
    `linear_nll_reference` on the concatenated weight is the definition. Source: spec/kernels.md section 4, engine R.
    """
    check_head(hidden_ND, weight_vD, bias_v, targets_N, softcap, may_be_empty=True)
    row_dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    inv_temperature_N = inverse_temperature(temperature, hidden_ND, row_dtype)
    needs = any(tensor is not None and tensor.requires_grad for tensor in (hidden_ND, weight_vD, bias_v))
    trains = needs and torch.is_grad_enabled()
    num_cached = num_cached_rows(hidden_ND, weight_vD.shape[0], engine, cache_bytes) if trains else 0
    shard = _Shard(vocab_group, vocab_start, softcap, ignore_index, num_cached, RowOptions(entropy, correct, precise))
    inputs = hidden_ND, weight_vD, bias_v, targets_N, inv_temperature_N
    nll_N, lse_N, entropy_N, correct_N = _VocabParallel.apply(*inputs, shard)  # type: ignore[no-untyped-call]
    return TokenLosses(nll_N, lse_N, entropy_N if entropy else None, correct_N if correct else None)


class _Shard(NamedTuple):
    """What a call is told beside tensors."""

    group: dist.ProcessGroup
    vocab_start: int
    softcap: float | None
    ignore_index: int
    num_cached: int
    options: RowOptions

    def head(self, tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]) -> HeadInputs:
        """The tensors of a call, in its order, with what belongs to them."""
        return HeadInputs(*tensors, self.softcap, self.ignore_index, self.vocab_start)


class _Merged(NamedTuple):
    """Losses [N] over all shards, and this rank's share of the probability mass with the sum of the others'."""

    losses: RowLosses
    lse_error_N: Tensor
    share_N: Tensor
    other_shares_N: Tensor


class _VocabParallel(torch.autograd.Function):
    """Row pass on the shard, one gather, merge; the backward binds coefficients and sums dH over the ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_vD: Tensor,
        bias_v: Tensor | None,
        targets_N: Tensor,
        inv_temperature_N: Tensor | None,
        shard: _Shard,
    ) -> tuple[Tensor, ...]:
        inputs = hidden_ND, weight_vD, bias_v, targets_N, inv_temperature_N
        head = shard.head(inputs)
        cache_Cv = hidden_ND.new_empty(shard.num_cached, weight_vD.shape[0])
        unit_dhidden_CD = hidden_ND.new_empty(shard.num_cached if ctx.needs_input_grad[0] else 0, hidden_ND.shape[1])
        stats_KN, slope_N = _shard_pass(head, cache_Cv, unit_dhidden_CD, shard.options)
        merged = _merge(_gather(stats_KN, shard.group), dist.get_rank(shard.group), head, shard.options)
        _, lse_N, entropy_N, correct_N = merged.losses
        ctx.shard = shard
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(correct_N)
        saved = Saved(lse_N, merged.lse_error_N, slope_N, cache_Cv, unit_dhidden_CD)
        ctx.save_for_backward(*inputs, entropy_N, merged.share_N, merged.other_shares_N, *saved)
        return tuple(merged.losses)

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        shard: _Shard = ctx.shard
        upstream = Upstream(upstreams[0], upstreams[1], upstreams[2] if shard.options.entropy else None)
        nothing = (None,) * 6
        if all(part_N is None for part_N in upstream):
            return nothing
        head, saved = shard.head(ctx.saved_tensors[:5]), Saved(*ctx.saved_tensors[8:])
        entropy_N, share_N, others_N = ctx.saved_tensors[5:8]
        needs, precise = Needs(*ctx.needs_input_grad[:3]), shard.options.precise
        if upstream.dentropy_N is None:
            coefficients = _shard_coefficients(head, saved, share_N, others_N, upstream)
            out = bind_coefficients(head, saved, *coefficients, needs, precise=precise)
        else:
            out = backward_with_entropy(head, saved, entropy_N, upstream, needs, precise=precise)
        dhidden_ND = None if out.hidden_ND is None else _sum_over_ranks(out.hidden_ND, head.row_dtype, shard.group)
        return dhidden_ND, out.weight_VD, out.bias_V, *nothing[3:]


def _shard_pass(
    head: HeadInputs, cache_Cv: Tensor, unit_dhidden_CD: Tensor, options: RowOptions
) -> tuple[Tensor, Tensor]:
    """Statistics of this shard alone, [K, N], and dsoftcap/dx at its targets, [N]; fills the cache and U."""
    num_rows, num_columns = head.hidden_ND.shape[0], head.weight_VD.shape[0]
    stats_KN = head.hidden_ND.new_empty(5 if options.entropy else 4, num_rows, dtype=head.row_dtype)
    slope_N = torch.empty_like(stats_KN[0])
    columns_N = head.columns()
    stats_KN[3] = (columns_N >= 0) & (columns_N < num_columns)
    for block in logit_blocks(head, cache_Cv, precise=options.precise):
        span, columns_n, inv_temperature_n = block.span, columns_N[block.span], block.rows.inv_temperature_N
        stats = block.row_kernels().shard_gradient_(
            block.logits_nV, columns_n, head.softcap, inv_temperature_n, entropy=options.entropy
        )
        stats_KN[0, span], stats_KN[1, span], stats_KN[2, span] = stats[:3]
        slope_N[span] = stats.target_slope_n
        if options.entropy:
            stats_KN[4, span] = stats.entropy_n
        gradient_nv = block.gradient()
        if span.stop <= unit_dhidden_CD.shape[0]:
            torch.mm(gradient_nv, head.weight_VD, out=unit_dhidden_CD[span])
        del block  # its float32 logits, before the next ones are made
    return stats_KN, slope_N


def _gather(stats_KN: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Statistics of all ranks in their order, [R, K, N]."""
    stats_RKN = [torch.empty_like(stats_KN) for _ in range(dist.get_world_size(group))]
    dist.all_gather(stats_RKN, stats_KN, group=group)
    return torch.stack(stats_RKN)


def _merge(stats_RKN: Tensor, rank: int, head: HeadInputs, options: RowOptions) -> _Merged:
    peak_RN, log_sum_RN, target_RN, owned_RN = stats_RKN.unbind(1)[:4]
    peak_N, has_target_N, num_owners_N = peak_RN.amax(0), head.has_target(), _fold(owned_RN)
    if peak_N.device.type == "cpu":
        _refuse_targets_without_one_owner(head, num_owners_N)
    target_N = torch.where(num_owners_N == 1, _fold(target_RN), torch.nan)
    target_N = torch.where(has_target_N, target_N, peak_N)

    log_mass_RN = (peak_RN - peak_N) + log_sum_RN
    mass_RN = log_mass_RN.exp()
    total_N = _fold(mass_RN)
    log_total_N = total_N.log()
    nll_N, lse_N = log_total_N - (target_N - peak_N), peak_N + log_total_N
    lse_error_N = lse_error(nll_N, lse_N, target_N)
    share_RN = torch.where(total_N.isfinite() & (total_N > 0), mass_RN / total_N, 0)
    entropy_N = correct_N = nll_N.new_empty(0)
    if options.entropy:  # of the whole: sum of share (entropy of the shard - log share)
        parts_RN = share_RN * (stats_RKN[:, 4] - (log_mass_RN - log_total_N))
        entropy_N = _fold(torch.where(share_RN > 0, parts_RN, 0))
    correct_N = target_N >= peak_N if options.correct else correct_N.bool()
    losses = RowLosses(nll_N, lse_N, entropy_N, correct_N)
    mark_dead_rows_(losses, head)
    others = [share_N for other, share_N in enumerate(share_RN) if other != rank]
    return _Merged(losses, lse_error_N, share_RN[rank], _fold([torch.zeros_like(total_N), *others]))


def _fold(parts: Tensor | Sequence[Tensor]) -> Tensor:
    """Sum in rank order, which is the same on every rank."""
    return reduce(torch.add, parts)


def _refuse_targets_without_one_owner(head: HeadInputs, num_owners_N: Tensor) -> None:
    wrong_N = (num_owners_N != 1) & head.has_target()
    if bool(wrong_N.any()):
        row = int(wrong_N.nonzero()[0])
        raise IndexError(
            f"target {int(head.targets_N[row])} at row {row} is a class of {int(num_owners_N[row])} ranks' shards, "
            f"expected exactly one (here {head.vocab_start}..{head.vocab_start + head.weight_VD.shape[0] - 1}), "
            f"and is not ignore_index={head.ignore_index}"
        )


def _shard_coefficients(
    head: HeadInputs, saved: Saved, share_N: Tensor, other_shares_N: Tensor, upstream: Upstream
) -> tuple[Tensor, Tensor | None]:
    """Row coefficients of the cached G_r, of the recomputed G, and of the onehot of this shard's targets."""
    coefficient_N, onehot_N = row_coefficients(head, saved, upstream.dnll_N, upstream.dlse_N)
    num_cached = saved.gradient_CV.shape[0]
    if num_cached:
        owed_N = coefficient_N * other_shares_N * saved.target_slope_N
        owed_N[num_cached:] = 0
        onehot_N = -owed_N if onehot_N is None else onehot_N - owed_N
    coefficient_N[:num_cached].mul_(share_N[:num_cached])
    coefficient_N[num_cached:].mul_((-saved.lse_error_N[num_cached:]).exp())
    return coefficient_N, onehot_N


def _sum_over_ranks(dhidden_ND: Tensor, row_dtype: torch.dtype, group: dist.ProcessGroup) -> Tensor:
    """In float32 (float64), so that the parts of 16-bit hidden states are rounded once more and not R times."""
    total_ND = dhidden_ND.to(row_dtype)
    dist.all_reduce(total_ND, group=group)
    return total_ND.to(dhidden_ND.dtype)
