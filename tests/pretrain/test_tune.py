"""Coordinate descent over recipes: where it ends, what it certifies, what it spends."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest

from mixwright.pretrain.ensemble.tune import Point, decay_of, descend, neighbours, time_scale_of

GRID = {"decay": (0.1, 0.4, 0.8, 1.6, 3.2), "epochs": (4.0, 8.0, 16.0), "lr": (1e-3, 3e-3, 1e-2)}


class Bowl:
    """Losses of a bowl whose lowest point is `bottom`; remembers what was measured."""

    def __init__(self, bottom: Point, diverged: Sequence[Point] = ()) -> None:
        self.bottom, self.diverged, self.batches = bottom, diverged, []  # type: ignore[var-annotated]

    def __call__(self, points: Sequence[Point]) -> list[float]:
        self.batches.append(list(points))
        return [math.inf if p in self.diverged else math.dist(p, self.bottom) ** 2 for p in points]

    @property
    def measured(self) -> list[Point]:
        return [point for batch in self.batches for point in batch]


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("start", [(0, 0, 0), (4, 2, 2), (2, 1, 1), (4, 0, 1)])
@pytest.mark.parametrize("bottom", [(2, 1, 1), (0, 2, 1), (4, 0, 2)])
def test_a_bowl_is_descended_to_its_bottom_with_a_certificate(start: Point, bottom: Point, at_once: bool) -> None:
    bowl = Bowl(bottom)
    found = descend(GRID, start, bowl, all_axes_at_once=at_once, max_points=100)
    assert found.best == bottom
    assert found.is_optimal
    assert len(bowl.measured) == len(set(bowl.measured))
    brute = min(itertools.product(*(range(len(values)) for values in GRID.values())), key=lambda p: bowl([p])[0])
    assert brute == found.best


def test_one_axis_at_a_time_measures_less_and_all_at_once_asks_less_often() -> None:
    one, all_ = Bowl((2, 1, 1)), Bowl((2, 1, 1))
    descend(GRID, (0, 0, 0), one, all_axes_at_once=False, max_points=100)
    descend(GRID, (0, 0, 0), all_, all_axes_at_once=True, max_points=100)
    assert len(one.measured) < len(all_.measured)
    assert max(map(len, one.batches)) <= 3
    assert len(all_.batches) < len(one.batches)


def test_the_certificate_names_every_neighbour_and_the_edges_of_the_grid() -> None:
    found = descend(GRID, (2, 1, 1), Bowl((0, 1, 1)), all_axes_at_once=False, max_points=100)
    assert [(n.axis, n.point) for n in found.neighbours] == [
        ("decay", (1, 1, 1)), ("epochs", (0, 0, 1)), ("epochs", (0, 2, 1)), ("lr", (0, 1, 0)), ("lr", (0, 1, 2)),
    ]  # fmt: skip
    assert [n.loss for n in found.neighbours] == [1, 1, 1, 1, 1]
    assert found.edges == ("decay",)


def test_without_enough_runs_there_is_no_certificate() -> None:
    bowl = Bowl((4, 2, 2))
    found = descend(GRID, (0, 0, 0), bowl, all_axes_at_once=False, max_points=4)
    assert not found.is_optimal
    assert len(bowl.measured) <= 4
    assert any(n.loss is None for n in found.neighbours)


def test_a_recipe_that_diverges_is_a_bad_neighbour_not_an_error() -> None:
    found = descend(GRID, (2, 1, 1), Bowl((2, 1, 1), diverged=[(2, 1, 2)]), all_axes_at_once=False, max_points=100)
    assert found.is_optimal
    assert next(n.loss for n in found.neighbours if n.point == (2, 1, 2)) == math.inf


def test_an_axis_of_one_value_is_held_and_is_no_edge() -> None:
    found = descend({**GRID, "decay": (0.1,)}, (0, 0, 0), Bowl((0, 1, 1)), all_axes_at_once=False, max_points=50)
    assert found.best == (0, 1, 1)
    assert found.edges == ()


def test_neighbours_end_at_the_grid() -> None:
    assert neighbours(GRID, (0, 1, 2), "decay") == [(1, 1, 2)]
    assert neighbours(GRID, (0, 1, 2), "epochs") == [(0, 0, 2), (0, 2, 2)]
    assert neighbours(GRID, (0, 1, 2), "lr") == [(0, 1, 1)]


def test_decay_and_its_time_scale_are_each_others_inverse() -> None:
    # The published 300 M recipe: 3e-3 and 1.6 average over 208 of 800 steps an epoch.
    assert time_scale_of(1.6, 3e-3, 800) == pytest.approx(0.26, abs=0.001)
    assert decay_of(time_scale_of(1.6, 3e-3, 800), 3e-3, 800) == pytest.approx(1.6)
    assert time_scale_of(0.0, 3e-3, 800) == math.inf
