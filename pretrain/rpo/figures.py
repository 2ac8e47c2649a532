"""What is reported of pairs: sums and means over the pairs of all ranks since the last report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixwright.pretrain.ranks import Ranks
from mixwright.pretrain.rpo.groups import CHOSEN, REJECTED
from mixwright.pretrain.rpo.objective import PairFigures

COLUMNS = 10
"""Rows of the table below: preference, sft, and chosen and rejected of reward, logp, length and reference."""


class PairWindow:
    """Figures of pairs, kept on the device until they are asked for."""

    def __init__(self) -> None:
        self._tables: list[Tensor] = []

    def add(self, figures: PairFigures) -> None:
        both = (figures.reward_P2, figures.logp_P2, figures.length_P2, figures.reference_P2)
        columns = [figures.preference_P, figures.sft_P, *(column for pair in both for column in pair.unbind(dim=1))]
        self._tables.append(torch.stack([column.float() for column in columns]))

    def take(self, ranks: Ranks) -> dict[str, Any]:
        """Figures of all pairs of all ranks, which are then forgotten. Collective."""
        own_KP = torch.cat(self._tables, dim=1) if self._tables else torch.zeros(COLUMNS, 0, device=ranks.device)
        self._tables = []
        return summarise(ranks.gather(own_KP).double().cpu())


def summarise(table_KP: Tensor) -> dict[str, Any]:
    """Means over pairs, but for `logp_per_token` (over tokens) and the AUC."""
    preference_P, sft_P = table_KP[0], table_KP[1]
    reward_2P, logp_2P, length_2P, reference_2P = table_KP[2:].reshape(4, 2, -1)
    margin_P = reward_2P[CHOSEN] - reward_2P[REJECTED]
    names = {"chosen": CHOSEN, "rejected": REJECTED}
    return {
        "num_pairs": table_KP.shape[1],
        "loss": {"preference": _mean(preference_P), "sft": _mean(sft_P)},
        "rewards": {
            **{name: _mean(reward_2P[place]) for name, place in names.items()},
            "margin": _mean(margin_P),
            "accuracy": _mean((margin_P > 0).double()),
            "auc": auc(reward_2P[CHOSEN], reward_2P[REJECTED]),
        },
        "logp": {name: _mean(logp_2P[place]) for name, place in names.items()},
        "logp_per_token": {name: float(logp_2P[place].sum() / length_2P[place].sum()) for name, place in names.items()},
        "logp_over_reference": {name: _mean(logp_2P[place] - reference_2P[place]) for name, place in names.items()},
    }


def auc(chosen_P: Tensor, rejected_P: Tensor) -> float:
    """Share of all (chosen, rejected) comparisons that the chosen one wins, ties half: the Mann-Whitney statistic."""
    ordered_P = rejected_P.sort().values
    below_P = torch.searchsorted(ordered_P, chosen_P, side="left")
    through_P = torch.searchsorted(ordered_P, chosen_P, side="right")
    return float((below_P + through_P).double().mean() / (2 * len(ordered_P)))


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; 0 for a single one."""
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.std() / len(values) ** 0.5) if len(values) > 1 else 0.0


def _mean(values_P: Tensor) -> float:
    return float(values_P.mean())
