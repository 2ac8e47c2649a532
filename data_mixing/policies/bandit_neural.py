"""`bandit_neural`: a contextual bandit whose network predicts from an arm's situation how badly reading it will do.

After Deb et al., "Contextual bandits with online neural regression" (2312.07145); how it is put to mixing is ours. A
round is `pulls` pulls. A pull reads mostly one arm for `pull_steps` steps. Arms come up in proportion to the mixture,
so that a round as a whole reads the mixture. The loss of a pull is 1/2 when the target loss fell as in the mean pull of
the round, more when it fell less. Probabilities of the next round, from predicted losses y with the least at b:

    squared   p_a = 1 / (K + gamma (y_a - y_b))                  inverse gap weighting (NeuSquareCB)
    kl        p_a = y_b / (K y_b + gamma (y_a - y_b))            the same relative to the least loss (NeuFastCB)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mixwright.data_mixing.evidence import Observations, observe
from mixwright.data_mixing.neural import Ensemble, Loss
from mixwright.data_mixing.online import OnlineDocument, Proposal, Stretch, Window
from mixwright.data_mixing.permutation import mix_key, permute
from mixwright.data_mixing.window_losses import last_validation_loss

Floats = NDArray[np.float64]

_NUM_FIGURES = 3
_SPREAD_KEPT = 0.8


class Document(OnlineDocument):
    """`epsilon`: part of the mixture in a pull. `gamma`: how much is made of a difference; 0 is uniform.

    members, hidden, perturbation, learning_rate, passes: the ensemble and how often a round is learned from.
    """

    kind: Literal["bandit_neural"]
    loss: Loss = "kl"
    pulls: int = Field(default=8, ge=2, le=256, strict=True)
    pull_steps: int = Field(default=10, ge=1, strict=True)
    epsilon: float = Field(default=0.5, ge=0, lt=1)
    gamma: float = Field(default=20.0, ge=0)
    members: int = Field(default=3, ge=1, le=16, strict=True)
    hidden: int = Field(default=8, ge=1, le=64, strict=True)
    perturbation: float = Field(default=0.1, ge=0)
    learning_rate: float = Field(default=0.1, gt=0)
    passes: int = Field(default=4, ge=1, le=100, strict=True)
    seed: int = Field(default=0, ge=0, strict=True)


def stretches(document: Document, shares: Sequence[float], decision: int, key: int) -> tuple[Stretch, ...]:
    """The pulls of a round: systematic sampling of the arms, in a keyed order."""
    share_K = np.array(shares)
    offset = mix_key(key, 0) / 2**64
    points = (np.arange(document.pulls) + offset) / document.pulls
    arms = np.minimum(np.searchsorted(np.cumsum(share_K), points, side="right"), len(share_K) - 1)
    order = permute(np.arange(document.pulls), document.pulls, mix_key(key, 1))
    mixed = [document.epsilon * share_K + (1 - document.epsilon) * np.eye(len(share_K))[arm] for arm in arms[order]]
    return tuple(
        Stretch(num_steps=document.pull_steps, shares=tuple((mix_K / mix_K.sum()).tolist()), evaluate=True)
        for mix_K in mixed
    )


def probabilities(loss_K: Floats, gamma: float, loss: Loss) -> Floats:
    """Inverse gap weighting of predicted losses [K] in (0, 1)."""
    num_arms, best = len(loss_K), int(loss_K.argmin())
    gap_K = loss_K - loss_K[best]
    share_K = 1 / (num_arms + gamma * gap_K) if loss == "squared" else 1 / (num_arms + gamma * gap_K / loss_K[best])
    share_K[best] = 0.0
    share_K[best] = 1 - share_K.sum()
    return np.asarray(share_K, dtype=np.float64)


def propose(document: Document, window: Window, state: Mapping[str, Any]) -> Proposal:
    """Learns from the round's pulls in order, then predicts every arm."""
    seen, num_arms = observe(window), len(window.arms)
    if len(seen) < 2:
        return Proposal(shares=window.shares, state=dict(state), held=f"{len(seen)} pulls have finite losses")
    size = _NUM_FIGURES + num_arms
    net = Ensemble.start(document.members, size, document.hidden, document.perturbation, document.seed)
    if "parameters" in state:
        net = net.loaded(state)
    losses_N, spread = _pull_losses(seen, state.get("spread"))
    pulled_N = (seen.share_NK - document.epsilon * np.array(window.shares)).argmax(axis=1)
    input_KD = _situations(window)
    for _ in range(document.passes):
        for arm, loss in zip(pulled_N, losses_N, strict=True):
            net = net.learn(input_KD[arm], float(loss), document.loss, document.learning_rate)
    predicted_K = net.predict(input_KD)
    share_K = probabilities(predicted_K, document.gamma, document.loss)
    return Proposal(
        shares=tuple(share_K.tolist()),
        state={**net.state(), "spread": spread},
        diagnostics={"predicted": predicted_K.tolist(), "pulled": pulled_N.tolist(), "loss": losses_N.tolist()},
    )


def _pull_losses(seen: Observations, known_spread: float | None) -> tuple[Floats, float]:
    """Losses of the pulls [N] in 0 to 1, and the spread of falls that they are measured by."""
    rate_N = seen.drop_N / seen.mass_N
    spread = float(rate_N.std())
    if known_spread is not None:
        spread = _SPREAD_KEPT * known_spread + (1 - _SPREAD_KEPT) * spread
    if spread == 0:
        return np.full(len(seen), 0.5), 0.0
    return np.clip(0.5 - 0.25 * (rate_N - rate_N.mean()) / spread, 0, 1), spread


def _situations(window: Window) -> Floats:
    """What the network sees of each arm [K, D]: share, relative validation loss, progress of the run, which arm."""
    num_arms = len(window.arms)
    loss_K = last_validation_loss(window)
    relative_K = np.where(np.isfinite(loss_K), loss_K / np.nanmean(loss_K) - 1, 0.0)
    progress_K = np.full(num_arms, window.step / window.num_steps)
    figures_KF = np.stack([np.array(window.shares), relative_K, progress_K], axis=1)
    return np.concatenate([figures_KF, np.eye(num_arms)], axis=1)
