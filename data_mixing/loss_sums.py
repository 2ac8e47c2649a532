"""Per-domain sums of losses on the host, for trainers that are not ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.domain import Domain
from mixwright.data_mixing.entries import DomainLoss
from mixwright.data_mixing.errors import DataError

_COLUMNS = 4  # loss_sum, loss_square_sum, num_tokens, num_rows


@dataclass
class LossSums:
    """Sums over the rows of each domain of a run; `sums_G4` holds nats, squares of nats, tokens and rows."""

    names: tuple[str, ...]
    sums_G4: NDArray[np.float64]

    @classmethod
    def zeros(cls, domains: Sequence[Domain]) -> LossSums:
        return cls(tuple(domain.name for domain in domains), np.zeros((len(domains), _COLUMNS)))

    def add(self, domain_B: NDArray[np.int64], nll: NDArray[np.float64], num_tokens: int) -> None:
        """Add B rows of `num_tokens` tokens: nats per token [B, T], or their mean per row [B]. Raises DataError."""
        if nll.shape not in ((len(domain_B),), (len(domain_B), num_tokens)):
            raise DataError(
                f"losses have shape {list(nll.shape)}, expected [{len(domain_B)}, {num_tokens}] "
                f"(nats of each token) or [{len(domain_B)}] (mean of each row)"
            )
        nll_BT = nll if nll.ndim == 2 else np.broadcast_to(nll[:, None], (len(nll), num_tokens))
        ones_B = np.ones(len(domain_B))
        columns = (nll_BT.sum(1), np.square(nll_BT).sum(1), num_tokens * ones_B, ones_B)
        np.add.at(self.sums_G4, domain_B, np.stack(columns, axis=1))

    def take(self, sum_over_ranks: Callable[[NDArray[Any]], NDArray[Any]]) -> dict[str, DomainLoss]:
        """Sums over all ranks of the domains that have rows; starts again from zero. Raises DataError for NaN."""
        total_G4 = sum_over_ranks(self.sums_G4)
        self.sums_G4 = np.zeros_like(self.sums_G4)
        rows = zip(self.names, total_G4.tolist(), strict=True)
        return {name: _domain_loss(name, columns) for name, columns in rows if columns[3]}


def _domain_loss(name: str, columns: list[float]) -> DomainLoss:
    loss_sum, loss_square_sum, num_tokens, num_rows = columns
    if not math.isfinite(loss_sum) or not math.isfinite(loss_square_sum):
        raise DataError(f"the observed loss of domain {name!r} is {loss_sum}; training should stop")
    return DomainLoss(
        loss_sum=loss_sum, loss_square_sum=loss_square_sum, num_tokens=round(num_tokens), num_rows=round(num_rows)
    )
