"""From token losses to the one scalar of a step: `sum_S w_i loss_i + z_loss * mean(lse**2)`, sum_S w = 1.

S are all samples of the optimizer step, over ranks and accumulation (DESIGN.md contract 4; spec/methods.md 19). Where
the sum runs is the weighting's scope:

    (none)           w_i = n_i / N: every token of the global batch counts the same
    micro_step       each micro-batch over all ranks is normalised by itself, as in the paper's code
    step_deferred    g_i from ranges of the steps before; gradients are divided once, before clipping, by sum n g / N
    step_two_phase   one forward more, without gradients, before the step: everything is of the step itself

N tokens of a micro-batch, B rows of T tokens, S samples, G domains. Ranks hold consecutive slices of the global batch,
so what is gathered in the order of ranks is in the order of the batch, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mixwright.data_mixing.loss_weighting import LossWeighting
from mixwright.data_mixing.plan import Plan
from mixwright.data_mixing.weighting import (
    Samples,
    WeightingState,
    exact_weights,
    lagged_factors,
    updated,
)
from mixwright.kernels.distillation import DistillationLosses
from mixwright.kernels.linear_nll import TokenLosses
from mixwright.pretrain.ranks import Ranks
from mixwright.pretrain.weight_metrics import WeightWindow

_STATE_KEYS = ("strategy", "sample", "score", "within", "quantiles", "rho")
"""When one of these changes, ranges of the steps before are of something else."""


@dataclass(frozen=True)
class InForce:
    """A weighting, and for how many steps it has been in force."""

    weighting: LossWeighting
    age: int

    @property
    def inverse_r(self) -> float:
        return self.weighting.inverse_temperature(self.age)


def weighting_at(plan: Plan, step: int) -> tuple[InForce | None, LossWeighting | None]:
    """The weighting in force at `step`, and that of the step before."""
    found, before = plan.weighting(step), plan.weighting(step - 1) if step > 0 else None
    in_force = InForce(found[1], step - found[0]) if found else None
    return in_force, before[1] if before else None


@dataclass(frozen=True)
class Shape:
    """What the objective needs to know of a run. `eos_id` ends documents, which may be samples."""

    rows_per_step: int
    micro_batch_rows: int
    num_domains: int
    z_loss: float
    eos_id: int


class Objective:
    """The scalar of each micro-batch, the divisor of each step's gradients, and what samples weighed.

    In order: `begin`; with `has_first_pass`, `preview` for every micro-batch; a call for every micro-batch, in the same
    order; `end`. All collective.
    """

    def __init__(self, shape: Shape, ranks: Ranks, state: WeightingState | None = None) -> None:
        self.shape, self._ranks = shape, ranks
        self.state = state or WeightingState.none(shape.num_domains)
        self.window = WeightWindow(shape.num_domains)
        self._in_force: InForce | None = None
        self._seen: list[Samples] = []
        self._mass: list[Tensor] = []
        self._row_mass: list[Tensor] = []
        self._known: list[Tensor] = []

    def begin(self, in_force: InForce | None, before: LossWeighting | None = None) -> None:
        """Start a step; `before` is the weighting of the step before."""
        self._in_force = None if in_force is None or in_force.weighting.is_uniform else in_force
        if self._in_force and before and not before.is_uniform and _differs(before, self._in_force.weighting):
            self.state = replace(WeightingState.none(self.shape.num_domains), mean_G=self.state.mean_G)
        self._seen, self._mass, self._known, self._row_mass = [], [], [], []

    @property
    def has_first_pass(self) -> bool:
        """Whether every micro-batch is to be shown to `preview` before the first one is called with."""
        return self._in_force is not None and self._in_force.weighting.scope == "step_two_phase"

    def preview(self, losses: TokenLosses | DistillationLosses, tokens_BS: Tensor, domain_B: Tensor) -> None:
        """Losses of a micro-batch in the first pass."""
        self._seen.append(self._samples(losses.nll_N.detach(), tokens_BS, domain_B)[0])

    def __call__(self, losses: TokenLosses | DistillationLosses, tokens_BS: Tensor, domain_B: Tensor) -> Tensor:
        """This micro-batch's share of the step's scalar, to be averaged over ranks; float32."""
        num_tokens = losses.nll_N.numel() // len(domain_B) * self.shape.rows_per_step
        if self._in_force is None:
            return self._uniform(losses, num_tokens)
        samples, sample_N = self._samples(losses.nll_N.detach(), tokens_BS, domain_B)
        mass_S = self._sample_mass(samples, num_tokens)
        token_mass_N = (mass_S / torch.clamp(samples.tokens_S, min=1.0))[sample_N]
        self._row_mass.append(token_mass_N.reshape(len(domain_B), -1).sum(dim=1))
        total = (token_mass_N * torch.where(token_mass_N > 0, trained(losses), 0.0)).sum()
        if self.shape.z_loss:
            follows = self._in_force.weighting.z_loss == "weights"
            total = (
                total
                + self.shape.z_loss * ((token_mass_N if follows else 1 / num_tokens) * losses.lse_N.square()).sum()
            )
        return total * self._ranks.size

    def end(self) -> float:
        """What the step's gradients are to be divided by before they are clipped; updates the state."""
        if self._in_force is None:
            return 1.0
        weighting = self._in_force.weighting
        # To the CPU at once: one wait for the device in a step, whatever the weighting does.
        samples, mass_S = self._gather(_joined(self._seen), torch.cat(self._mass), torch.device("cpu"))
        self.state = updated(self.state, weighting, samples, self._in_force.inverse_r)
        self.window.add(mass_S, samples)
        return (float(mass_S.sum()) or 1.0) if weighting.scope == "step_deferred" else 1.0

    def row_weights(self, divisor: float) -> Tensor | None:
        """Weight of each of this rank's rows over what uniform weighting gives it, [rows of the rank]; None: all 1.

        `divisor` is what `end` returned.
        """
        return torch.cat(self._row_mass) * (self.shape.rows_per_step / divisor) if self._row_mass else None

    def _uniform(self, losses: TokenLosses | DistillationLosses, num_tokens: int) -> Tensor:
        total = trained(losses).sum()
        if self.shape.z_loss:
            total = total + self.shape.z_loss * losses.lse_N.square().sum()
        return total * (self._ranks.size / num_tokens)

    def _sample_mass(self, samples: Samples, num_tokens: int) -> Tensor:
        """w_i of this micro-batch's samples, or, under `step_deferred`, G w_i; remembered for `end`."""
        assert self._in_force is not None
        weighting, inverse_r = self._in_force.weighting, self._in_force.inverse_r
        if weighting.scope == "step_deferred":
            self._seen.append(samples)
            mass_S = lagged_factors(weighting, samples, self.state, inverse_r) * samples.tokens_S / num_tokens
        elif weighting.scope == "micro_step":
            self._seen.append(samples)
            rows = self.shape.micro_batch_rows * self._ranks.size
            everywhere, mine = self._gather_mine(samples)
            weight_S = exact_weights(weighting, everywhere, self.state, inverse_r)[mine]
            mass_S = weight_S * (rows / self.shape.rows_per_step)
        else:
            mass_S = self._two_phase_weights()[len(self._mass)]
        self._mass.append(mass_S)
        return mass_S

    def _two_phase_weights(self) -> list[Tensor]:
        """Weights of this rank's micro-batches, known once all of them have been seen."""
        assert self._in_force is not None
        if not self._known:
            everywhere, mine = self._gather_mine(_joined(self._seen))
            weight_S = exact_weights(self._in_force.weighting, everywhere, self.state, self._in_force.inverse_r)[mine]
            self._known = list(torch.split(weight_S, [len(samples) for samples in self._seen]))
        return self._known

    def _samples(self, nll_N: Tensor, tokens_BS: Tensor, domain_B: Tensor) -> tuple[Samples, Tensor]:
        by_document = self._in_force is not None and self._in_force.weighting.sample == "document"
        return samples_of(nll_N, tokens_BS, domain_B, self.shape.eos_id if by_document else None)

    def _gather_mine(self, samples: Samples) -> tuple[Samples, slice]:
        """Samples of all ranks, and which of them are this rank's."""
        marks_S = torch.full_like(samples.loss_S, float(self._ranks.rank))
        everywhere, rank_S = self._gather(samples, marks_S)
        first = int((rank_S < self._ranks.rank).sum())
        return everywhere, slice(first, first + len(samples))

    def _gather(self, samples: Samples, more_S: Tensor, device: torch.device | None = None) -> tuple[Samples, Tensor]:
        columns = (samples.loss_S, samples.tokens_S, samples.domain_S, more_S)
        columns_CS = self._ranks.gather(torch.stack([column.double() for column in columns]))
        loss_S, tokens_S, domain_S, more_S = columns_CS.to(device or columns_CS.device)
        return Samples(loss_S.float(), tokens_S.float(), domain_S.long()), more_S.float()


def _differs(before: LossWeighting, after: LossWeighting) -> bool:
    return any(getattr(before, key) != getattr(after, key) for key in _STATE_KEYS)


def _joined(parts: Sequence[Samples]) -> Samples:
    return Samples(
        torch.cat([part.loss_S for part in parts]),
        torch.cat([part.tokens_S for part in parts]),
        torch.cat([part.domain_S for part in parts]),
    )


def trained(losses: TokenLosses | DistillationLosses) -> Tensor:
    """The loss of each token that has a gradient, [N]: cross-entropy, or its mixture with what teachers say."""
    return losses.loss_N if isinstance(losses, DistillationLosses) else losses.nll_N


def samples_of(nll_N: Tensor, tokens_BS: Tensor, domain_B: Tensor, eos_id: int | None) -> tuple[Samples, Tensor]:
    """The samples of a micro-batch, and the sample [N] of each token: rows, or the parts of documents inside rows.

    A document ends with `eos_id`, which belongs to it; None: rows are samples.
    """
    num_rows, device = len(domain_B), nll_N.device
    num_tokens = nll_N.numel() // num_rows
    if eos_id is None:
        loss_B = nll_N.reshape(num_rows, num_tokens).mean(dim=1)
        sample_N = torch.arange(num_rows, device=device).repeat_interleave(num_tokens)
        return Samples(loss_B, torch.full_like(loss_B, num_tokens), domain_B), sample_N
    begins_BT = tokens_BS[:, :-1] == eos_id
    begins_BT[:, 0] = True
    begins_N = begins_BT.reshape(-1)
    sample_N = torch.cumsum(begins_N, dim=0) - 1
    first_S = torch.nonzero(begins_N).squeeze(1)
    end = torch.full((1,), nll_N.numel(), device=device)
    tokens_S = torch.diff(torch.cat([first_S, end]))
    loss_S = torch.segment_reduce(nll_N, "mean", lengths=tokens_S)
    return Samples(loss_S, tokens_S.to(loss_S), domain_B[first_S // num_tokens]), sample_N


class DomainSums:
    """Per-domain sums of plain cross-entropy, float64 on the device; K domains. Adding never waits for the device."""

    COLUMNS = 4  # loss_sum, loss_square_sum, num_tokens, num_rows

    def __init__(self, num_domains: int, device: torch.device) -> None:
        self._sums_KC = torch.zeros(num_domains, self.COLUMNS, dtype=torch.float64, device=device)

    def add(self, nll_N: Tensor, domain_B: Tensor) -> None:
        """Add the losses of B rows that belong to the domains `domain_B` (int64, catalogue order)."""
        nll_BT = nll_N.detach().reshape(domain_B.numel(), -1).double()
        counts_B = torch.full_like(nll_BT[:, 0], nll_BT.shape[1])
        columns_BC = torch.stack([nll_BT.sum(1), nll_BT.square().sum(1), counts_B, torch.ones_like(counts_B)], dim=1)
        # One-hot product instead of index_add_: deterministic on every device.
        one_hot_BK = torch.nn.functional.one_hot(domain_B, self._sums_KC.shape[0]).double()
        self._sums_KC += one_hot_BK.T @ columns_BC

    def take(self) -> Tensor:
        """The sums so far, [K, 4]; starts again from zero."""
        taken_KC, self._sums_KC = self._sums_KC, torch.zeros_like(self._sums_KC)
        return taken_KC
