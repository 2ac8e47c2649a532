"""Laws L(x) = E + A / x**alpha of losses over members, parameters or tokens, with intervals, and what they extrapolate.

alpha is searched on a grid and refined; for each alpha, E >= 0 and A >= 0 solve a least-squares problem in closed form.
Source: "Pre-training under infinite compute" (arXiv 2509.14786), spec/methods.md 6.2. n points, B draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixwright.pretrain.ensemble.curve import EnsembleEvaluation
from mixwright.pretrain.errors import EnsembleError

FEW_POINTS = 4
"""Three parameters fitted to fewer points say nothing about how well they fit."""
DRAWS = 1000

_ALPHAS = np.geomspace(0.05, 6.0, 241)
_REFINED = np.linspace(-1.0, 1.0, 81)


@dataclass(frozen=True)
class PowerLaw:
    """E + A / x**alpha; `residual` is the root mean square in nats, `largest` the largest x that was fitted."""

    floor: float
    scale: float
    exponent: float
    residual: float
    num_points: int
    largest: float

    def __call__(self, x: float) -> float:
        """The loss at x."""
        return self.floor + self.scale / math.pow(x, self.exponent)

    @property
    def is_thin(self) -> bool:
        """Whether there are too few points to trust the exponent."""
        return self.num_points < FEW_POINTS


@dataclass(frozen=True)
class Interval:
    """2.5 % and 97.5 % quantiles over draws."""

    low: float
    high: float


@dataclass(frozen=True)
class MemberLaw:
    """The law over members with 95 % intervals: over rows (drawn again), and its range when one member is left out."""

    law: PowerLaw
    floor: Interval
    exponent: Interval
    floor_without_one: Interval | None
    exponent_without_one: Interval | None


@dataclass(frozen=True)
class Prediction:
    """What the law of the first k - 1 members says of k, beside what was found; `predicted_from_all`
    uses the subsets of all members of at most k - 1."""

    k: int
    predicted: float
    found: float
    law: PowerLaw
    predicted_from_all: float

    @property
    def error(self) -> float:
        """Predicted minus found, nats."""
        return self.predicted - self.found


@dataclass(frozen=True)
class DataMultiple:
    """How many times the text the standard recipe would need for a loss; infinite below its law's floor.

    `extrapolates`: more than the largest amount that the law was fitted to.
    """

    multiple: float
    extrapolates: bool


def fit_power(x_n: Sequence[float], loss_n: Sequence[float]) -> PowerLaw:
    """The law with the least squared error; raises EnsembleError for fewer than three points or an x <= 0."""
    x, loss = np.asarray(x_n, dtype=np.float64), np.asarray(loss_n, dtype=np.float64)
    if len(x) < 3 or len(x) != len(loss) or x.min() <= 0 or len(np.unique(x)) < 3:
        raise EnsembleError(f"a law needs losses at three or more different positive x, found {len(x)}: {x.tolist()}")
    floor_B, scale_B, exponent_B, square_B = _fit_many(x, loss[None])
    return PowerLaw(
        floor=float(floor_B[0]),
        scale=float(scale_B[0]),
        exponent=float(exponent_B[0]),
        residual=math.sqrt(float(square_B[0]) / len(x)),
        num_points=len(x),
        largest=float(x.max()),
    )


def member_law(evaluation: EnsembleEvaluation, *, fitted: bool, draws: int = DRAWS, seed: int = 0) -> MemberLaw:
    """Loss over the number of members. Raises EnsembleError for fewer than three members."""
    ks, mean_kR = _means(evaluation, fitted, None)
    law = fit_power(ks, mean_kR.mean(axis=1))
    rows = np.random.default_rng(seed).integers(0, mean_kR.shape[1], (draws, mean_kR.shape[1]))
    drawn_Bk = np.stack([mean_kR[:, row_n].mean(axis=1) for row_n in rows])
    floor_B, _, exponent_B, _ = _fit_many(np.asarray(ks, dtype=np.float64), drawn_Bk)
    without = _without_one(evaluation, fitted)
    return MemberLaw(
        law=law,
        floor=_interval(floor_B),
        exponent=_interval(exponent_B),
        floor_without_one=_range([one.floor for one in without]),
        exponent_without_one=_range([one.exponent for one in without]),
    )


def predict_last(evaluation: EnsembleEvaluation, *, fitted: bool) -> Prediction:
    """Fit the first K - 1 members alone and predict all K. Raises EnsembleError for fewer than four members."""
    last = len(evaluation.members)
    if last < 4:
        raise EnsembleError(f"a prediction needs three members to fit and one to predict, found {last}")
    ks, mean_kR = _means(evaluation, fitted, range(last - 1))
    law = fit_power(ks, mean_kR.mean(axis=1))
    all_ks, all_kR = _means(evaluation, fitted, None)
    from_all = fit_power(all_ks[:-1], all_kR[:-1].mean(axis=1))
    return Prediction(last, law(last), float(all_kR[-1].mean()), law, from_all(last))


def data_multiple(standard: PowerLaw, loss: float, tokens: float) -> DataMultiple:
    """D_eff / D with D_eff = (A / (loss - E))**(1 / alpha) of the standard recipe's law over tokens."""
    if loss <= standard.floor:
        return DataMultiple(math.inf, extrapolates=True)
    needed = math.pow(standard.scale / (loss - standard.floor), 1 / standard.exponent)
    return DataMultiple(needed / tokens, extrapolates=needed > standard.largest)


def _means(
    evaluation: EnsembleEvaluation, fitted: bool, among: Sequence[int] | None
) -> tuple[list[int], NDArray[np.float64]]:
    """Sizes k and the mean of their subsets' losses on each row, [k, R]."""
    losses_SR, sizes = evaluation.losses(fitted=fitted), evaluation.sizes(among)
    return list(sizes), np.stack([losses_SR[numbers].mean(axis=0) for numbers in sizes.values()])


def _without_one(evaluation: EnsembleEvaluation, fitted: bool) -> list[PowerLaw]:
    """Laws with each member left out; none when too few would be left."""
    everyone = range(len(evaluation.members))
    if len(everyone) < FEW_POINTS:
        return []
    found = [_means(evaluation, fitted, [one for one in everyone if one != out]) for out in everyone]
    return [fit_power(ks, mean_kR.mean(axis=1)) for ks, mean_kR in found if len(ks) >= 3]


def _fit_many(x_n: NDArray[np.float64], loss_Bn: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """E, A, alpha and the squared error of every row of losses, [B] each."""
    exponent_B = _best(x_n, loss_Bn, np.broadcast_to(_ALPHAS, (len(loss_Bn), len(_ALPHAS))))
    for width in (0.02, 0.0005):  # of the grid's step, then of that of the first refinement
        exponent_B = _best(x_n, loss_Bn, exponent_B[:, None] * (1 + width * _REFINED))
    floor_Ba, scale_Ba, square_Ba = _solve(x_n, loss_Bn, exponent_B[:, None])
    return floor_Ba[:, 0], scale_Ba[:, 0], exponent_B, square_Ba[:, 0]


def _best(x_n: NDArray[np.float64], loss_Bn: NDArray[np.float64], alpha_Ba: NDArray[np.float64]) -> NDArray[np.float64]:
    """The alpha of each draw with the least squared error."""
    square_Ba = _solve(x_n, loss_Bn, alpha_Ba)[2]
    return np.take_along_axis(alpha_Ba, square_Ba.argmin(axis=1)[:, None], axis=1)[:, 0]


def _solve(
    x_n: NDArray[np.float64], loss_Bn: NDArray[np.float64], alpha_Ba: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """E >= 0, A >= 0 and the squared error for given alphas, [B, a] each."""
    power_Ban = x_n ** -alpha_Ba[..., None]
    mean_Ba, loss_B1 = power_Ban.mean(axis=2), loss_Bn.mean(axis=1)[:, None]
    centred_Ban = power_Ban - mean_Ba[..., None]
    slope_Ba = (centred_Ban * loss_Bn[:, None]).sum(axis=2) / np.square(centred_Ban).sum(axis=2)
    scale_Ba = np.maximum(slope_Ba, 0.0)
    floor_Ba = loss_B1 - scale_Ba * mean_Ba
    # A floor below 0 is held at 0, and A is solved for alone.
    alone_Ba = (power_Ban * loss_Bn[:, None]).sum(axis=2) / np.square(power_Ban).sum(axis=2)
    scale_Ba = np.where(floor_Ba < 0, np.maximum(alone_Ba, 0.0), scale_Ba)
    floor_Ba = np.maximum(floor_Ba, 0.0)
    residual_Ban = floor_Ba[..., None] + scale_Ba[..., None] * power_Ban - loss_Bn[:, None]
    return floor_Ba, scale_Ba, np.square(residual_Ban).sum(axis=2)


def _interval(values_B: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(values_B, [0.025, 0.975])
    return Interval(float(low), float(high))


def _range(values: Sequence[float]) -> Interval | None:
    return Interval(min(values), max(values)) if values else None
