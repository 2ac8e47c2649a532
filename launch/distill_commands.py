"""`mixwright distill`: what is made of teachers before a student's first step, all of it or part by part."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from mixwright.launch.help_text import examples
from mixwright.launch.json_output import print_json
from mixwright.launch.mix_options import AsJson

if TYPE_CHECKING:
    from mixwright.launch.console import RunConsole
    from mixwright.pretrain.config import PretrainConfig
    from mixwright.pretrain.distill.config import DistillConfig

STUDENT = "student.yaml"
"""The student's run as it was prepared, below the distillation's folder."""
SOURCE = "student.source.json"
"""What the student's run was made of, beside it; written last."""

app = typer.Typer(
    help="Distil teachers into one student, from their logits, their samples, or both.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _distill() -> None:
    """Distil teachers into one student, from their logits, their samples, or both."""


@app.command(
    epilog=examples(
        "mixwright distill prepare configs/ensemble/distill.yaml",
        "mixwright distill prepare configs/ensemble/distill.yaml logits.share=0.5 --json",
    )
)
def prepare(
    config: Annotated[Path, typer.Argument(help="a distillation, e.g. configs/ensemble/distill.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="changes, as key.sub=value")] = None,
    as_json: AsJson = False,
) -> None:
    """Fit the teachers' temperature, sample from them, cache their predictions; goes on where it was interrupted.

    The student is then trained by launch/distill.py, on any number of ranks.
    """
    from mixwright.launch.console import RunConsole

    student = prepare_from(config, overrides or [], RunConsole(quiet=False, to_stderr=as_json))
    if as_json:
        print_json({"run": student.run.name, "num_steps": student.training.num_steps, "config": student})


def prepare_from(path: Path, overrides: Sequence[str], console: RunConsole) -> PretrainConfig:
    """Everything before the student's first step; its run is also written as student.yaml."""
    from mixwright.pretrain.distill.config import load_distill_config

    return prepare_run(*load_distill_config(path, overrides), console)


def prepare_run(config: DistillConfig, base: PretrainConfig, console: RunConsole) -> PretrainConfig:
    """`prepare_from` a configuration that has been read."""
    from mixwright.data_mixing.staging import atomic_file
    from mixwright.pretrain.distill.pipeline import prepare_student
    from mixwright.pretrain.progress import stage_progress
    from mixwright.pretrain.start import ensure_store

    ensure_store(base, console)
    student = prepare_student(config, base, console.say, stage_progress(console.say))
    written, source = config.folder / STUDENT, config.folder / SOURCE
    source.unlink(missing_ok=True)
    with atomic_file(written) as file:
        file.write(yaml.safe_dump(student.model_dump(mode="json"), sort_keys=False).encode())
    with atomic_file(source) as file:
        file.write(json.dumps(_made_of(config, base), indent=1).encode())
    console.say(f"the student's run: {written} ({student.training.num_steps} steps)")
    return student


def prepared_student(config: DistillConfig, base: PretrainConfig, to_prepare: str) -> PretrainConfig:
    """The student's run as it was prepared before. Raises ConfigError when it was not, or from something else."""
    from mixwright.data_mixing.config_file import shown_differences
    from mixwright.data_mixing.errors import ConfigError
    from mixwright.data_mixing.plain_data import read_json_object
    from mixwright.pretrain.config import load_pretrain_config

    student = config.folder / STUDENT
    try:
        made_of = read_json_object(config.folder / SOURCE, strict=True)
    except (OSError, ValueError):
        raise ConfigError(f"{student}: not prepared, or not to the end: {to_prepare} before several ranks") from None
    differing = shown_differences(made_of, _made_of(config, base))
    if differing:
        raise ConfigError(f"{student}: was prepared from other settings ({differing}): {to_prepare} again")
    return load_pretrain_config(student)


def _made_of(config: DistillConfig, base: PretrainConfig) -> dict[str, Any]:
    """What decides the student's run, wherever the files are that say it."""
    return {
        "distillation": config.model_dump(mode="json", exclude={"run", "folder"}),
        "run": base.model_dump(mode="json", exclude={"data": {"prepare"}}),
    }
