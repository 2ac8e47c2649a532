"""From log-probabilities of completions to one scalar: a loss of the margin, plus an SFT term.

    reward r = beta (log p - log p_reference)       margin m = r(chosen) - r(rejected) - target
    L = preference_weight * mean_S phi(m) + weight * NLL(base completions)              (RPO, arXiv 2405.16436, eq. 4.8)

P pairs of a micro-batch, C completions of each, S pairs of the optimizer step over all ranks and micro-batches. Every
mean is over the step, so the gradient does not depend on how the step is cut (spec/methods.md 3, posttraining.md 2.3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mixwright.pretrain.rpo.config import ObjectiveConfig, Reduction
from mixwright.pretrain.rpo.groups import BASE, CHOSEN, REJECTED, CompletionLogProbs

ENSLOSS_SLOPE = 1e-6
"""What EnsLoss adds to every derivative, so that none is 0 at the margin 0 (calibration)."""


@dataclass(frozen=True)
class StepScope:
    """What is known of an optimizer step before its first forward, alike on all ranks.

    `num_base_tokens` are of the completions that the SFT term learns from; `seed` is the step's own.
    """

    num_pairs: int
    num_base_tokens: int
    seed: int = 0


@dataclass(frozen=True)
class WholeStep:
    """Rewards of all pairs of the step in its order, float32 [S, 2], and where this micro-batch's pairs stand, [P]."""

    reward_S2: Tensor
    place_P: Tensor


@dataclass(frozen=True)
class SftTerm:
    """An SFT term whose meaning is settled: absolute weight, reduction and the place of its completion in a group."""

    reduction: Reduction
    weight: float
    place: int


@dataclass(frozen=True)
class PairFigures:
    """What there is to know of each pair, detached, float32 [P]; the losses without their weights."""

    preference_P: Tensor
    sft_P: Tensor
    reward_P2: Tensor
    logp_P2: Tensor
    length_P2: Tensor
    reference_P2: Tensor

    def first(self, num_pairs: int) -> PairFigures:
        """Those of the first pairs alone."""
        return PairFigures(*(getattr(self, field.name)[:num_pairs] for field in fields(self)))


class Objective:
    """The objective of a run as a function of a micro-batch's log-probabilities."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config
        self.sft = sft_term(config)
        self._phi = margin_loss(config)

    @property
    def num_completions(self) -> int:
        """Completions in a group: a third where the SFT term learns from samples of the reference."""
        return 3 if self.sft is not None and self.sft.place == BASE else 2

    @property
    def sees_whole_step(self) -> bool:
        """Whether the loss of a pair depends on the other pairs of its step."""
        return self.config.loss in ("auc", "ensloss")

    def rewards(self, found: CompletionLogProbs, reference_P2: Tensor) -> Tensor:
        """Implicit rewards of chosen and rejected, [P, 2]."""
        ratio_P2 = found.logp_PC[:, :2] - (0 if self.config.reference_free else reference_P2)
        if self.config.length_normalised:
            ratio_P2 = ratio_P2 / found.length_PC[:, :2]
        return self.config.beta * ratio_P2

    def __call__(
        self, found: CompletionLogProbs, reference_P2: Tensor, scope: StepScope, whole: WholeStep | None = None
    ) -> tuple[Tensor, PairFigures]:
        """This micro-batch's part of the step's objective (parts add up), and figures of its pairs.

        `reference_P2` are the reference's sums of log-probabilities of chosen and rejected. `whole` is needed where
        `sees_whole_step`. Raises ValueError without it.
        """
        reward_P2 = self.rewards(found, reference_P2)
        preference_P = self._preference(reward_P2, scope, whole)
        loss = self.config.preference_weight * preference_P.sum() / scope.num_pairs
        sft_P = _sft_parts(self.sft, found, scope) if self.sft is not None else torch.zeros_like(preference_P)
        if self.sft is not None and self.sft.weight:  # a weight of 0 is DPO, bit by bit
            loss = loss + self.sft.weight * sft_P.sum() / scope.num_pairs
        return loss, _figures(preference_P, sft_P, reward_P2, found, reference_P2)

    @torch.no_grad()
    def figures(self, found: CompletionLogProbs, reference_P2: Tensor) -> PairFigures:
        """Figures of pairs that are not trained on, each by itself; `sft_P` is of their chosen completions."""
        reward_P2 = self.rewards(found, reference_P2)
        preference_P = self._phi(reward_P2[:, CHOSEN] - reward_P2[:, REJECTED] - self.config.target_margin)
        is_sum = self.sft is not None and self.sft.reduction == "seq_sum"
        sft_P = -found.logp_PC[:, CHOSEN] / (1 if is_sum else found.length_PC[:, CHOSEN])
        return _figures(preference_P, sft_P, reward_P2, found, reference_P2)

    def _preference(self, reward_P2: Tensor, scope: StepScope, whole: WholeStep | None) -> Tensor:
        target = self.config.target_margin
        if not self.sees_whole_step:
            return self._phi(reward_P2[:, CHOSEN] - reward_P2[:, REJECTED] - target)
        if whole is None:
            raise ValueError(f"loss {self.config.loss!r} needs the rewards of all pairs of the step")
        if self.config.loss == "auc":
            return auc_parts(reward_P2, whole, target)
        margin_S = whole.reward_S2[:, CHOSEN] - whole.reward_S2[:, REJECTED] - target
        slope_S = ensloss_slopes(margin_S, _normal(len(margin_S), scope.seed, margin_S))
        return slope_S[whole.place_P] * (reward_P2[:, CHOSEN] - reward_P2[:, REJECTED] - target)


def margin_loss(config: ObjectiveConfig) -> Callable[[Tensor], Tensor]:
    """phi: losses of margins, elementwise; for `auc` and `ensloss` the logistic loss, which they generalise."""
    beta, flipped = config.beta, config.label_smoothing

    def logistic(margin_P: Tensor) -> Tensor:
        if not flipped:
            return F.softplus(-margin_P)
        return (1 - flipped) * F.softplus(-margin_P) + flipped * F.softplus(margin_P)

    def robust(margin_P: Tensor) -> Tensor:
        """Unbiased when a share `flipped` of the labels is wrong (Chowdhury et al. 2024)."""
        return ((1 - flipped) * F.softplus(-margin_P) - flipped * F.softplus(margin_P)) / (1 - 2 * flipped)

    def hinge(margin_P: Tensor) -> Tensor:
        return F.relu(1 - margin_P)

    def ipo(margin_P: Tensor) -> Tensor:
        """(log-ratio - 1 / (2 beta))**2 (Azar et al. 2023)."""
        return (margin_P / beta - 1 / (2 * beta)) ** 2

    named = {"hinge": hinge, "robust": robust, "ipo": ipo}
    return named.get(config.loss, logistic)


def auc_parts(reward_P2: Tensor, whole: WholeStep, target: float) -> Tensor:
    """Parts [P] of S * mean_ij softplus(-(r(chosen_i) - r(rejected_j) - target)): a surrogate of the Mann-Whitney U.

    A comparison is in the parts of two pairs, and each of them holds one of its two rewards live: so it counts half in
    value and whole in gradient.
    """
    chosen_S, rejected_S = whole.reward_S2.detach().unbind(dim=1)
    num_pairs = len(chosen_S)
    by_chosen_PS = F.softplus(-(reward_P2[:, CHOSEN, None] - rejected_S[None, :] - target))
    by_rejected_PS = F.softplus(-(chosen_S[None, :] - reward_P2[:, REJECTED, None] - target))
    whole_P = (by_chosen_PS + by_rejected_PS).sum(dim=1) / num_pairs
    return whole_P - whole_P.detach() / 2


def ensloss_slopes(margin_S: Tensor, normal_S: Tensor) -> Tensor:
    """Derivatives [S] of a random calibrated convex loss at the margins (EnsLoss, spec/methods.md 9; lambda = 0)."""
    slope_S = (-normal_S.exp()).clamp(min=-1).sort().values
    slope_S = torch.empty_like(slope_S).scatter_(0, margin_S.argsort(), slope_S)
    return torch.where(margin_S > 1, slope_S / margin_S, slope_S) - ENSLOSS_SLOPE


def sft_term(config: ObjectiveConfig) -> SftTerm | None:
    """The SFT term with an absolute weight; None without one."""
    sft = config.sft
    if sft is None:
        return None
    place = CHOSEN if sft.base == "chosen" else BASE
    reduction: Reduction
    if sft.regulariser is not None:
        assert sft.eta is not None
        is_cumulative = sft.regulariser == "cumulative"
        reduction = "seq_sum" if is_cumulative else "seq_mean"
        return SftTerm(reduction, sft.eta * config.beta if is_cumulative else sft.eta, place)
    assert sft.reduction is not None
    weight = sft.weight if sft.weight is not None else (sft.eta or 0.0) * config.beta
    return SftTerm(sft.reduction, weight, place)


Convention = Literal["eta, cumulative", "weight, seq_sum", "weight, seq_mean (eta, average)", "weight, token_mean"]


def equivalents(config: ObjectiveConfig, mean_length: float) -> dict[Convention, float]:
    """The SFT weight as each convention would write it, for base completions of `mean_length` tokens.

    Equal for completions of that length; for others the conventions weigh long and short ones differently.
    """
    term = sft_term(config)
    if term is None:
        return {}
    per_token = term.weight * (mean_length if term.reduction == "seq_sum" else 1.0)
    return {
        "eta, cumulative": per_token / mean_length / config.beta,
        "weight, seq_sum": per_token / mean_length,
        "weight, seq_mean (eta, average)": per_token,
        "weight, token_mean": per_token,
    }


def _figures(
    preference_P: Tensor, sft_P: Tensor, reward_P2: Tensor, found: CompletionLogProbs, reference_P2: Tensor
) -> PairFigures:
    return PairFigures(
        preference_P.detach(),
        sft_P.detach(),
        reward_P2.detach(),
        found.logp_PC[:, :2].detach(),
        found.length_PC[:, :2],
        reference_P2,
    )


def _sft_parts(term: SftTerm, found: CompletionLogProbs, scope: StepScope) -> Tensor:
    """Negative log-likelihoods [P], scaled so that their sum over the step, divided by its pairs, is the reduction."""
    nll_P, length_P = -found.logp_PC[:, term.place], found.length_PC[:, term.place]
    if term.reduction == "seq_sum":
        return nll_P
    if term.reduction == "seq_mean":
        return nll_P / length_P
    return nll_P * (scope.num_pairs / scope.num_base_tokens)


def _normal(size: int, seed: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator).to(like)
