"""What the intervals of a window say about each arm: how much faster the loss falls the more of the arm is read.

The linear law (Chen et al., arXiv 2411.05735): in interval n the validation loss of arm i falls by

    drop_ni = c_ni + sum_j A_ij p_nj          p_nj: share of arm j among the rows that were really read

Two estimates of it: `solve_gains` is the paper's, from the perturbations of one round; `Evidence` is a Bayesian
regression over all intervals of all rounds, which removes what all mixtures have in common and knows how sure it is.
K arms, N intervals; arrays are float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.online import Window, loss_array

Floats = NDArray[np.float64]

_PRIOR_FREEDOM = 2.0
"""The null model's residuals count as so many observations of the noise, until the fit has enough of its own."""


@dataclass(frozen=True, eq=False)
class Observations:
    """The usable intervals of a window.

    share_NK: realised proportions. drop_NK: fall of each validation loss, 0 where an arm is not validated at all.
    target_K: weight of each validation loss, sum 1. mass_N: steps, times the learning rate where it is known (`unit`).
    time_N: middle of the interval in steps. num_skipped: intervals without a finite loss before or after.
    """

    share_NK: Floats
    drop_NK: Floats
    target_K: Floats
    steps_N: Floats
    mass_N: Floats
    time_N: Floats
    is_perturbation_N: NDArray[np.bool_]
    unit: str
    num_skipped: int

    def __len__(self) -> int:
        return len(self.share_NK)

    @property
    def drop_N(self) -> Floats:
        """Fall of the target loss in each interval, in nats per token."""
        return np.asarray(self.drop_NK @ self.target_K, dtype=np.float64)

    def of_arms(self, chosen_K: NDArray[np.bool_]) -> Observations:
        """The same with the columns of the arms [A] that can be read; all validation losses still count."""
        return replace(self, share_NK=self.share_NK[:, chosen_K])


def observe(window: Window, objective: Literal["loss", "perplexity"] = "loss") -> Observations:
    """The intervals whose losses are there before and after, for every arm that is validated and counts.

    Objective `perplexity`: d(mean perplexity) = mean(perplexity_i dL_i), so losses count by the window's perplexities.
    """
    num_arms, intervals = len(window.arms), window.intervals
    shape = (len(intervals), num_arms)
    rows_NK = np.array([interval.rows for interval in intervals], dtype=np.float64).reshape(shape)
    before_NK = np.array([loss_array(interval.before) for interval in intervals]).reshape(shape)
    after_NK = np.array([loss_array(interval.after) for interval in intervals]).reshape(shape)
    drop_NK = before_NK - after_NK
    wanted_K = np.full(num_arms, 1.0) if window.target is None else np.array(window.target)
    counts_K = np.isfinite(drop_NK).any(axis=0) & (wanted_K > 0)
    usable_N = np.isfinite(drop_NK[:, counts_K]).all(axis=1) & (rows_NK.sum(axis=1) > 0) & counts_K.any()
    target_K = np.where(counts_K, wanted_K, 0.0)
    if objective == "perplexity" and usable_N.any():
        loss_K = np.where(counts_K, after_NK, -np.inf)[usable_N].mean(axis=0)
        target_K = target_K * np.exp(loss_K - loss_K.max())
    steps_N = np.array([interval.num_steps for interval in intervals], dtype=np.float64)
    first_N = np.array([interval.first_step for interval in intervals], dtype=np.float64)
    mass_N, unit = _mass(window, steps_N)
    kept_NK = rows_NK[usable_N]
    return Observations(
        share_NK=kept_NK / kept_NK.sum(axis=1, keepdims=True),
        drop_NK=np.where(counts_K, drop_NK, 0.0)[usable_N],
        target_K=target_K / max(target_K.sum(), np.finfo(np.float64).tiny),
        steps_N=steps_N[usable_N],
        mass_N=mass_N[usable_N],
        time_N=(first_N + steps_N / 2)[usable_N],
        is_perturbation_N=np.array([interval.is_perturbation for interval in intervals], dtype=bool)[usable_N],
        unit=unit,
        num_skipped=int(len(intervals) - usable_N.sum()),
    )


def _mass(window: Window, steps_N: Floats) -> tuple[Floats, str]:
    """Steps weighted by learning rate, if every interval knows a positive one."""
    rates = [interval.learning_rate for interval in window.intervals]
    if any(rate is None or rate <= 0 for rate in rates):
        return steps_N, "steps"
    return steps_N * np.array(rates, dtype=np.float64), "learning rate x steps"


def solve_gains(share_NK: Floats, drop_NK: Floats) -> Floats | None:
    """A [K, K] with drop_n = A p_n for every row: row = validated arm, column = arm read; None when undetermined.

    The least-squares form of A_i = P^-1 beta_i (spec/methods.md 1.2): equal to it when each perturbation is repeated
    equally often, and right for whatever was really read when not.
    """
    gains_KK, _, rank, _ = np.linalg.lstsq(share_NK, drop_NK, rcond=1e-9)
    if rank < share_NK.shape[1]:
        return None
    return np.asarray(gains_KK.T, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Gains:
    """Gain of each arm beside the mean arm [K], in nats per unit of mass: posterior mean and standard error.

    estimate_K: least squares without a prior. rate: mean fall of the target loss per unit of mass, in absolute value.
    """

    mean_K: Floats
    error_K: Floats
    estimate_K: Floats
    rate: float


@dataclass(frozen=True, eq=False)
class Evidence:
    """Sums of a Bayesian linear regression of the target loss's fall on the realised shares.

    precision_KK: sum of x x^T, moment_K: sum of x y, square: sum of y^2, freedom: observations less nuisances; x and y
    are what is left of shares and falls after a constant and a trend in time are taken out within each window.
    fall, mass: sums over all intervals.
    """

    precision_KK: Floats
    moment_K: Floats
    square: float
    freedom: float
    fall: float
    mass: float
    unit: str

    @classmethod
    def none(cls, num_arms: int, unit: str) -> Evidence:
        """No observation yet."""
        return cls(np.zeros((num_arms, num_arms)), np.zeros(num_arms), 0.0, 0.0, 0.0, 0.0, unit)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Evidence:
        """The inverse of `state`."""
        numbers = {name: state[name] for name in ("square", "freedom", "fall", "mass", "unit")}
        return cls(precision_KK=np.array(state["precision"]), moment_K=np.array(state["moment"]), **numbers)

    def state(self) -> dict[str, Any]:
        """Plain JSON data."""
        numbers = {name: getattr(self, name) for name in ("square", "freedom", "fall", "mass", "unit")}
        return {"precision": self.precision_KK.tolist(), "moment": self.moment_K.tolist(), **numbers}

    def updated(self, seen: Observations, keep: float) -> Evidence:
        """With the intervals of one more window; what was known before counts `keep` times as much as before.

        The noise of a fall has one part per validation and one that grows with the steps; both are taken to be equal
        in the shortest interval.
        """
        weight_N = seen.mass_N / np.sqrt(0.5 + 0.5 * seen.steps_N / seen.steps_N.min())
        nuisance_NZ = np.stack([np.ones(len(seen)), seen.time_N - seen.time_N.mean()], axis=1)
        design_NZ = weight_N[:, None] * nuisance_NZ
        observed = np.column_stack([weight_N[:, None] * seen.share_NK, weight_N * seen.drop_N / seen.mass_N])
        fitted, _, rank, _ = np.linalg.lstsq(design_NZ, observed, rcond=1e-9)
        rest = observed - design_NZ @ fitted
        x_NK, y_N = rest[:, :-1], rest[:, -1]
        return Evidence(
            precision_KK=keep * self.precision_KK + x_NK.T @ x_NK,
            moment_K=keep * self.moment_K + x_NK.T @ y_N,
            square=keep * self.square + float(y_N @ y_N),
            freedom=keep * self.freedom + len(seen) - int(rank),
            fall=keep * self.fall + float(seen.drop_N.sum()),
            mass=keep * self.mass + float(seen.mass_N.sum()),
            unit=self.unit,
        )

    def gains(self, prior: float) -> Gains | None:
        """Posterior under a normal prior: gains differ between arms by about `prior` times the mean fall of the loss.

        Noise that is large beside what the loss falls at all so counts for little, however large its estimates are.
        None when the shares seen do not tell arms apart.
        """
        num_arms = len(self.moment_K)
        basis_KD = _contrasts(num_arms)
        precision_DD = basis_KD.T @ self.precision_KK @ basis_KD
        moment_D = basis_KD.T @ self.moment_K
        if np.linalg.matrix_rank(precision_DD, hermitian=True) < num_arms - 1:
            return None
        estimate_D = np.linalg.solve(precision_DD, moment_D)
        noise, rate = self._noise(float(moment_D @ estimate_D)), abs(self.fall / self.mass)
        width = (prior * rate) ** 2
        if width == 0.0:
            return Gains(np.zeros(num_arms), np.zeros(num_arms), basis_KD @ estimate_D, rate)
        posterior_DD = width * np.linalg.inv(width * precision_DD + noise * np.eye(num_arms - 1))
        variance_K = np.einsum("kd,de,ke->k", basis_KD, noise * posterior_DD, basis_KD)
        return Gains(basis_KD @ (posterior_DD @ moment_D), np.sqrt(variance_K), basis_KD @ estimate_D, rate)

    def _noise(self, explained: float) -> float:
        """Variance of y: residuals of the fit, with those of the model without gains as a prior."""
        residual = max(0.0, self.square - explained)
        freedom = max(0.0, self.freedom - (len(self.moment_K) - 1))
        prior = self.square / max(self.freedom, 1.0)
        return (residual + _PRIOR_FREEDOM * prior) / (freedom + _PRIOR_FREEDOM)


def _contrasts(num_arms: int) -> Floats:
    """Orthonormal basis [K, K - 1] of the differences between arms: gains are known up to a constant only."""
    order_D = np.arange(1.0, num_arms)
    helmert_KD = np.triu(np.ones((num_arms, num_arms - 1)))
    helmert_KD[np.arange(1, num_arms), np.arange(num_arms - 1)] = -order_D
    return np.asarray(helmert_KD / np.sqrt(order_D * (order_D + 1)), dtype=np.float64)
