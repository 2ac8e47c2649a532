"""The stages that can be sent to a cluster: how each is configured, and what its ranks do.

A stage is a row of a table. What its phases do is imported when they run: torch and deepspeed take seconds, and the
machine that submits needs neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mixwright.data_mixing.config_file import StrictModel
from mixwright.launch.console import RunConsole
from mixwright.pretrain.config import PretrainConfig, load_pretrain_config
from mixwright.pretrain.distill.config import DistillConfig, load_distill_config
from mixwright.pretrain.rpo.config import RpoConfig, load_rpo_config

StageName = Literal["rpo", "pretrain", "distill"]


class StudentConfig(StrictModel):
    """A distillation with the run of its student, which is a file of its own for people."""

    distillation: DistillConfig
    run: PretrainConfig


@dataclass(frozen=True)
class Phase:
    """A part of a stage; returns an exit code. `alone`: on one rank, whatever the number of ranks."""

    name: str
    perform: Callable[[Any, RunConsole], int]
    alone: bool = False


@dataclass(frozen=True)
class Stage:
    """`load` reads what a user wrote, `model` what a manifest holds; `names_or_paths` are keys that may be either."""

    model: type[StrictModel]
    load: Callable[[Path, Sequence[str]], StrictModel]
    run_dir: Callable[[Any], Path]
    phases: tuple[Phase, ...]
    names_or_paths: tuple[str, ...]

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)


def _pretrain(config: PretrainConfig, console: RunConsole) -> int:
    from mixwright.pretrain.job import run_job

    return run_job(config, console)


def _rpo(config: RpoConfig, console: RunConsole) -> int:
    from mixwright.pretrain.rpo.job import run_rpo

    return run_rpo(config, console)


def _load_student(path: Path, overrides: Sequence[str]) -> StudentConfig:
    distillation, run = load_distill_config(path, overrides)
    return StudentConfig(distillation=distillation, run=run)


def _prepare_student(config: StudentConfig, console: RunConsole) -> int:
    from mixwright.launch.distill_commands import prepare_run

    prepare_run(config.distillation, config.run, console)
    return 0


def _train_student(config: StudentConfig, console: RunConsole) -> int:
    from mixwright.launch.distill_commands import prepared_student

    to_prepare = "another job prepared there; give each a `folder` of its own and submit this one"
    return _pretrain(prepared_student(config.distillation, config.run, to_prepare), console)


STAGES: dict[StageName, Stage] = {
    "rpo": Stage(
        RpoConfig,
        load_rpo_config,
        lambda config: config.run_dir,
        (Phase("train", _rpo),),
        ("model.path", "data.train", "data.evaluation"),
    ),
    "pretrain": Stage(
        PretrainConfig,
        load_pretrain_config,
        lambda config: config.run_dir,
        (Phase("train", _pretrain),),
        ("model.path",),
    ),
    "distill": Stage(
        StudentConfig,
        _load_student,
        lambda config: config.run.run_dir,
        (Phase("prepare", _prepare_student, alone=True), Phase("train", _train_student)),
        ("run.model.path",),
    ),
}
