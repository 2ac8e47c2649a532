"""`odm`: a bandit on training losses. Read more of what is still hard; costs nothing but the losses themselves.

Albalak et al., "Efficient online data mixing" (2312.02406) as released (alon-albalak/online-data-mixing, branch pythia;
spec/methods.md 1.4): Exp3 with importance-weighted rewards and an exploration floor that shrinks with time,

    R_i += (loss_i / 10) / pi_i          eps_t = min(1/K, sqrt(ln K / (K t)))
    pi_i = (1 - K eps_t) softmax_i(eps_{t-1} R) + eps_t

for every arm whose loss was seen. The released code updates at every step with the arms of that step; here one update
is one round of `round_steps` steps, and a mixture is read in those proportions instead of one drawn arm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from mixwright.data_mixing.mirror_descent import exponentiated
from mixwright.data_mixing.online import OnlineDocument, Proposal, Stretch, Window
from mixwright.data_mixing.window_losses import mean_train_loss


class Document(OnlineDocument):
    """`round_steps`: steps of one update. `reward_scale`: a loss counts divided by it. `smoothing`: see `reward`.

    `reward: importance` is Exp3's sum; `moving_average` is the alternative of the same code: R_i is the average of
    loss_i / scale with weight `smoothing` on the old value.
    """

    kind: Literal["odm"]
    round_steps: int = Field(default=25, ge=1, strict=True)
    reward_scale: float = Field(default=10.0, gt=0)
    reward: Literal["importance", "moving_average"] = "importance"
    smoothing: float = Field(default=0.9, ge=0, lt=1)


def stretches(document: Document, shares: Sequence[float], decision: int, key: int) -> tuple[Stretch, ...]:
    """One stretch; nothing is validated."""
    return (Stretch(num_steps=document.round_steps, shares=tuple(shares)),)


def exploration(num_arms: int, update: int) -> float:
    """eps_t: the smallest probability of an arm in update t, 1/K at t = 0."""
    if update == 0 or num_arms == 1:
        return 1 / num_arms
    return min(1 / num_arms, math.sqrt(math.log(num_arms) / (num_arms * update)))


def probabilities(rewards: ArrayLike, update: int) -> NDArray[np.float64]:
    """pi [K] of update t from rewards R [K]."""
    reward_K = np.asarray(rewards, dtype=np.float64)
    num_arms = len(reward_K)
    softmax_K = exponentiated(np.ones(num_arms), reward_K, exploration(num_arms, update - 1))
    epsilon = exploration(num_arms, update)
    return np.asarray((1 - num_arms * epsilon) * softmax_K + epsilon, dtype=np.float64)


def propose(document: Document, window: Window, state: Mapping[str, Any]) -> Proposal:
    """One update with the mean training losses of the round; an arm that was not read keeps its reward."""
    loss_K = mean_train_loss(window)
    reward_K = np.array(state.get("rewards", np.zeros(len(loss_K))))
    seen_K = np.isfinite(loss_K)
    if not seen_K.any():
        return Proposal(shares=window.shares, state=dict(state), held="no training loss is finite")
    gain_K = np.where(seen_K, loss_K, 0.0) / document.reward_scale
    if document.reward == "importance":
        reward_K = reward_K + gain_K / np.maximum(window.shares, 1e-9)
    else:
        averaged_K = document.smoothing * reward_K + (1 - document.smoothing) * gain_K
        reward_K = np.where(seen_K, averaged_K, reward_K)
    update = int(state.get("update", 0)) + 1
    share_K = probabilities(reward_K, update)
    return Proposal(
        shares=tuple(share_K.tolist()),
        state={"rewards": reward_K.tolist(), "update": update},
        diagnostics={"loss": [float(loss) if np.isfinite(loss) else None for loss in loss_K]},
    )
