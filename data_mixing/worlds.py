"""Synthetic worlds: training without a model, whose best mixture is known.

Two laws. In both the validation loss of each of K domains depends on the mixture p and the learning rate r (mean 1):

    linear   L_i falls per step by  r_t (c_i(t) + sum_j A_ij(t) p_j)        the law behind Aioli; A may drift
    power    L_i = E_i + B_i (1 + n_i / S)^-alpha,  n_i = sum_t r_t sum_j M_ij p_j
             effective steps of domain i: what helps is worth less the more of it was read, as in real training

Optimum. Linear: the best mixture of a step is the domain with the largest column sum; the best fixed mixture is that of
the summed columns. Power: the final loss is convex in n, so a fixed mixture is optimal; it is found by Frank-Wolfe.

Everything is drawn from a keyed generator: the same world and seed give the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mixwright.data_mixing.config_file import StrictModel
from mixwright.data_mixing.permutation import mix_key

Floats = NDArray[np.float64]

_OPTIMISER_STEPS = 400
_WORLD, _NOISE = range(2)


class World(StrictModel):
    """What a world is like; each seed draws another one of its kind.

    Losses are in nats. gain: mean fall of the mean loss in the whole run that a domain's own share brings. spread: how
    much domains differ (standard deviation of the log). transfer: gain on other domains, relative to that on itself.
    common: fall that every mixture has, early more than late. drift: how far column gains swing during the run,
    relative to gain, with `swings` periods. garbage: domains of random tokens that help nobody and cannot be learned.
    validation_noise: standard deviation of a measured loss; walk_noise: of what one step adds to the true loss.
    """

    law: Literal["linear", "power"] = "linear"
    num_domains: int = Field(default=3, ge=1, le=64)
    num_steps: int = Field(default=4000, ge=1)
    rows_per_step: int = Field(default=32, ge=1)
    start_loss: float = Field(default=8.0, gt=0)
    gain: float = Field(default=2.0, ge=0)
    spread: float = Field(default=0.5, ge=0)
    transfer: float = Field(default=0.3, ge=0)
    common: float = Field(default=2.0, ge=0)
    drift: float = Field(default=0.0, ge=0)
    swings: float = Field(default=1.0, gt=0)
    garbage: int = Field(default=0, ge=0)
    exponent: float = Field(default=0.5, gt=0)
    validation_noise: float = Field(default=0.0, ge=0)
    walk_noise: float = Field(default=0.0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"


@dataclass(frozen=True, eq=False)
class Scene:
    """A world of one seed, ready to run. T steps, K domains.

    fall_TKK: cumulative r_t A_ij(t) before step t (linear), or r_t M_ij (power). common_TK: cumulative r_t c_i(t), and
    the random walk of the losses. noise_TK: error of a validation before step t. Noise depends on seed and step alone,
    so that policies are compared under the same luck.
    """

    world: World
    seed: int
    rate_T: Floats
    fall_TKK: Floats
    common_TK: Floats
    noise_TK: Floats
    floor_K: Floats
    height_K: Floats
    scale: float
    is_garbage_K: NDArray[np.bool_]

    def loss(self, fallen_K: Floats, step: int) -> Floats:
        """True validation losses [K] before `step`; `fallen_K` is the sum over steps of (row of A or M) . p."""
        common_K = self.common_TK[step]
        if self.world.law == "linear":
            return np.asarray(self.height_K - common_K - fallen_K, dtype=np.float64)
        curve_K = np.power(1 + np.maximum(fallen_K, 0.0) / self.scale, -self.world.exponent)
        return np.asarray(self.floor_K - common_K + self.height_K * curve_K, dtype=np.float64)

    def fallen(self, first_step: int, end_step: int, share_K: Floats) -> Floats:
        """What steps [first_step, end_step) with mixture `share_K` add to `fallen_K`."""
        return np.asarray((self.fall_TKK[end_step] - self.fall_TKK[first_step]) @ share_K, dtype=np.float64)

    def best_fixed(self) -> tuple[Floats, float]:
        """The best mixture for the whole run, and its mean loss at the end."""
        num_steps, num_domains = self.world.num_steps, self.world.num_domains
        if self.world.law == "power":
            share_K = self._best_of_power()
        else:
            share_K = np.eye(num_domains)[int(self.fall_TKK[num_steps].sum(axis=0).argmax())]
        return share_K, self._final_loss(self.fallen(0, num_steps, share_K))

    def best_dynamic(self) -> float:
        """Mean loss at the end when every step reads the mixture that is best for it."""
        if self.world.law == "power":
            return self.best_fixed()[1]
        falls_TKK = np.diff(self.fall_TKK, axis=0)
        best_T = falls_TKK.sum(axis=1).argmax(axis=1)
        fallen_K = falls_TKK[np.arange(len(best_T)), :, best_T].sum(axis=0)
        return self._final_loss(fallen_K)

    def regret(self, loss_K: Floats) -> float:
        """How far the mean of the losses at the end is above `best_dynamic`, in nats."""
        return float(loss_K.mean()) - self._best

    @cached_property
    def _best(self) -> float:
        return self.best_dynamic()

    def _final_loss(self, fallen_K: Floats) -> float:
        return float(self.loss(fallen_K, self.world.num_steps).mean())

    def _best_of_power(self) -> Floats:
        total_KK = self.fall_TKK[self.world.num_steps]
        share_K = np.full(self.world.num_domains, 1 / self.world.num_domains)
        for _ in range(_OPTIMISER_STEPS):
            slope_K = self.height_K * np.power(1 + total_KK @ share_K / self.scale, -self.world.exponent - 1)
            gain_K = slope_K @ total_KK
            share_K = share_K * np.sqrt(gain_K / (share_K @ gain_K))
            share_K = share_K / share_K.sum()
        return share_K


def build(world: World, seed: int) -> Scene:
    """The scene of `seed`. Column gains differ by domain, so that some mixture is better than uniform."""
    draw = np.random.Generator(np.random.PCG64(mix_key(_WORLD, seed)))
    num_domains, num_steps = world.num_domains, world.num_steps
    is_garbage_K = np.arange(num_domains) >= num_domains - world.garbage
    transfer_KK = np.eye(num_domains) + world.transfer * draw.uniform(0, 2, (num_domains, num_domains)) * (
        1 - np.eye(num_domains)
    )
    own_K = np.exp(world.spread * draw.standard_normal(num_domains) - world.spread**2 / 2)
    gain_KK = transfer_KK * own_K * np.where(is_garbage_K, 0.0, 1.0)[:, None] * np.where(is_garbage_K, 0.0, 1.0)
    rate_T = _rates(world)
    time_T = (np.arange(num_steps) + 0.5) / num_steps
    phase_K = draw.uniform(0, 2 * math.pi, num_domains)
    swing_TK = 1 + world.drift * np.sin(2 * math.pi * world.swings * time_T[:, None] + phase_K)
    height_K = world.start_loss + 0.5 * draw.standard_normal(num_domains)
    common_T = np.exp(-4 * time_T) * 4 / (1 - math.exp(-4)) * world.common
    if world.law == "linear":
        step_TKK = rate_T[:, None, None] * gain_KK * swing_TK[:, None, :] * (world.gain / num_steps)
    else:
        step_TKK = rate_T[:, None, None] * gain_KK * swing_TK[:, None, :]
    is_learned_K = np.where(is_garbage_K, 0.0, 1.0)
    common_TK = np.concatenate([[0.0], np.cumsum(rate_T * common_T / num_steps)])[:, None] * is_learned_K
    noise = np.random.Generator(np.random.PCG64(mix_key(_NOISE, seed)))
    walk_TK = world.walk_noise * np.cumsum(noise.standard_normal((num_steps + 1, num_domains)), axis=0)
    return Scene(
        world=world,
        seed=seed,
        rate_T=rate_T,
        fall_TKK=np.concatenate([np.zeros((1, num_domains, num_domains)), np.cumsum(step_TKK, axis=0)]),
        common_TK=common_TK + walk_TK,
        noise_TK=world.validation_noise * noise.standard_normal((num_steps + 1, num_domains)),
        floor_K=height_K - world.gain * is_learned_K,
        height_K=height_K if world.law == "linear" else world.gain * is_learned_K,
        scale=num_steps / 20 / num_domains,
        is_garbage_K=is_garbage_K,
    )


def _rates(world: World) -> Floats:
    """Learning rate of each step with mean 1: constant, or 5 % warm-up and a cosine to a tenth."""
    if world.schedule == "constant":
        return np.ones(world.num_steps)
    time_T = (np.arange(world.num_steps) + 0.5) / world.num_steps
    rate_T = np.minimum(time_T / 0.05, 0.55 + 0.45 * np.cos(math.pi * time_T))
    return np.asarray(rate_T / rate_T.mean(), dtype=np.float64)
