"""`skill_it`: read what helps the domains whose loss is still high, after a graph of what helps what.

Chen et al., "Skill-it!" (2307.14430) as in the Aioli repository (spec/methods.md 1.4). graph[i][j] is the part of
domain j's loss that a run on domain i alone takes away.

    at the start          p_i ~ exp(eta sum_j graph_ij)
    after each round      p_i ~ exp(eta sum_j graph_ij Loss_j)      Loss_j: sum of the last `window` validation losses

Every update starts from ones. Rows and columns are found by name: the released code relies on alphabetical order. The
sum is not a mean, as in the code; there it covers validations of checkpoints, here one at the end of each round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mixwright.data_mixing.errors import PolicyRejected, nearest
from mixwright.data_mixing.mirror_descent import exponentiated
from mixwright.data_mixing.online import OnlineDocument, Proposal, Stretch, Window
from mixwright.data_mixing.window_losses import last_validation_loss, target_weights

Floats = NDArray[np.float64]

_EXACTLY_ALL, _INSTEAD = 1.0, 0.5
"""An entry of 1 beside the diagonal stands for a run that was not made; the released code reads it as 0.5."""


class Document(OnlineDocument):
    """`graph`: {trained arm: {validated arm: relative fall}} (default: identity). `window`: validations in a sum."""

    kind: Literal["skill_it"]
    graph: dict[str, dict[str, float]] | None = None
    eta: float = Field(default=0.2, ge=0)
    window: int = Field(default=3, ge=1, strict=True)
    round_steps: int = Field(default=500, ge=1, strict=True)

    def check_arms(self, names: tuple[str, ...]) -> None:
        """Raise PolicyRejected unless the graph has exactly the run's arms."""
        if self.graph is None:
            return
        _check_names("graph", self.graph, names)
        for name, row in self.graph.items():
            _check_names(f"graph.{name}", row, names)

    def start(self, names: tuple[str, ...]) -> Sequence[float]:
        """softmax(eta G 1)."""
        return mixture(self.matrix(names), np.ones(len(names)), self.eta)

    def matrix(self, names: tuple[str, ...]) -> Floats:
        """The graph [K, K] in the order of `names`."""
        if self.graph is None:
            return np.eye(len(names))
        graph_KK = np.array([[self.graph[row][column] for column in names] for row in names])
        unmade_KK = (graph_KK == _EXACTLY_ALL) & ~np.eye(len(names), dtype=bool)
        return np.where(unmade_KK, _INSTEAD, graph_KK)


def _check_names(where: str, given: Iterable[str], names: tuple[str, ...]) -> None:
    found = list(given)
    for name in found:
        if name not in names:
            raise PolicyRejected(f"{where}.{name}: there is no such arm{nearest(name, names)}")
    for name in names:
        if name not in found:
            raise PolicyRejected(f"{where}: arm {name!r} is missing")


def mixture(graph_KK: Floats, loss_sum_K: Floats, eta: float) -> tuple[float, ...]:
    """softmax(eta G Loss) [K]."""
    return tuple(exponentiated(np.ones(len(loss_sum_K)), graph_KK @ loss_sum_K, eta).tolist())


def stretches(document: Document, shares: Sequence[float], decision: int, key: int) -> tuple[Stretch, ...]:
    """One stretch with a validation at its end."""
    return (Stretch(num_steps=document.round_steps, shares=tuple(shares), evaluate=True),)


def propose(document: Document, window: Window, state: Mapping[str, Any]) -> Proposal:
    """The update with the newest validation; an arm without one counts with nothing."""
    loss_K = last_validation_loss(window)
    if not np.isfinite(loss_K).any():
        return Proposal(shares=window.shares, state=dict(state), held="no validation loss is finite")
    weighted_K = np.where(np.isfinite(loss_K), loss_K, 0.0) * target_weights(window)
    losses = [*state.get("losses", []), weighted_K.tolist()][-document.window :]
    loss_sum_K = np.array(losses).sum(axis=0)
    return Proposal(
        shares=mixture(document.matrix(window.arms), loss_sum_K, document.eta),
        state={"losses": losses},
        diagnostics={"loss_sum": loss_sum_K.tolist()},
    )
