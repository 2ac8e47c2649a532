"""`schedule`: mixtures at absolute training steps, and how to get from one to the next.

A ramp is compiled to at most MAX_RAMP_SEGMENTS stretches of constant mixture. Each has the mixture of its middle, so
that a linear ramp reads the same tokens of every domain as the straight line does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from mixwright.data_mixing.config_file import StrictModel
from mixwright.data_mixing.entries import Genesis, Segment
from mixwright.data_mixing.errors import PolicyRejected
from mixwright.data_mixing.mixture import Mixture, segments, shares
from mixwright.data_mixing.policy import PolicyDocument

MAX_RAMP_SEGMENTS = 64
MAX_POINTS = 256

Ramp = Literal["hold", "linear", "cosine"]


class Point(StrictModel):
    """From `step` on: `mixture`. `ramp` says how to get here from the previous point's mixture."""

    step: int = Field(ge=0, strict=True)
    mixture: Mixture
    ramp: Ramp = "hold"


class Document(PolicyDocument):
    """`points` in order of step. Before the first point the first mixture holds, after the last one the last."""

    kind: Literal["schedule"]
    points: tuple[Point, ...] = Field(max_length=MAX_POINTS)

    @field_validator("points")
    @classmethod
    def _in_order(cls, points: tuple[Point, ...]) -> tuple[Point, ...]:
        if not points:
            raise ValueError("expected at least one point, found an empty list")
        for earlier, later in itertools.pairwise(points):
            if earlier.step >= later.step:
                raise ValueError(f"steps must increase, found {later.step} after {earlier.step}")
        if points[0].ramp != "hold":
            raise ValueError(f"the first point has none before it to start a {points[0].ramp} ramp from")
        return points


def compile_program(document: Document, genesis: Genesis) -> tuple[Segment, ...]:
    """Segments from step 0 on. Raises PolicyRejected."""
    last_step = document.points[-1].step
    if last_step > genesis.num_steps:
        raise PolicyRejected(
            f"points.{len(document.points) - 1}.step: step {last_step} is beyond the run's {genesis.num_steps} steps"
        )
    share_PG = [
        shares(point.mixture, genesis.domains, f"points.{index}.mixture") for index, point in enumerate(document.points)
    ]
    return segments(_stretches(document.points, share_PG))


def _stretches(
    points: tuple[Point, ...], share_PG: list[NDArray[np.float64]]
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """(start step, shares [G]) of every stretch of constant mixture."""
    yield 0, share_PG[0]
    for index, (here, there) in enumerate(itertools.pairwise(points)):
        if there.ramp != "hold":
            for start_step, progress in ramp(here.step, there.step, there.ramp):
                yield start_step, (1 - progress) * share_PG[index] + progress * share_PG[index + 1]
        yield there.step, share_PG[index + 1]


def ramp(first_step: int, end_step: int, kind: Ramp) -> Iterator[tuple[int, float]]:
    """(start step, progress in (0, 1)) of the stretches that a ramp over [first_step, end_step) is made of."""
    num_steps = end_step - first_step
    num_stretches = min(num_steps, MAX_RAMP_SEGMENTS)
    bounds = [first_step + num_steps * index // num_stretches for index in range(num_stretches + 1)]
    for start, end in itertools.pairwise(bounds):
        fraction = ((start + end) / 2 - first_step) / num_steps
        yield start, (1 - math.cos(math.pi * fraction)) / 2 if kind == "cosine" else fraction
