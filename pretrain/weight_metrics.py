"""What samples weighed over a window of steps: histogram, effective sample size, shares by domain.

The relative weight of a sample is its weight over what uniform weighting gives it: 1 on average. S samples, G domains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixwright.data_mixing.weighting import Samples, effective_samples, per_domain

EDGES = (0.0625, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0, 16.0)
"""Upper edges of the histogram's bins of relative weights, one further bin above."""


class WeightWindow:
    """Sums over the steps since the last report, on the CPU; the same on every rank, because so are the samples."""

    def __init__(self, num_domains: int) -> None:
        self._num_domains = num_domains
        self._clear()

    def _clear(self) -> None:
        self._steps = 0
        self._effective = 0.0
        self._histogram = torch.zeros(len(EDGES) + 1, dtype=torch.float64)
        self._weight_G = torch.zeros(self._num_domains, dtype=torch.float64)
        self._tokens_G = torch.zeros(self._num_domains, dtype=torch.float64)

    def add(self, mass_S: Tensor, samples: Samples) -> None:
        """Add a step: masses in proportion to the weights of all its samples."""
        weight_S = mass_S / torch.clamp(mass_S.sum(), min=torch.finfo(torch.float32).tiny)
        relative_S = weight_S * samples.tokens_S.sum() / torch.clamp(samples.tokens_S, min=1.0)
        bin_S = torch.bucketize(relative_S[samples.valid_S], torch.tensor(EDGES))
        self._steps += 1
        self._effective += float(effective_samples(weight_S, samples.tokens_S))
        self._histogram += torch.bincount(bin_S, minlength=len(EDGES) + 1)
        self._weight_G += per_domain(weight_S, samples, self._num_domains)
        self._tokens_G += per_domain(samples.tokens_S, samples, self._num_domains)

    def take(self, names: Sequence[str], mixture: Sequence[float]) -> dict[str, Any] | None:
        """Figures of the window, None when no step was weighted; starts again.

        `correlation` is that of domains' mixture shares with the mean relative weight of their tokens.
        """
        if not self._steps:
            return None
        weight_G = self._weight_G / self._weight_G.sum()
        tokens_G = self._tokens_G / self._tokens_G.sum()
        relative_G = weight_G / tokens_G
        figures = {
            "effective_sample_size": self._effective / self._steps,
            "weight_share": dict(zip(names, weight_G.tolist(), strict=True)),
            "token_share": dict(zip(names, tokens_G.tolist(), strict=True)),
            "correlation": _correlation(torch.tensor(mixture, dtype=torch.float64), relative_G),
            "histogram": {"edges": list(EDGES), "counts": [int(count) for count in self._histogram]},
        }
        self._clear()
        return figures


def _correlation(left_G: Tensor, right_G: Tensor) -> float | None:
    """Pearson's r over the domains that both know; None when one of them does not vary."""
    known_G = torch.isfinite(left_G) & torch.isfinite(right_G)
    left_G, right_G = left_G[known_G] - left_G[known_G].mean(), right_G[known_G] - right_G[known_G].mean()
    spread = math.sqrt(float(left_G.square().sum() * right_G.square().sum()))
    return float((left_G * right_G).sum()) / spread if spread > 1e-12 else None
