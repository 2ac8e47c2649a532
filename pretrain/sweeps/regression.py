"""From many mixtures and their losses to a predictor, and to the mixture that it likes best (RegMix).

Liu et al., "RegMix: Data mixture as regression" (arXiv 2407.01492); spec/methods.md 1.4. The original regresses with
LightGBM (1000 trees); ours is a ridge regression on a quadratic in the shares and their logarithms, which needs no
further dependency and whose leave-one-out errors are known in closed form. N runs, K arms, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SMALLEST_SHARE = 0.01
"""Added before the logarithm: a domain that is hardly read is as good as absent."""
PENALTIES = np.logspace(-6, 3, 28)


@dataclass(frozen=True)
class Ridge:
    """`left_out_N` are the predictions of each run from the other ones."""

    mean_F: Floats
    scale_F: Floats
    coefficient_F: Floats
    intercept: float
    left_out_N: Floats

    def predict(self, share_NK: Floats) -> Floats:
        """Losses [N] of mixtures [N, K]."""
        predicted_N: Floats = self.intercept + (features(share_NK) - self.mean_F) / self.scale_F @ self.coefficient_F
        return predicted_N


def features(share_NK: Floats) -> Floats:
    """p_j, ln(p_j + 0.01) and their products within each kind [N, F]."""
    log_NK = np.log(share_NK + SMALLEST_SHARE)
    first, second = np.triu_indices(share_NK.shape[1])
    products = [values[:, first] * values[:, second] for values in (share_NK, log_NK)]
    return np.column_stack([share_NK, log_NK, *products])


def fit_ridge(share_NK: Floats, loss_N: Floats) -> Ridge:
    """The ridge regression whose penalty has the smallest leave-one-out error. Raises ValueError below 3 runs."""
    if len(loss_N) < 3:
        raise ValueError(f"{len(loss_N)} runs are too few for a regression; at least 3")
    feature_NF = features(share_NK)
    mean_F, scale_F = feature_NF.mean(axis=0), np.maximum(feature_NF.std(axis=0), 1e-12)
    left_NR, singular_R, right_RF = np.linalg.svd((feature_NF - mean_F) / scale_F, full_matrices=False)
    centred_N = loss_N - loss_N.mean()
    errors = [_left_out_error(left_NR, singular_R, centred_N, penalty) for penalty in PENALTIES]
    best = int(np.argmin([np.square(error_N).mean() for error_N in errors]))
    shrunk_R = singular_R / (singular_R**2 + PENALTIES[best]) * (left_NR.T @ centred_N)
    return Ridge(mean_F, scale_F, right_RF.T @ shrunk_R, float(loss_N.mean()), loss_N - errors[best])


def best_simulated(model: Ridge, prior_K: Floats, num_simulated: int, num_best: int, seed: int) -> Floats:
    """Mean [K] of the best-predicted mixtures among draws from Dirichlet(prior), as the original does it.

    The prior's concentration is its number of arms: for a uniform prior every mixture is equally likely.
    """
    chance = np.random.default_rng(seed)
    share_NK = chance.dirichlet(prior_K * len(prior_K), num_simulated)
    best = np.argsort(model.predict(share_NK), kind="stable")[:num_best]
    return np.asarray(share_NK[best].mean(axis=0))


def spearman(one_N: Floats, other_N: Floats) -> float:
    """Rank correlation of two lists without ties."""
    one_rank_N, other_rank_N = np.argsort(np.argsort(one_N)), np.argsort(np.argsort(other_N))
    return float(np.corrcoef(one_rank_N, other_rank_N)[0, 1])


def _left_out_error(left_NR: Floats, singular_R: Floats, centred_N: Floats, penalty: float) -> Floats:
    """Residual of each run under the fit without it; the mean counts as one more fitted number."""
    shrink_R = singular_R**2 / (singular_R**2 + penalty)
    fitted_N = left_NR @ (shrink_R * (left_NR.T @ centred_N))
    leverage_N = np.square(left_NR) @ shrink_R + 1 / len(centred_N)
    return np.asarray((centred_N - fitted_N) / np.maximum(1 - leverage_N, 1e-6))
