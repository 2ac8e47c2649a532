"""`mixwright distill`: what is made of teachers before a student's first step, all of it or part by part."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

if TYPE_CHECKING:
    from mixwright.launch.console import RunConsole
    from mixwright.pretrain.config import PretrainConfig

STUDENT = "student.yaml"
"""The student's run as it was prepared, below the distillation's folder."""

app = typer.Typer(
    help="Distil teachers into one student, from their logits, their samples, or both.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _distill() -> None:
    """Distil teachers into one student, from their logits, their samples, or both."""


@app.command()
def prepare(
    config: Annotated[Path, typer.Argument(help="a distillation, e.g. configs/distill.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="changes, as key.sub=value")] = None,
) -> None:
    """Fit the teachers' temperature, sample from them, cache their predictions; goes on where it was interrupted.

    The student is then trained by launch/distill.py, on any number of ranks.
    """
    from mixwright.launch.console import RunConsole

    prepare_from(config, overrides or [], RunConsole(quiet=False))


def prepare_from(path: Path, overrides: Sequence[str], console: RunConsole) -> PretrainConfig:
    """Everything before the student's first step; its run is also written as student.yaml."""
    from mixwright.data_mixing.staging import atomic_file
    from mixwright.pretrain.distill.config import load_distill_config
    from mixwright.pretrain.distill.pipeline import prepare_student
    from mixwright.pretrain.start import ensure_store

    config, base = load_distill_config(path, overrides)
    ensure_store(base, console)
    student = prepare_student(config, base, console.say, stage_progress(console.say))
    written = config.folder / STUDENT
    config.folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(written) as file:
        file.write(yaml.safe_dump(student.model_dump(mode="json"), sort_keys=False).encode())
    console.say(f"the student's run: {written} ({student.training.num_steps} steps)")
    return student


def stage_progress(say: Callable[[str], None], interval_s: float = 10.0) -> Callable[[str, int, int], None]:
    """Tells of a stage when it begins, now and then with the time that is left, and when it ends."""
    began: dict[str, tuple[float, int]] = {}
    told: dict[str, float] = {}

    def tell(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        start, at_start = began.setdefault(stage, (now, done))
        if done < total and now - told.get(stage, -interval_s) < interval_s:
            return
        told[stage] = now
        speed = (done - at_start) / (now - start) if now > start else 0.0
        left = f", about {(total - done) / speed / 60:.1f} min left" if speed and done < total else ""
        say(f"{stage}: {done:,} of {total:,} rows{left}")

    return tell
