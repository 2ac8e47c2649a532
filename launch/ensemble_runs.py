"""Tuning and members as training runs: what `mixwright ensemble tune` and `train` do, and what studies call."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mixwright.data_mixing.config_file import StrictModel
from mixwright.data_mixing.errors import ConfigError
from mixwright.data_mixing.staging import atomic_file
from mixwright.launch.ray_tasks import TaskMap
from mixwright.launch.training_runs import Launch, RunResult, find_result, with_absolute_paths
from mixwright.pretrain.config import PretrainConfig
from mixwright.pretrain.ensemble.config import EnsembleConfig, Recipe, Runs
from mixwright.pretrain.ensemble.tune import Point, Tuning, descend, time_scale_of
from mixwright.pretrain.errors import EnsembleError

TUNING = "tuning.json"

Say = Callable[[str], None]
Perform = Callable[[Sequence[PretrainConfig]], list[RunResult]]
"""Performs runs, in whatever order and however many at a time; results in the order of the runs."""


class TunedPoint(StrictModel):
    """A recipe that was tried and its validation loss in nats per token, None when it diverged.

    `decay_time_epochs` is 1 / (lr * decay), None without decay.
    """

    recipe: Recipe
    loss: float | None
    decay_time_epochs: float | None
    folders: tuple[Path, ...]


class TuningRecord(StrictModel):
    """What `mixwright ensemble tune` found: all points in the order of their losses, the best one first.

    `is_optimal`: no neighbour on the grid is better, and all were tried. `neighbours` are these, with their axis and
    loss; `unmeasured` are the axes on which one was not tried. `edges` are the axes on which the best recipe is at the
    end of the grid.
    """

    points: tuple[TunedPoint, ...]
    is_optimal: bool
    neighbours: tuple[tuple[str, Recipe, float | None], ...]
    edges: tuple[str, ...]
    unmeasured: tuple[str, ...] = ()

    @property
    def best(self) -> TunedPoint:
        return self.points[0]


def performer(
    map_: TaskMap[Launch, RunResult], config: EnsembleConfig, say: Say, deadline: float | None = None
) -> Perform:
    """Performs runs through `map_` and tells of each; complete ones are read without a task."""

    def perform(runs: Sequence[PretrainConfig]) -> list[RunResult]:
        began = time.monotonic()
        runs = [with_absolute_paths(run) for run in runs]
        found = {run.run_dir: result for run in runs if (result := find_result(run)) is not None}
        waiting = {run.run_dir: Launch(run, config.resources) for run in runs if run.run_dir not in found}
        for done, (launch, result) in enumerate(map_(list(waiting.values()), deadline), start=1):
            found[launch.config.run_dir] = result
            elapsed = time.monotonic() - began
            left = elapsed / done * (len(waiting) - done)
            say(
                f"{done}/{len(waiting)} {describe(launch.config)}: validation {result.validation:.4f}, "
                f"test {result.test:.4f} ({elapsed / 60:.1f} min, about {left / 60:.1f} min left)"
            )
        return [found[run.run_dir] for run in runs]

    return perform


def describe(config: PretrainConfig) -> str:
    """A run in a few words."""
    optimizer, steps = config.optimizer, config.training.num_steps
    return (
        f"{config.run.name} (lr {optimizer.lr:g}, decay {optimizer.weight_decay:g}, {steps} steps, "
        f"seed {config.run.seed})"
    )


def tune(config: EnsembleConfig, runs: Runs, perform: Perform, say: Say) -> TuningRecord:
    """Descend from `config.recipe`; writes tuning.json. Finished runs are read again, whatever was interrupted."""
    grid, settings, folder = config.tune.grid, config.tune, config.folder / "tuning"

    def recipe_at(point: Point) -> Recipe:
        values = {axis: grid[axis][at] for axis, at in zip(grid, point, strict=True)}
        return config.recipe.model_copy(update=values)

    def runs_of(point: Point) -> list[PretrainConfig]:
        return [runs.keyed(recipe_at(point), folder, seed=seed) for seed in settings.seeds]

    def measure(points: Sequence[Point]) -> list[float]:
        results = perform([run for point in points for run in runs_of(point)])
        losses = np.array([result.validation for result in results]).reshape(len(points), -1)
        for point, loss in zip(points, losses.mean(axis=1), strict=True):
            say(f"  {_show(recipe_at(point))}: {loss:.4f}")
        return [float(loss) for loss in losses.mean(axis=1)]

    start = tuple(grid[axis].index(getattr(config.recipe, axis)) for axis in grid)
    found = descend(
        grid,
        start,
        measure,
        all_axes_at_once=settings.all_axes_at_once,
        max_points=max(settings.max_runs // len(settings.seeds), 1),
    )
    record = _record(found, runs, recipe_at, runs_of)
    config.folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(config.folder / TUNING) as file:
        file.write(record.model_dump_json(indent=1).encode())
    return record


def _record(
    found: Tuning, runs: Runs, recipe_at: Callable[[Point], Recipe], runs_of: Callable[[Point], list[PretrainConfig]]
) -> TuningRecord:
    def point_of(point: Point, loss: float) -> TunedPoint:
        recipe = recipe_at(point)
        time = time_scale_of(recipe.decay(runs.steps_per_epoch), recipe.lr, runs.steps_per_epoch)
        folders = tuple(run.run_dir for run in runs_of(point))
        return TunedPoint(recipe=recipe, loss=_finite(loss), decay_time_epochs=_finite(time), folders=folders)

    if not math.isfinite(found.loss):
        raise EnsembleError("every recipe that was tried diverged: begin with a lower recipe.lr")
    best_first = sorted(found.losses.items(), key=lambda item: item[1])
    around = tuple((n.axis, recipe_at(n.point), n.loss) for n in found.neighbours)
    return TuningRecord(
        points=tuple(point_of(point, loss) for point, loss in best_first),
        is_optimal=found.is_optimal,
        neighbours=tuple((axis, recipe, loss and _finite(loss)) for axis, recipe, loss in around),
        edges=found.edges,
        unmeasured=tuple(n.axis for n in found.neighbours if n.loss is None),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def read_tuning(config: EnsembleConfig) -> TuningRecord:
    """What `tune` wrote. Raises EnsembleError when it has not, ConfigError for a file that is none."""
    path = config.folder / TUNING
    if not path.is_file():
        raise EnsembleError(f"{path}: no such file: run `mixwright ensemble tune` first, or set members.recipe: given")
    try:
        return TuningRecord.model_validate_json(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path}: not the record of a tuning ({str(error).splitlines()[0]})") from None


def member_recipe(config: EnsembleConfig) -> Recipe:
    """The recipe of members: the tuned or the given one, with the factors applied."""
    recipe = read_tuning(config).best.recipe if config.members.recipe == "tuned" else config.recipe
    return recipe.scaled(config.members.epochs_factor, config.members.decay_factor)


def train_members(config: EnsembleConfig, runs: Runs, num_members: int, perform: Perform) -> list[RunResult]:
    """The members 0 .. num_members - 1, each a run with its own folder, journal and checkpoints."""
    recipe, folder = member_recipe(config), config.folder / "members"
    return perform([runs.member(recipe, folder, number, config.members) for number in range(num_members)])


def _show(recipe: Recipe) -> str:
    decay = (
        f"decay {recipe.weight_decay:g}"
        if recipe.weight_decay is not None
        else f"decay time {recipe.decay_time_epochs:g} epochs"
    )
    return f"lr {recipe.lr:g}, {decay}, {recipe.epochs:g} epochs"
