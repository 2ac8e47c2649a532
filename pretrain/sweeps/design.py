"""Where to try mixtures: points that cover the simplex evenly, or scatter around a prior. Float64 [n, K]."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]

CANDIDATES_PER_POINT = 16
SPREAD = 1.5
"""Dirichlet concentration of the candidates (the Aioli repository's sweep design, spec/methods.md 1.4)."""


def spread_points(num_points: int, num_arms: int, seed: int) -> Points:
    """Points that cover the simplex: of 16 n draws from Dirichlet(1.5), the closest two are merged until n are left."""
    chance = np.random.default_rng(seed)
    point_NK = chance.dirichlet(np.full(num_arms, SPREAD), CANDIDATES_PER_POINT * num_points)
    size_N = np.ones(len(point_NK))
    while len(point_NK) > num_points:
        one, other = _closest_pair(point_NK)
        merged_K = np.average(point_NK[[one, other]], axis=0, weights=size_N[[one, other]])
        point_NK[one], size_N[one] = merged_K, size_N[one] + size_N[other]
        point_NK, size_N = np.delete(point_NK, other, axis=0), np.delete(size_N, other)
    return point_NK


def scattered_points(num_points: int, prior_K: Points, seed: int, floor: float = 2e-4) -> Points:
    """RegMix's draws: Dirichlet around sqrt(prior) with strengths from 0.1 to 5; none above 15 x its prior.

    Shares below `floor` become 0 (the original's 2e-4).
    """
    chance = np.random.default_rng(seed)
    centre_K = np.sqrt(prior_K) / np.sqrt(prior_K).sum()
    strengths = np.logspace(np.log10(0.1), np.log10(5), 15)
    points: list[Points] = []
    while len(points) < num_points:
        strength = strengths[len(points) % len(strengths)]
        point_K = chance.dirichlet(np.maximum(centre_K * strength * len(prior_K), 1e-3))
        point_K = np.where(point_K < floor, 0.0, point_K)
        if (point_K <= 15 * prior_K).all():
            points.append(point_K / point_K.sum())
    return np.array(points)


def _closest_pair(point_NK: Points) -> tuple[int, int]:
    distance_NN = np.square(point_NK[:, None, :] - point_NK[None, :, :]).sum(axis=2)
    distance_NN[np.tril_indices(len(point_NK))] = np.inf
    one, other = np.unravel_index(int(distance_NN.argmin()), distance_NN.shape)
    return int(one), int(other)
