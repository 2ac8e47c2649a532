"""From token losses to the one scalar of a step: `sum_S w_i loss_i + z_loss * mean(lse**2)`, sum_S w = 1.

S are all rows of the optimizer step, over ranks and accumulation (DESIGN.md contract 4; spec/methods.md 19.1).
N tokens of a micro-batch, B rows of T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixwright.kernels.linear_nll import TokenLosses


@dataclass(frozen=True)
class Objective:
    """Uniform row weights: every token of the global batch counts the same.

    `num_ranks` undoes the average over ranks that DeepSpeed takes of the gradients.
    """

    rows_per_step: int
    num_ranks: int
    z_loss: float

    def __call__(self, losses: TokenLosses, num_rows: int) -> Tensor:
        """This micro-batch's share of the step's scalar; float32."""
        num_tokens = losses.nll_N.numel() // num_rows * self.rows_per_step
        total = losses.nll_N.sum()
        if self.z_loss:
            total = total + self.z_loss * losses.lse_N.square().sum()
        return total * (self.num_ranks / num_tokens)


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
