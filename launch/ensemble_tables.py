"""What a person sees of a tuning and of members."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mixwright.launch.console import RunConsole
from mixwright.launch.ensemble_runs import TUNING, TuningRecord
from mixwright.launch.training_runs import RunResult
from mixwright.pretrain.ensemble.config import EnsembleConfig

RECIPE_HEADER = ["lr", "decay", "epochs", "1/(lr decay) in epochs", "validation", "over the best"]


def show_tuning(record: TuningRecord, config: EnsembleConfig, console: RunConsole) -> None:
    """All recipes that were tried, and whether the best one is certified."""
    best = record.best.loss or math.nan
    rows = [
        [
            f"{point.recipe.lr:g}",
            "" if point.recipe.weight_decay is None else f"{point.recipe.weight_decay:g}",
            f"{point.recipe.epochs:g}",
            "" if point.decay_time_epochs is None else f"{point.decay_time_epochs:.2f}",
            "diverged" if point.loss is None else f"{point.loss:.4f}",
            "" if point.loss is None else f"{point.loss - best:+.4f}",
        ]
        for point in record.points
    ]
    console.table("recipes by validation loss (nats per token)", RECIPE_HEADER, rows)
    if record.is_optimal:
        console.say(f"certificate: none of the {len(record.neighbours)} neighbours on the grid is better")
    else:
        console.say(
            f"no certificate: tune.max_runs ended the descent; not measured along {', '.join(record.unmeasured)}"
        )
    if record.edges:
        console.say(f"at the edge of the grid: {', '.join(record.edges)}; a wider grid may hold a better recipe")
    console.say(f"written: {config.folder / TUNING}")


def show_members(results: Sequence[RunResult], console: RunConsole) -> None:
    """Members and their own losses."""
    rows = [
        [result.folder.name, f"{result.validation:.4f}", f"{result.test:.4f}", str(result.folder)] for result in results
    ]
    console.table("members (nats per token)", ["member", "validation", "test", "folder"], rows)
