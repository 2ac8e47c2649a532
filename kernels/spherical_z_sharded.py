"""The spherical Z-loss head with its weight sharded by rows over ranks that hold different tokens (ZeRO-3, FSDP, TP).

The weight is never gathered and its gradient never reduce-scattered. With the notation of `spherical_z`, e bytes per
element, R ranks, and v rows of the weight on this one:

    once per optimizer step     mean row and Q, then dmean and dQ: all-reduced, 4 (D + D^2) bytes each time
    per micro-batch             R (R + 1) small integers; the N target rows come from their owners and the gradients
                                g_t h of these rows go back, e N D bytes each way (less what is this rank's own)
    local                       dW of the owned rows, from (dmean, dQ) and the returned rows

A softmax head under ZeRO-3 moves 3 e V D bytes per micro-batch instead. N tokens, D hidden size, V classes.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist

from mixwright.kernels.blocks import scatter_add_rows_
from mixwright.kernels.spherical_z import (
    ClassMoments,
    SphericalRows,
    centred_scatter,
    check_inputs,
    dense_gradient,
    invalidate_after_optimizer_steps,
)

FRESH, STALE, FAILED = 0, 1, 2


class RowShardedSphericalZLoss(nn.Module):
    """`SphericalZLoss` on a weight [V, D] whose rows lie on the ranks of a group, in rank order.

    Construction, forward, backward and `finish_gradient()` are collective: every rank makes the same calls in the same
    order, with any number of tokens, also none. The gradient is the sum over all ranks' tokens: weigh rows by the
    global count, and keep the weight out of DDP or ZeRO, which would average or shard it again.

    Moments are formed again when any rank's weight changed its version counter or storage, any rank's optimizer
    stepped, or any rank called `invalidate()`.
    Call `finish_gradient()` once per optimizer step, after the last micro-batch, before clipping and stepping.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        *,
        shard_group: dist.ProcessGroup,
        sharpness: float = 1.0,
        location: float = 0.0,
        ignore_index: int = -100,
    ) -> None:
        """`weight`: this rank's rows, [v, D]; v may differ between ranks and be 0."""
        super().__init__()
        if not sharpness > 0:
            raise ValueError(f"sharpness is {sharpness}, expected a positive number")
        self.weight, self.shard_group = weight, shard_group
        self.sharpness, self.location, self.ignore_index = sharpness, location, ignore_index
        sizes = _gather_integers([weight.shape[0]], weight.device, shard_group)
        self.first_classes = tuple(accumulate((size for (size,) in sizes), initial=0))[:-1]
        self.num_classes = sum(size for (size,) in sizes)
        self._moments: ClassMoments | None = None
        self._moments_of: tuple[int, int] | None = None
        invalidate_after_optimizer_steps(self)

    def forward(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        """Loss of each of this rank's tokens, [N], as in `SphericalZLoss`; targets are classes of the whole vocabulary.

        Waits for the device (sizes of messages, targets). Where one rank's input is bad, all ranks raise.
        """
        failure = self._failure_of(hidden_ND, targets_N)
        has_target_N = targets_N != self.ignore_index
        wanted_n = targets_N[has_target_N] if failure is None else targets_N.new_empty(0)
        moments, exchange, order_n = self._agree(failure, wanted_n)
        first_class = self.first_classes[dist.get_rank(self.shard_group)]
        fetched_nD: Tensor = _FetchRows.apply(self.weight, wanted_n[order_n], first_class, exchange)  # type: ignore[no-untyped-call]
        table_ND = fetched_nD.new_zeros(hidden_ND.shape).index_put((has_target_N.nonzero()[:, 0][order_n],), fetched_nD)
        row_N = torch.where(has_target_N, torch.arange(len(targets_N), device=targets_N.device), -1)
        options = (self.sharpness, self.location, -1, self.num_classes)
        loss_N: Tensor = SphericalRows.apply(hidden_ND, table_ND, row_N, *moments, options)  # type: ignore[no-untyped-call]
        return loss_N

    def invalidate(self) -> None:
        """Take the moments for outdated. One rank is enough; then all form them."""
        self._moments_of = None

    def has_pending_gradient(self) -> bool:
        """Whether micro-batches left a gradient in the moments that `finish_gradient()` has not added yet."""
        return self._moments is not None and self._moments.mean_D.grad is not None

    def finish_gradient(self) -> None:
        """Add to this rank's `weight.grad` what the micro-batches of all ranks left in the moments. Collective."""
        moments = self._moments
        if moments is None or not self.weight.requires_grad:
            return
        upstream = ClassMoments(*(torch.zeros_like(part) if part.grad is None else part.grad for part in moments))
        with torch.no_grad():
            for part in upstream:
                dist.all_reduce(part, group=self.shard_group)
            dense_vD = dense_gradient(self.weight, moments, upstream, self.num_classes)
            self.weight.grad = dense_vD if self.weight.grad is None else self.weight.grad.add_(dense_vD)
        moments.mean_D.grad = moments.scatter_DD.grad = None

    def _failure_of(self, hidden_ND: Tensor, targets_N: Tensor) -> Exception | None:
        """What is wrong with this rank's input: to be raised once the others know of it."""
        try:
            check_inputs(hidden_ND, self.weight, targets_N)
        except (ValueError, TypeError) as error:
            return error
        outside_N = ((targets_N < 0) | (targets_N >= self.num_classes)) & (targets_N != self.ignore_index)
        if bool(outside_N.any()):
            row = int(outside_N.nonzero()[0])
            return IndexError(f"target {int(targets_N[row])} at row {row} is outside 0..{self.num_classes - 1}")
        return None

    def _agree(self, failure: Exception | None, wanted_n: Tensor) -> tuple[ClassMoments, _Exchange, Tensor]:
        """Tell all ranks what this one needs: moments of the same weights everywhere, sizes of messages, and order."""
        first_R = torch.tensor(self.first_classes, device=wanted_n.device)
        owner_n = torch.searchsorted(first_R, wanted_n, right=True) - 1  # the last to begin there: not an empty shard
        counts = torch.bincount(owner_n, minlength=len(first_R)).tolist()
        stale = self._moments_of != (self.weight._version, self.weight.data_ptr())
        status = FAILED if failure is not None else STALE if stale else FRESH
        said = _gather_integers([*counts, status], wanted_n.device, self.shard_group)
        if failure is not None:
            raise failure
        worst = max(rank_said[-1] for rank_said in said)
        if worst == FAILED:
            ranks = [rank for rank, rank_said in enumerate(said) if rank_said[-1] == FAILED]
            raise RuntimeError(f"SphericalZLoss: input was refused on ranks {ranks} of the shard group")
        if worst == STALE or self._moments is None:
            self._form_moments()
        assert self._moments is not None
        rank = dist.get_rank(self.shard_group)
        exchange = _Exchange(self.shard_group, counts, [rank_said[rank] for rank_said in said])
        return self._moments, exchange, owner_n.argsort(stable=True)

    def _form_moments(self) -> None:
        if self.has_pending_gradient():
            raise RuntimeError("SphericalZLoss: the weight changed before finish_gradient() added its dense gradient")
        weight_vD = self.weight.detach()
        row_dtype = torch.float64 if weight_vD.dtype == torch.float64 else torch.float32
        mean_D = weight_vD.sum(0, dtype=row_dtype)
        dist.all_reduce(mean_D, group=self.shard_group)
        mean_D /= self.num_classes
        scatter_DD = centred_scatter(weight_vD, mean_D)
        dist.all_reduce(scatter_DD, group=self.shard_group)
        trained = self.weight.requires_grad
        self._moments = ClassMoments(mean_D.requires_grad_(trained), scatter_DD.requires_grad_(trained))
        self._moments_of = self.weight._version, self.weight.data_ptr()


class _Exchange(NamedTuple):
    """How many rows this rank asks of each, and each asks of it."""

    group: dist.ProcessGroup
    num_asked: list[int]
    num_served: list[int]

    def fetch(self, served_mD: Tensor) -> Tensor:
        """Rows for all ranks, in their order, against the rows that this rank asked for."""
        asked_nD = served_mD.new_empty(sum(self.num_asked), *served_mD.shape[1:])
        dist.all_to_all_single(asked_nD, served_mD.contiguous(), self.num_asked, self.num_served, group=self.group)
        return asked_nD

    def reversed(self) -> _Exchange:
        """The way back."""
        return self._replace(num_asked=self.num_served, num_served=self.num_asked)


class _FetchRows(torch.autograd.Function):
    """Rows of classes, sorted by owner, [n, D]; backward sends their gradients to the owners, who add them up."""

    @staticmethod
    def forward(ctx: Any, weight_vD: Tensor, classes_n: Tensor, first_class: int, exchange: _Exchange) -> Tensor:
        served_m = exchange.reversed().fetch(classes_n) - first_class
        ctx.exchange = exchange
        ctx.save_for_backward(weight_vD, served_m)
        return exchange.fetch(weight_vD.detach()[served_m])

    @staticmethod
    def backward(ctx: Any, drows_nD: Tensor) -> tuple[Tensor, None, None, None]:
        weight_vD, served_m = ctx.saved_tensors
        dweight_vD = torch.zeros_like(weight_vD)
        scatter_add_rows_(dweight_vD, served_m, ctx.exchange.reversed().fetch(drows_nD))
        return dweight_vD, None, None, None


def _gather_integers(numbers: list[int], device: torch.device, group: dist.ProcessGroup) -> list[list[int]]:
    """The numbers of every rank, in rank order."""
    own = torch.tensor(numbers, device=device)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    return [numbers_of_rank.tolist() for numbers_of_rank in everyone]
