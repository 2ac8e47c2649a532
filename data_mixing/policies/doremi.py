"""`doremi`: the proxy's side of DoReMi. Read more of the domains whose loss exceeds that of a reference model.

Xie et al., "DoReMi" (2305.10429); spec/methods.md 1.4. `reference` holds the reference model's loss of each domain.

    x_i = max(loss_i - reference_i, 0)      log p_i += mu x_i      p <- softmax, then (1 - c) p + c / K

    variant original: mu = 1, c = 1e-4 (its repository)      aioli: mu = 0.01, c = 1e-3 (the Aioli scripts)

An arm that was not read keeps its last score, 1e-6 at first. Both variants differ from their code in two points: excess
is clipped per domain (the original clips per token, which sums over domains do not tell), and one update is one round
of `round_steps` steps. The mixture that DoReMi hands to the final
run is the average over all steps: `diagnostics["average"]` of the last decision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from mixwright.data_mixing.errors import PolicyRejected, nearest
from mixwright.data_mixing.mirror_descent import exponentiated
from mixwright.data_mixing.online import OnlineDocument, Proposal, Stretch, Window
from mixwright.data_mixing.window_losses import last_validation_loss, mean_train_loss

_MU = {"original": 1.0, "aioli": 0.01}
_SMOOTHING = {"original": 1e-4, "aioli": 1e-3}
_FIRST_SCORE = 1e-6


class Document(OnlineDocument):
    """`reference`: nats per token by name of the arm. `loss`: which one is compared. `mu`, `smoothing`: see above."""

    kind: Literal["doremi"]
    reference: dict[str, float]
    variant: Literal["original", "aioli"] = "original"
    loss: Literal["training", "validation"] = "training"
    mu: float | None = Field(default=None, ge=0)
    smoothing: float | None = Field(default=None, ge=0, le=1)
    round_steps: int = Field(default=10, ge=1, strict=True)

    def check_arms(self, names: tuple[str, ...]) -> None:
        """Raise PolicyRejected unless there is one reference loss for each arm."""
        for name in self.reference:
            if name not in names:
                raise PolicyRejected(f"reference.{name}: there is no such arm{nearest(name, names)}")
        for name in names:
            if name not in self.reference:
                raise PolicyRejected(f"reference: the loss of arm {name!r} is missing")


def stretches(document: Document, shares: Sequence[float], decision: int, key: int) -> tuple[Stretch, ...]:
    """One stretch, with a validation at its end if that is what is compared."""
    evaluate = document.loss == "validation"
    return (Stretch(num_steps=document.round_steps, shares=tuple(shares), evaluate=evaluate),)


def update(shares: ArrayLike, scores: ArrayLike, mu: float, smoothing: float) -> NDArray[np.float64]:
    """Exponentiated gradient on the clipped excess losses, smoothed towards uniform [K]."""
    grown_K = exponentiated(shares, np.maximum(np.asarray(scores, dtype=np.float64), 0.0), mu)
    return np.asarray((1 - smoothing) * grown_K + smoothing / len(grown_K), dtype=np.float64)


def propose(document: Document, window: Window, state: Mapping[str, Any]) -> Proposal:
    """One update; an arm without a loss keeps its last score."""
    loss_K = mean_train_loss(window) if document.loss == "training" else last_validation_loss(window)
    if not np.isfinite(loss_K).any():
        return Proposal(shares=window.shares, state=dict(state), held=f"no {document.loss} loss is finite")
    excess_K = loss_K - np.array([document.reference[name] for name in window.arms])
    score_K = np.where(np.isfinite(excess_K), excess_K, np.array(state.get("scores", [_FIRST_SCORE] * len(loss_K))))
    mu = _MU[document.variant] if document.mu is None else document.mu
    smoothing = _SMOOTHING[document.variant] if document.smoothing is None else document.smoothing
    share_K = update(window.shares, score_K, mu, smoothing)
    num_steps = sum(interval.num_steps for interval in window.intervals)
    steps = int(state.get("steps", 0)) + num_steps
    before_K = np.array(state.get("average", np.zeros(len(share_K))))
    average_K = before_K + (np.array(window.shares) - before_K) * (num_steps / steps)
    return Proposal(
        shares=tuple(share_K.tolist()),
        state={"scores": score_K.tolist(), "average": average_K.tolist(), "steps": steps},
        diagnostics={"excess": score_K.tolist(), "average": average_K.tolist()},
    )
