"""Coordinate descent on a grid of recipes, ending in a certificate: no neighbour along any axis is better.

Source: "Pre-training under infinite compute" (arXiv 2509.14786), spec/methods.md 6.1. The certificate is of local
optimality on the grid; a point at the edge of the grid has no neighbour there, which the result says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Point = tuple[int, ...]
"""One index per axis of the grid."""

Measure = Callable[[Sequence[Point]], Sequence[float]]
"""Losses of points, in their order; infinite for a recipe that diverges."""


@dataclass(frozen=True)
class Neighbour:
    """The next recipe along `axis`; `loss` None: it was not measured."""

    axis: str
    point: Point
    loss: float | None


@dataclass(frozen=True)
class Tuning:
    """Where a descent stands. `is_optimal`: every neighbour was measured and none is better.

    `edges` are the axes on which `best` is the first or last value of the grid: beyond it nothing was tried.
    """

    best: Point
    loss: float
    neighbours: tuple[Neighbour, ...]
    edges: tuple[str, ...]
    losses: Mapping[Point, float] = field(default_factory=dict)

    @property
    def is_optimal(self) -> bool:
        return all(n.loss is not None and n.loss >= self.loss for n in self.neighbours)


def descend(
    grid: Mapping[str, Sequence[float]], start: Point, measure: Measure, *, all_axes_at_once: bool, max_points: int
) -> Tuning:
    """Move to the best neighbour while there is a better one; axis by axis, or along the best of all axes at once.

    One axis at a time measures two points together, all at once two for each axis: fewer runs against less waiting.
    Stops without a certificate when another batch would exceed `max_points` points.
    """
    axes = list(grid)
    groups = [axes] if all_axes_at_once else [[axis] for axis in axes]
    first = [start, *(point for axis in groups[0] for point in neighbours(grid, start, axis))][:max_points]
    losses = dict(zip(first, measure(first), strict=True))
    best, settled = start, 0
    while settled < len(groups):
        group = groups[settled]
        near = [point for axis in group for point in neighbours(grid, best, axis)]
        unknown = [point for point in near if point not in losses]
        if len(losses) + len(unknown) > max_points:
            break
        if unknown:
            losses.update(zip(unknown, measure(unknown), strict=True))
        candidate = min(near, key=losses.__getitem__, default=best)
        if losses[candidate] < losses[best]:
            best = candidate
            # What was settled before was settled elsewhere; the axis that moved stays first.
            groups = [*groups[settled:], *groups[:settled]]
            settled = 0
        else:
            settled += 1
    return certificate(grid, best, losses)


def certificate(grid: Mapping[str, Sequence[float]], best: Point, losses: Mapping[Point, float]) -> Tuning:
    """What is known about `best` and its neighbours."""
    around = tuple(Neighbour(axis, point, losses.get(point)) for axis in grid for point in neighbours(grid, best, axis))
    edges = tuple(
        axis for place, axis in enumerate(grid) if len(grid[axis]) > 1 and best[place] in (0, len(grid[axis]) - 1)
    )
    return Tuning(best, losses[best], around, edges, dict(losses))


def neighbours(grid: Mapping[str, Sequence[float]], point: Point, axis: str) -> list[Point]:
    """The points one step away along `axis`, the smaller first."""
    place = list(grid).index(axis)
    steps = [point[place] - 1, point[place] + 1]
    return [(*point[:place], at, *point[place + 1 :]) for at in steps if 0 <= at < len(grid[axis])]


def decay_of(time_scale_epochs: float, lr: float, steps_per_epoch: float) -> float:
    """Weight decay of AdamW whose averaging time 1 / (lr * decay) is so many epochs (spec/posttraining.md 3.4)."""
    return 1.0 / (lr * time_scale_epochs * steps_per_epoch)


def time_scale_of(weight_decay: float, lr: float, steps_per_epoch: float) -> float:
    """1 / (lr * decay) in epochs; infinite without decay."""
    return 1.0 / (lr * weight_decay * steps_per_epoch) if weight_decay else math.inf
