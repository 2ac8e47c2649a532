"""`loss_weighting:` of a policy document: how much each sample counts, from its loss, while the policy is in force.

What the keys mean is computed in `weighting.py`; this page is data, so that whoever reads a journal needs no torch.
"""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mixwright.data_mixing.config_file import StrictModel

Temperature = Annotated[float, Field(gt=0, le=1e9)]


class TemperaturePoint(StrictModel):
    """Temperature `r` at `step` steps after the weighting began; between points log r is interpolated."""

    step: int = Field(ge=0, strict=True)
    r: Temperature


class LossWeighting(StrictModel):
    """Instance weights w_i ~ n_i exp(f(h_i) / r), sum 1 over the samples of the scope (docs/weighting.md).

    Sow et al., "Dynamic loss-based sample reweighting" (arXiv 2502.06733); spec/methods.md 2 and 19. `strategy` is f.
    `score: excess` takes the loss less the running mean of its domain. `rho` is the part of a sample's own loss in its
    score, beside its domain's mean. `quantiles` are the ends of the range that h scales to -1..1. `within: domain`
    scales and normalises inside each domain, so that a domain's part of the gradient stays its part of the tokens.
    `target_ess` chooses r so that the effective sample size is that part of the samples. In `warmup_steps` 1/r grows
    from 0. `range_memory`, `mean_memory`: steps over which lagged ranges and running means are averaged. `z_loss:
    tokens` keeps the z-loss a mean over tokens; with `weights` it is weighted like the loss.
    """

    strategy: Literal["uniform", "linupper", "quadratic", "extremes", "upper", "tilted"] = "linupper"
    scope: Literal["micro_step", "step_deferred", "step_two_phase"] = "step_deferred"
    sample: Literal["row", "document"] = "row"
    score: Literal["loss", "excess"] = "loss"
    within: Literal["batch", "domain"] = "batch"
    r: Temperature | tuple[TemperaturePoint, ...] = 1.0
    target_ess: float | None = Field(default=None, gt=0, lt=1)
    warmup_steps: int = Field(default=0, ge=0, strict=True)
    quantiles: tuple[float, float] = (0.0, 1.0)
    rho: float = Field(default=1.0, ge=0, le=1)
    range_memory: float = Field(default=4.0, ge=1)
    mean_memory: float = Field(default=100.0, ge=1)
    z_loss: Literal["weights", "tokens"] = "weights"

    @model_validator(mode="after")
    def _consistent(self) -> LossWeighting:
        low, high = self.quantiles
        if not 0 <= low < high <= 1:
            raise ValueError(f"quantiles: expected 0 <= low < high <= 1, found {low:g} and {high:g}")
        if isinstance(self.r, tuple):
            steps = [point.step for point in self.r]
            if not steps or any(a >= b for a, b in itertools.pairwise(steps)):
                raise ValueError(f"r: expected points with increasing steps, found steps {steps}")
        if self.target_ess is not None and "r" in self.model_fields_set:
            raise ValueError("r and target_ess both choose the temperature; give one of them")
        if self.z_loss == "tokens" and self.scope == "step_deferred":
            raise ValueError("z_loss: tokens needs scope micro_step or step_two_phase, found step_deferred")
        return self

    @property
    def is_uniform(self) -> bool:
        """No sample counts more than another."""
        return self.strategy == "uniform"

    def inverse_temperature(self, age: int) -> float:
        """1 / r at `age` steps after the weighting began; what `target_ess` finds takes its place there."""
        ramp = min(1.0, age / self.warmup_steps) if self.warmup_steps else 1.0
        return ramp / self._temperature(age)

    def _temperature(self, age: int) -> float:
        if not isinstance(self.r, tuple):
            return self.r
        points = self.r
        if age <= points[0].step:
            return points[0].r
        for left, right in itertools.pairwise(points):
            if age < right.step:
                part = (age - left.step) / (right.step - left.step)
                return math.exp((1 - part) * math.log(left.r) + part * math.log(right.r))
        return points[-1].r
