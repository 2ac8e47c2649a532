"""`ado`: read what is being learned fastest, after a loss law that is fitted to each arm's own training losses.

After Jiang et al., "Adaptive data optimization" (2410.11820); *ado-like*: the idea and the fit are theirs, the schedule
of updates and the simplifications are ours. For each arm, with n the tokens read of it so far,

    loss(n) = E + A n^-alpha          fitted by least squares, E >= 0, A >= 0, alpha on a grid
    speed   = -d loss / d ln n = alpha A n^-alpha
    wanted  ~ prior * history^credit * speed / n          history: average share of the arm so far
    p      <- (1 - rate) p + rate * wanted, each at least `smallest`

No validation is needed and nothing is perturbed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mixwright.data_mixing.guard import with_floor
from mixwright.data_mixing.online import OnlineDocument, Proposal, Stretch, Window
from mixwright.data_mixing.window_losses import mean_train_loss

Floats = NDArray[np.float64]

_ALPHAS = np.geomspace(0.02, 1.0, 25)
_MOST_POINTS = 64
"""A curve that grows longer keeps every second of its older points."""


class Document(OnlineDocument):
    """`warm_up`: rounds before the first change. `credit`, `rate`, `smallest`: see above."""

    kind: Literal["ado"]
    round_steps: int = Field(default=50, ge=1, strict=True)
    warm_up: int = Field(default=5, ge=4, strict=True)
    credit: float = Field(default=0.5, ge=0, le=1)
    rate: float = Field(default=0.2, gt=0, le=1)
    smallest: float = Field(default=0.01, ge=0, lt=1)


def stretches(document: Document, shares: Sequence[float], decision: int, key: int) -> tuple[Stretch, ...]:
    """One stretch; nothing is validated."""
    return (Stretch(num_steps=document.round_steps, shares=tuple(shares)),)


def fit_law(tokens_n: Floats, loss_n: Floats) -> tuple[float, float, float]:
    """(E, A, alpha) of loss = E + A tokens^-alpha by least squares; A = 0 when the loss does not fall."""
    best = (np.inf, float(loss_n.mean()), 0.0, float(_ALPHAS[0]))
    scaled_n = tokens_n / tokens_n[-1]
    for alpha in _ALPHAS:
        power_n = scaled_n**-alpha
        spread = power_n - power_n.mean()
        slope = float(spread @ loss_n / max(spread @ spread, 1e-300))
        floor = float(loss_n.mean() - slope * power_n.mean())
        if floor < 0:
            floor, slope = 0.0, float(power_n @ loss_n / (power_n @ power_n))
        error = float(np.square(loss_n - floor - slope * power_n).sum())
        if slope > 0 and error < best[0]:
            best = (error, floor, slope * float(tokens_n[-1]) ** alpha, float(alpha))
    return best[1:]


def propose(document: Document, window: Window, state: Mapping[str, Any]) -> Proposal:
    """Adds the round to each arm's curve, fits, and moves a part of the way to the wanted mixture."""
    num_arms = len(window.arms)
    loss_K, share_K = mean_train_loss(window), np.array(window.shares)
    read_K = np.array([interval.train_tokens for interval in window.intervals], dtype=np.float64).sum(axis=0)
    before_K = np.array(state.get("tokens", np.zeros(num_arms)))
    curves = [list(curve) for curve in state.get("curves", [[] for _ in range(num_arms)])]
    for arm in np.flatnonzero(np.isfinite(loss_K) & (read_K > 0)):
        curves[arm] = _thinned([*curves[arm], [float(before_K[arm] + read_K[arm] / 2), float(loss_K[arm])]])
    tokens_K = before_K + read_K
    rounds = int(state.get("rounds", 0)) + 1
    prior = list(state.get("prior", window.shares))
    next_state = {"curves": curves, "tokens": tokens_K.tolist(), "rounds": rounds, "prior": prior}
    if rounds < document.warm_up or min(map(len, curves)) < 4:
        reason = f"{min(rounds, *map(len, curves))} of {document.warm_up} rounds to fit a law to"
        return Proposal(shares=window.shares, state=next_state, held=reason)
    laws = [fit_law(*np.array(curve).T) for curve in curves]
    gain_K = np.array([a * alpha * n ** (-alpha - 1) for (_, a, alpha), n in zip(laws, tokens_K, strict=True)])
    wanted_K = np.array(prior) * (tokens_K / tokens_K.sum()) ** document.credit * gain_K
    if not wanted_K.sum() > 0:
        return Proposal(shares=window.shares, state=next_state, held="no training loss falls")
    moved_K = (1 - document.rate) * share_K + document.rate * wanted_K / wanted_K.sum()
    smallest = min(document.smallest, 1 / num_arms)
    return Proposal(
        shares=tuple(with_floor(moved_K, smallest).tolist()),
        state=next_state,
        diagnostics={"laws": [list(law) for law in laws], "gain": gain_K.tolist()},
    )


def _thinned(curve: list[list[float]]) -> list[list[float]]:
    if len(curve) <= _MOST_POINTS:
        return curve
    half = _MOST_POINTS // 2
    return [*curve[:half:2], *curve[half:]]
