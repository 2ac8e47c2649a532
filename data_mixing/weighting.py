"""Instance weights from losses: the functions, without ranks, models or journals.

    score_i = rho l_i + (1 - rho) mean(domain)  [- running mean(domain)]       l_i: mean cross-entropy of sample i
    h_i     = 2 (score_i - lo) / (hi - lo) - 1                                  within -1..1; all 0 when hi = lo
    g_i     = exp((f(h_i) - 1) / r)                                             0 for a loss that is not finite
    w_i     = n_i g_i / sum_S n g                                               n_i: tokens of the sample

Sow et al. (arXiv 2502.06733); spec/methods.md 2 (strategies, the shifted form of h, numerics), 16 (AdaWAC), 17 (bags).
S samples, G domains; everything is detached and float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mixwright.data_mixing.loss_weighting import LossWeighting

_NO_RANGE = 1e-6
"""A range below this part of the scores is rounding, of which h would make a preference."""

_LARGEST_TILT = 5.0
"""exp(5) is how much more a sample above the lagged range may count, under `tilted`."""

_SMALLEST_R, _LARGEST_R = 1e-3, 1e3

_ARRAYS = ("low_G", "high_G", "low_trend_G", "high_trend_G", "mean_G", "level_G")

STRATEGIES: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": torch.ones_like,
    "linupper": lambda h_S: torch.clamp(h_S + 1, max=1.0),
    "quadratic": lambda h_S: 1 - h_S.square(),
    "extremes": torch.abs,
    "upper": lambda h_S: (h_S + 1) / 2,
}
"""f by name, on h within -1..1, with values within 0..1. `tilted` has no range: its f is the score itself."""


@dataclass(frozen=True, eq=False)
class Samples:
    """What is known of samples: mean loss in nats per token [S] float32, tokens [S] float32, domain [S] int64."""

    loss_S: Tensor
    tokens_S: Tensor
    domain_S: Tensor

    @property
    def valid_S(self) -> Tensor:
        """Samples with a token and a finite loss: the others have weight 0 and say nothing."""
        return torch.isfinite(self.loss_S) & (self.tokens_S > 0)

    @classmethod
    def none(cls, device: torch.device) -> Samples:
        """No sample yet."""
        return cls(
            torch.zeros(0, device=device),
            torch.zeros(0, device=device),
            torch.zeros(0, dtype=torch.int64, device=device),
        )

    def __len__(self) -> int:
        return len(self.loss_S)


@dataclass(frozen=True, eq=False)
class Scale:
    """What a score is compared with: ends of the range [G] (all alike unless `within: domain`), and 1 / r."""

    low_G: Tensor
    high_G: Tensor
    inverse_r: float


@dataclass(frozen=True, eq=False)
class WeightingState:
    """What a weighting remembers from step to step; NaN where nothing has been seen. float64 on the CPU, [G].

    low, high: ends of the range, smoothed, with what they change by in a step (Holt's linear smoothing: while losses
    fall quickly a plain average would lie above all of them, and samples below the range are all alike). mean: running
    mean loss. level: lagged mean of g. inverse_r: found by `target_ess`.
    """

    low_G: Tensor
    high_G: Tensor
    low_trend_G: Tensor
    high_trend_G: Tensor
    mean_G: Tensor
    level_G: Tensor
    inverse_r: float

    @classmethod
    def none(cls, num_domains: int) -> WeightingState:
        """Nothing has been seen."""
        unknown_G = torch.full((num_domains,), torch.nan, dtype=torch.float64)
        return cls(**dict.fromkeys(_ARRAYS, unknown_G), inverse_r=0.0)

    @property
    def range_G(self) -> tuple[Tensor, Tensor]:
        """The range to expect of the next step."""
        return self.low_G + self.low_trend_G, self.high_G + self.high_trend_G

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; exact."""
        return {**{name: getattr(self, name).tolist() for name in _ARRAYS}, "inverse_r": self.inverse_r}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> WeightingState:
        """The inverse of `to_json`."""
        arrays = {name: torch.tensor(state[name], dtype=torch.float64) for name in _ARRAYS}
        return cls(**arrays, inverse_r=float(state["inverse_r"]))


def per_domain(value_S: Tensor, samples: Samples, num_domains: int) -> Tensor:
    """Sums of values of valid samples by domain, float64 [G]; deterministic on every device."""
    value_S = torch.where(samples.valid_S, value_S, 0.0).double()
    sum_G = torch.zeros(num_domains, dtype=torch.float64, device=value_S.device)
    # Neither index_add_ nor bincount: on CUDA those add in any order, this one sorts first.
    return sum_G.index_put_((samples.domain_S,), value_S, accumulate=True)


def domain_means(samples: Samples, num_domains: int) -> Tensor:
    """Mean loss per token by domain, float64 [G]; NaN for a domain without a valid sample."""
    tokens_G = per_domain(samples.tokens_S, samples, num_domains)
    return per_domain(samples.loss_S * samples.tokens_S, samples, num_domains) / tokens_G


def scores(weighting: LossWeighting, samples: Samples, bag_mean_G: Tensor, running_mean_G: Tensor) -> Tensor:
    """What decides a sample's weight, [S]; NaN for samples that are not valid.

    `bag_mean_G` stands for the mean of a sample's domain (rho < 1), `running_mean_G` for what is usual there (excess).
    A domain of which neither is known yet is taken at its samples' own losses.
    """
    loss_S = torch.where(samples.valid_S, samples.loss_S, torch.nan)
    score_S = loss_S
    if weighting.rho < 1:
        bag_S = bag_mean_G.to(loss_S)[samples.domain_S]
        bag_S = torch.where(torch.isfinite(bag_S), bag_S, loss_S)
        score_S = weighting.rho * loss_S + (1 - weighting.rho) * bag_S
    if weighting.score == "excess":
        usual_S = running_mean_G.to(loss_S)[samples.domain_S]
        score_S = score_S - torch.where(torch.isfinite(usual_S), usual_S, loss_S)
    return score_S


def find_range(weighting: LossWeighting, score_S: Tensor, domain_S: Tensor, num_domains: int) -> tuple[Tensor, Tensor]:
    """Ends of the range of the scores that are there, [G] each; NaN where there is none."""
    quantile_2 = torch.tensor(weighting.quantiles, dtype=score_S.dtype, device=score_S.device)
    is_there_S = torch.isfinite(score_S)
    score_S, domain_S = score_S[is_there_S], domain_S[is_there_S]
    ends_G2 = torch.full((num_domains, 2), torch.nan, dtype=score_S.dtype, device=score_S.device)
    if weighting.within == "domain":
        domain_P, ends_P2 = _quantiles_by_domain(score_S, domain_S, quantile_2)
        ends_G2[domain_P] = ends_P2
    elif len(score_S):
        ends_G2[:] = torch.quantile(score_S, quantile_2)
    return ends_G2[:, 0], ends_G2[:, 1]


def _quantiles_by_domain(score_S: Tensor, domain_S: Tensor, quantile_Q: Tensor) -> tuple[Tensor, Tensor]:
    """The P domains that are present, int64 [P], and the quantiles of their scores [P, Q], as torch.quantile's."""
    by_score_S = torch.argsort(score_S)
    order_S = by_score_S[torch.argsort(domain_S[by_score_S], stable=True)]
    domain_P, count_P = torch.unique_consecutive(domain_S[order_S], return_counts=True)
    first_P1 = (torch.cumsum(count_P, dim=0) - count_P)[:, None]
    place_PQ = quantile_Q * (count_P[:, None] - 1)
    below_PQ = place_PQ.long()
    sorted_S = score_S[order_S]
    low_PQ, high_PQ = sorted_S[first_P1 + below_PQ], sorted_S[first_P1 + place_PQ.ceil().long()]
    return domain_P, torch.lerp(low_PQ, high_PQ, place_PQ - below_PQ)


def exponents(weighting: LossWeighting, score_S: Tensor, domain_S: Tensor, low_G: Tensor, high_G: Tensor) -> Tensor:
    """f(h) - 1, at most 0, [S] (`tilted`: score - hi, in nats); 0 where the range or the score is not known."""
    low_S, high_S = low_G.to(score_S)[domain_S], high_G.to(score_S)[domain_S]
    if weighting.strategy == "tilted":
        return torch.nan_to_num(score_S - high_S, nan=0.0)
    width_S = high_S - low_S
    is_wide_S = width_S > _NO_RANGE * torch.clamp(high_S.abs(), min=1.0)
    h_S = torch.clamp(2 * (score_S - low_S) / torch.where(is_wide_S, width_S, 1.0) - 1, -1.0, 1.0)
    h_S = torch.where(is_wide_S, torch.nan_to_num(h_S, nan=0.0), 0.0)
    return STRATEGIES[weighting.strategy](h_S) - 1


def factors(weighting: LossWeighting, samples: Samples, score_S: Tensor, scale: Scale) -> Tensor:
    """g [S] before any normalisation; 0 for samples that are not valid."""
    exponent_S = exponents(weighting, score_S, samples.domain_S, scale.low_G, scale.high_G) * scale.inverse_r
    return torch.where(samples.valid_S, torch.exp(torch.clamp(exponent_S, max=_LARGEST_TILT)), 0.0)


def mean_factors(factor_S: Tensor, samples: Samples, num_domains: int) -> Tensor:
    """Mean of g over the tokens of each domain, float64 [G]; NaN where there are none."""
    tokens_G = per_domain(samples.tokens_S, samples, num_domains)
    return per_domain(factor_S * samples.tokens_S, samples, num_domains) / tokens_G


def level_out(factor_S: Tensor, domain_S: Tensor, level_G: Tensor) -> Tensor:
    """g over the mean that its domain has, [S]; as it is where that is not known."""
    level_S = level_G.to(factor_S)[domain_S]
    return torch.where(torch.isfinite(level_S) & (level_S > 0), factor_S / level_S, factor_S)


def normalised(factor_S: Tensor, samples: Samples) -> Tensor:
    """Weights w_i = n_i g_i / sum n g, [S], sum 1; all 0 when no sample is valid."""
    mass_S = torch.where(samples.valid_S, factor_S * samples.tokens_S, 0.0)
    return mass_S / torch.clamp(mass_S.sum(), min=torch.finfo(torch.float32).tiny)


def effective_samples(weight_S: Tensor, tokens_S: Tensor) -> Tensor:
    """Effective sample size as a part of what equal weights per token have, 0-d, 0..1."""
    total = tokens_S.sum()
    even = torch.where(tokens_S > 0, (weight_S * total) ** 2 / torch.clamp(tokens_S, min=1.0), 0.0).sum()
    return total * weight_S.sum() ** 2 / torch.clamp(even, min=torch.finfo(torch.float32).tiny)


def inverse_r_for(target_ess: float, exponent_S: Tensor, samples: Samples) -> float:
    """1 / r with which the effective sample size is the wanted part of the samples; at most 1 / 0.001.

    By bisection on log r: the effective size grows with r.
    """
    valid_S = samples.valid_S
    exponent_S, tokens_S = exponent_S[valid_S].double(), samples.tokens_S[valid_S].double()
    low, high = torch.log(torch.tensor([_SMALLEST_R, _LARGEST_R])).tolist()
    for _ in range(40):
        middle = (low + high) / 2
        mass_S = tokens_S * torch.exp((exponent_S - exponent_S.max()) / torch.exp(torch.tensor(middle)))
        too_few = float(effective_samples(mass_S / mass_S.sum(), tokens_S)) < target_ess
        low, high = (middle, high) if too_few else (low, middle)
    return float(torch.exp(torch.tensor(-(low + high) / 2)))


def exact_weights(weighting: LossWeighting, samples: Samples, state: WeightingState, inverse_r: float) -> Tensor:
    """Weights [S] of samples that are all known, normalised over them: range, means and temperature are their own."""
    num_domains = len(state.mean_G)
    score_S = scores(weighting, samples, domain_means(samples, num_domains), state.mean_G)
    low_G, high_G = find_range(weighting, score_S, samples.domain_S, num_domains)
    if weighting.target_ess is not None and bool(samples.valid_S.any()):
        exponent_S = exponents(weighting, score_S, samples.domain_S, low_G, high_G)
        inverse_r = inverse_r * inverse_r_for(weighting.target_ess, exponent_S, samples)
    factor_S = factors(weighting, samples, score_S, Scale(low_G, high_G, inverse_r))
    if weighting.within == "domain":
        factor_S = level_out(factor_S, samples.domain_S, mean_factors(factor_S, samples, num_domains))
    return normalised(factor_S, samples)


def lagged_factors(weighting: LossWeighting, samples: Samples, state: WeightingState, inverse_r: float) -> Tensor:
    """g [S] of samples as they come, from what earlier steps had: who sums n g over all of them knows the weights."""
    score_S = scores(weighting, samples, state.mean_G, state.mean_G)
    if weighting.target_ess is not None:
        inverse_r = inverse_r * state.inverse_r
    factor_S = factors(weighting, samples, score_S, Scale(*state.range_G, inverse_r))
    if weighting.within == "domain":
        factor_S = level_out(factor_S, samples.domain_S, state.level_G)
    return factor_S


def updated(state: WeightingState, weighting: LossWeighting, samples: Samples, inverse_r: float) -> WeightingState:
    """The state after a step with these samples (on the CPU), the same on every rank."""
    num_domains = len(state.mean_G)
    mean_G = domain_means(samples, num_domains)
    score_S = scores(weighting, samples, state.mean_G, state.mean_G)
    low_G, high_G = (end.double() for end in find_range(weighting, score_S, samples.domain_S, num_domains))
    found_r = state.inverse_r
    if weighting.target_ess is not None and bool(samples.valid_S.any()):
        exponent_S = exponents(weighting, score_S, samples.domain_S, low_G, high_G)
        found_r = inverse_r_for(weighting.target_ess, exponent_S, samples)
        inverse_r = inverse_r * found_r
    factor_S = factors(weighting, samples, score_S, Scale(low_G, high_G, inverse_r))
    level_G = mean_factors(factor_S, samples, num_domains)
    low_G, low_trend_G = _follow(state.low_G, state.low_trend_G, low_G, weighting.range_memory)
    high_G, high_trend_G = _follow(state.high_G, state.high_trend_G, high_G, weighting.range_memory)
    return replace(
        state,
        low_G=low_G,
        high_G=high_G,
        low_trend_G=low_trend_G,
        high_trend_G=high_trend_G,
        mean_G=_remember(state.mean_G, mean_G, weighting.mean_memory),
        level_G=_remember(state.level_G, level_G, weighting.range_memory),
        inverse_r=found_r,
    )


def _follow(level_G: Tensor, trend_G: Tensor, seen_G: Tensor, memory: float) -> tuple[Tensor, Tensor]:
    """Holt's linear smoothing over about `memory` steps; what was not seen this time goes nowhere."""
    expected_G = level_G + trend_G
    new_G = torch.where(torch.isfinite(level_G), expected_G + (seen_G - expected_G) / memory, seen_G)
    change_G = torch.where(torch.isfinite(level_G), trend_G + (new_G - level_G - trend_G) / memory, 0.0)
    is_seen_G = torch.isfinite(seen_G)
    resting_G = torch.where(torch.isfinite(trend_G), 0.0, trend_G)
    return torch.where(is_seen_G, new_G, level_G), torch.where(is_seen_G, change_G, resting_G)


def _remember(old_G: Tensor, new_G: Tensor, memory: float) -> Tensor:
    """Exponential average over about `memory` steps; what was not seen this time stays."""
    mixed_G = torch.where(torch.isfinite(old_G), old_G + (new_G - old_G) / memory, new_G)
    return torch.where(torch.isfinite(new_G), mixed_G, old_G)


def mirror_descent_logit(
    logit_S: Tensor, supervised_S: Tensor, consistency_S: Tensor, eta: float, entropy: float = 0.0
) -> Tensor:
    """AdaWAC: logit of the weight beta_i of a two-term loss after one ascent step, [S].

    beta <- beta e^{eta (a - b)} / (beta e^{eta (a - b)} + 1 - beta) is one addition to the logit, which never
    saturates; with `entropy` the logit shrinks by 1 - eta * entropy first (the pm-dro variant). Spec/methods.md 16.
    """
    return (1 - eta * entropy) * logit_S + eta * (supervised_S.detach() - consistency_S.detach())


def two_term_loss(logit_S: Tensor, supervised_S: Tensor, consistency_S: Tensor) -> Tensor:
    """mean_i beta_i a_i + (1 - beta_i) b_i with beta = sigmoid(logit), 0-d; differentiable in both terms."""
    beta_S = torch.sigmoid(logit_S.detach())
    return (beta_S * supervised_S + (1 - beta_S) * consistency_S).mean()


def bag_instance_loss(prediction_S: Tensor, bag_S: Tensor, response_K: Tensor, rho: float) -> Tensor:
    """(mean of a bag's predictions - response)^2 + rho * their variance, mean over bags, 0-d.

    rho 0 fits the bags, rho 1 every instance; Javanmard et al., spec/methods.md 17. bag_S: int64, indices of bags.
    """
    one_hot_SK = torch.nn.functional.one_hot(bag_S, len(response_K)).to(prediction_S)
    share_SK = one_hot_SK / one_hot_SK.sum(dim=0)
    mean_K = share_SK.T @ prediction_S
    variance_K = share_SK.T @ (prediction_S - mean_K[bag_S]).square()
    return ((mean_K - response_K).square() + rho * variance_K).mean()
