"""BackSlash: weights are pulled to 0 as fast as their own distribution makes bits dear, and stay there.

    R = (1/n) sum_j (|theta_j| + epsilon)**nu,  lambda = strength * n
    theta <- sign(theta) max(|theta| - lr lambda dR/d|theta|, 0)
    lr lambda dR/d|theta| = lr strength nu (|theta| + epsilon)**(nu - 1)

nu is the shape of the generalised Gaussian with the weights' own moments, looked up anew at every step in a table of
rho(nu) = Gamma(1/nu) Gamma(3/nu) / Gamma(2/nu)**2 = E[theta**2] / E[|theta|]**2; nothing is remembered between steps.
Against the authors' code: times the learning rate, proportional to the number of values, proximal, matrices only.
Source: spec/methods.md 14.2.

It runs right after the optimizer's own update, on the values that the optimizer updates: DeepSpeed's float32 masters,
in ZeRO 1 and 2 a flat slice of them per rank. So sums go over ranks there, and the model's copy follows by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mixwright.pretrain.model_options.config import BackSlash

SHAPES = tuple(k / 100 for k in range(10, 301))


def moment_ratio(shape: float) -> float:
    """rho(nu): 2 for Laplace, pi/2 for Gaussian; nearly flat beyond, so that nu is uncertain there."""
    log_gamma = math.lgamma
    return math.exp(log_gamma(1 / shape) + log_gamma(3 / shape) - 2 * log_gamma(2 / shape))


class ShapeTable:
    """nu of the nearest rho in the table, without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._shapes_K = torch.tensor(SHAPES, dtype=torch.float64, device=device)
        self._ratios_K = torch.tensor([moment_ratio(s) for s in SHAPES], dtype=torch.float64, device=device)

    def shape(self, square_sum: Tensor, magnitude_sum: Tensor, num_values: int) -> Tensor:
        """nu from the sums over `num_values` values, float64 []; for weights that are all 0 it means nothing."""
        ratio = num_values * square_sum / magnitude_sum.square()
        return self._shapes_K[(self._ratios_K - ratio).abs().argmin()]


class Shrinking:
    """Shrinks `matrices` after every step of their optimizer; call it with the optimizer's own arguments."""

    def __init__(
        self, config: BackSlash, matrices: Iterable[Tensor], num_values: int, add_over_ranks: Callable[[Tensor], Tensor]
    ) -> None:
        """`matrices` may be slices, padded with zeros: `num_values` counts the real values on all ranks."""
        self._config, self._num_values, self._add = config, num_values, add_over_ranks
        self._matrices = {id(matrix): matrix for matrix in matrices}
        self._tables: dict[torch.device, ShapeTable] = {}

    @torch.no_grad()
    def __call__(self, optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            chosen = [parameter for parameter in group["params"] if id(parameter) in self._matrices]
            if chosen:
                shape = self.shape(chosen)
                for matrix in chosen:
                    shrink_(matrix, shape, group["lr"] * self._config.strength, self._config.epsilon)

    def shape(self, matrices: Iterable[Tensor]) -> Tensor:
        """nu of all matrices together, over ranks."""
        sums_M2 = torch.stack([_moment_sums(matrix) for matrix in matrices])
        square_sum, magnitude_sum = self._add(sums_M2.sum(0))
        table = self._tables.setdefault(sums_M2.device, ShapeTable(sums_M2.device))
        return table.shape(square_sum, magnitude_sum, self._num_values)


def shrink_(theta: Tensor, shape: Tensor, strength: float, epsilon: float) -> None:
    """Move |theta| towards 0 by strength * nu * (|theta| + epsilon)**(nu - 1), not beyond it; in place."""
    nu = shape.to(theta.dtype)
    magnitude = theta.abs()
    step = (magnitude + epsilon).pow_(nu - 1).mul_(strength * nu)
    theta.copy_(magnitude.sub_(step).clamp_(min=0).copysign_(theta))


def _moment_sums(theta: Tensor) -> Tensor:
    """[sum of squares, sum of magnitudes], float64."""
    return torch.stack([theta.square().sum(dtype=torch.float64), theta.abs().sum(dtype=torch.float64)])


def attach(
    config: BackSlash, optimizer: torch.optim.Optimizer, num_values: int, add_over_ranks: Callable[[Tensor], Tensor]
) -> Shrinking:
    """Shrink the first parameter group (the matrices) of `optimizer` after each of its steps."""
    shrinking = Shrinking(config, optimizer.param_groups[0]["params"], num_values, add_over_ranks)
    optimizer.register_step_post_hook(shrinking)
    return shrinking
