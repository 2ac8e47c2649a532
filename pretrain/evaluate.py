"""Per-domain cross-entropy on fixed held-out rows, split over the ranks."""

from __future__ import annotations

import math

import torch

from mixwright.data_mixing.entries import DomainLoss, Genesis
from mixwright.data_mixing.held_out import HeldOut
from mixwright.data_mixing.plan import rank_positions
from mixwright.pretrain.engine import Engine
from mixwright.pretrain.loop import domain_losses
from mixwright.pretrain.objective import DomainSums
from mixwright.pretrain.ranks import Ranks


@torch.no_grad()
def evaluate(
    engine: Engine, held_out: HeldOut, genesis: Genesis, ranks: Ranks, micro_batch_rows: int, when: str
) -> dict[str, DomainLoss]:
    """Loss sums per domain, the same on every rank. Domains without held-out rows are left out.

    Raises NonFiniteLoss for a domain whose loss is NaN or infinite; the message begins with `when`.
    """
    mine = rank_positions(len(held_out.domain_n), ranks.rank, ranks.size)
    sums = DomainSums(len(genesis.domains), ranks.device)
    engine.eval()
    # Every rank makes the same number of forwards, because under ZeRO-3 each forward is a collective.
    most = max(len(rank_positions(len(held_out.domain_n), rank, ranks.size)) for rank in range(ranks.size))
    for offset in range(0, most, micro_batch_rows):
        first = min(mine.start + offset, mine.stop)
        tokens_BS = held_out.tokens_nS[first : min(first + micro_batch_rows, mine.stop)]
        domain_B = held_out.domain_n[first : first + len(tokens_BS)]
        padding = len(tokens_BS) == 0
        batch_BS = torch.from_numpy(held_out.tokens_nS[:1] if padding else tokens_BS).to(ranks.device)
        losses = engine.forward(batch_BS)
        if not padding:
            sums.add(losses.nll_N, torch.from_numpy(domain_B).to(ranks.device))
    engine.train()
    return domain_losses(genesis.domains, ranks.sum(sums.take()).tolist(), when)


def mean_loss(loss: DomainLoss) -> float:
    """Nats per token."""
    return loss.loss_sum / loss.num_tokens


def perplexity(loss: DomainLoss) -> float:
    """exp of the mean cross-entropy per token."""
    return math.exp(min(mean_loss(loss), 700.0))


def standard_error(loss: DomainLoss) -> float:
    """Standard error of the mean per token, tokens taken as independent (they are not: a lower bound)."""
    n = loss.num_tokens
    variance = max(loss.loss_square_sum / n - mean_loss(loss) ** 2, 0.0)
    return math.sqrt(variance / n)
