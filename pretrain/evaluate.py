"""Per-domain cross-entropy on fixed held-out rows, split over the ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from mixwright.data_mixing.entries import DomainLoss, Genesis
from mixwright.data_mixing.plan import rank_positions
from mixwright.data_mixing.store import TokenStore
from mixwright.pretrain.engine import Engine
from mixwright.pretrain.loop import domain_loss
from mixwright.pretrain.objective import DomainSums
from mixwright.pretrain.ranks import Ranks


@dataclass(frozen=True)
class HeldOut:
    """At most `rows_per_domain` rows of every domain's `split`; tokens [n, T+1], domains [n].

    Always the same rows, spread evenly over the split: its first rows may all be of one long document.
    """

    split: str
    tokens_nS: np.ndarray
    domain_n: np.ndarray

    @classmethod
    def read(cls, store: TokenStore, genesis: Genesis, split: str, rows_per_domain: int) -> HeldOut:
        tokens, domains = [], []
        for index, domain in enumerate(genesis.domains):
            num_rows = store.num_rows(domain.name, split)
            count = min(rows_per_domain, num_rows)
            row_n = np.arange(count) * num_rows // max(count, 1)
            rows = store.gather(np.full(count, store.index(domain.name)), row_n, split)
            tokens.append(np.asarray(rows, dtype=np.int64))
            domains.append(np.full(count, index, dtype=np.int64))
        return cls(split, np.concatenate(tokens), np.concatenate(domains))


@torch.no_grad()
def evaluate(
    engine: Engine, held_out: HeldOut, genesis: Genesis, ranks: Ranks, micro_batch_rows: int
) -> dict[str, DomainLoss]:
    """Loss sums per domain, the same on every rank. Domains without held-out rows are left out."""
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
    sums_KC = ranks.sum(sums.take()).tolist()
    return {d.name: domain_loss(row) for d, row in zip(genesis.domains, sums_KC, strict=True) if row[3]}


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
