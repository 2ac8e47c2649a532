"""The log-linear mixing law: L_i(p) = c_i + b_i exp(sum_j t_ij p_j) for every domain i, fitted to losses of short runs.

Ye et al., "Data mixing laws" (arXiv 2403.16952); spec/methods.md 1.4. On the simplex b_i > 0 is absorbed by t:
L_i = c_i + exp(u_i . p) with u_ij = t_ij + ln b_i, so that K + 1 numbers per domain are fitted. Each L_i is convex
in p, so the best mixture is found by descent from any point. N runs, K arms, G losses.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

HUBER = 0.02
"""Residuals beyond this many nats count linearly (the authors' analysis)."""

FLOOR_STARTS = (0.02, 0.1, 0.3, 1.0, 3.0)
"""First guesses of c: so many times the range of the losses, and at least so many hundredths of a nat, below them."""


@dataclass(frozen=True)
class MixingLaw:
    """floor [G] is c; slope [G, K] is u."""

    floor: Floats
    slope: Floats

    def predict(self, share_NK: ArrayLike) -> Floats:
        """Losses [N, G] of mixtures [N, K]."""
        losses: Floats = self.floor + np.exp(np.asarray(share_NK) @ self.slope.T)
        return losses


def fit_law(share_NK: Floats, loss_NG: Floats) -> MixingLaw:
    """The law of each column of losses, by Huber's least squares from several starts.

    Raises ValueError with fewer runs than the K + 1 numbers of the law.
    """
    if len(share_NK) < share_NK.shape[1] + 1:
        raise ValueError(f"{len(share_NK)} runs; a law of {share_NK.shape[1]} arms needs {share_NK.shape[1] + 1}")
    fits = [_fit_one(share_NK, loss_N) for loss_N in loss_NG.T]
    return MixingLaw(np.array([fit[0] for fit in fits]), np.array([fit[1:] for fit in fits]))


def leave_one_out(share_NK: Floats, loss_NG: Floats) -> Floats:
    """Error [N, G] of each run's losses when predicted from the other runs; NaN when those are too few."""
    if len(share_NK) < share_NK.shape[1] + 2:
        return np.full(loss_NG.shape, np.nan)
    errors = []
    for left_out in range(len(share_NK)):
        others = np.arange(len(share_NK)) != left_out
        law = fit_law(share_NK[others], loss_NG[others])
        errors.append(law.predict(share_NK[left_out]) - loss_NG[left_out])
    return np.array(errors)


def best_mixture(law: MixingLaw, target_G: Floats, floor: float = 0.0, num_steps: int = 5_000) -> Floats:
    """The mixture [K] with the smallest target-weighted loss, each share at least `floor`.

    Exponentiated gradient on a convex function with a shrinking step: within 1e-3 of the optimum.
    """
    num_arms = law.slope.shape[1]
    share_K = np.full(num_arms, 1 / num_arms)
    for step in range(num_steps):
        full_K = floor + (1 - floor * num_arms) * share_K
        gradient_K = (target_G * np.exp(law.slope @ full_K)) @ law.slope
        spread = np.ptp(gradient_K)
        if spread == 0:
            break
        log_K = np.log(np.maximum(share_K, 1e-300)) - gradient_K / spread / (1 + step) ** 0.5
        share_K = np.exp(log_K - log_K.max())
        share_K /= share_K.sum()
    return np.asarray(floor + (1 - floor * num_arms) * share_K)


def _fit_one(share_NK: Floats, loss_N: Floats) -> Floats:
    """(c, u_1 .. u_K) of one column, the best of several starts."""
    lowest, spread = float(loss_N.min()), float(np.ptp(loss_N))
    best, best_cost = np.zeros(1 + share_NK.shape[1]), np.inf
    for factor in FLOOR_STARTS:
        floor = lowest - max(factor * spread, 0.01 * factor)
        slope_K = np.linalg.lstsq(share_NK, np.log(loss_N - floor), rcond=None)[0]
        found, cost = _levenberg_marquardt(share_NK, loss_N, np.array([floor, *slope_K]))
        if cost < best_cost:
            best, best_cost = found, cost
    return best


def _levenberg_marquardt(share_NK: Floats, loss_N: Floats, start: Floats) -> tuple[Floats, float]:
    """Damped Gauss-Newton on the Huber cost, re-weighted in every step; parameters and cost."""
    law, damping = start, 1e-2
    cost = _huber(_residual(share_NK, loss_N, law))
    for _ in range(200):
        residual_N = _residual(share_NK, loss_N, law)
        weight_N = np.minimum(1.0, HUBER / np.maximum(np.abs(residual_N), 1e-300))
        jacobian_NM = np.column_stack([np.ones(len(loss_N)), np.exp(_exponent(share_NK, law))[:, None] * share_NK])
        normal_MM = jacobian_NM.T @ (weight_N[:, None] * jacobian_NM)
        scale_MM = np.diag(np.maximum(np.diag(normal_MM), 1e-12))
        step_M = np.linalg.solve(normal_MM + damping * scale_MM, -jacobian_NM.T @ (weight_N * residual_N))
        trial_cost = _huber(_residual(share_NK, loss_N, law + step_M))
        if trial_cost < cost:
            done = cost - trial_cost <= 1e-12 * cost
            law, cost, damping = law + step_M, trial_cost, max(damping / 3, 1e-12)
            if done:
                break
        else:
            damping *= 4
            if damping > 1e12:
                break
    return law, cost


def _exponent(share_NK: Floats, law: Floats) -> Floats:
    return np.minimum(share_NK @ law[1:], 50.0)  # a wild step is refused by its cost, not by an overflow


def _residual(share_NK: Floats, loss_N: Floats, law: Floats) -> Floats:
    residual_N: Floats = law[0] + np.exp(_exponent(share_NK, law)) - loss_N
    return residual_N


def _huber(residual_N: Floats) -> float:
    size_N = np.abs(residual_N)
    return float(np.where(size_N <= HUBER, size_N**2 / 2, HUBER * (size_N - HUBER / 2)).sum())
