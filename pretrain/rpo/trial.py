"""A trial: one small preference optimisation of a study, whole in one call; its record is kept and read ever after."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from mixwright.data_mixing.config_file import StrictModel, validate
from mixwright.data_mixing.staging import atomic_file
from mixwright.pretrain.records import read_record
from mixwright.pretrain.rpo.config import ObjectiveConfig

CODE_VERSION = 1
"""Part of every trial's key: grows when a change of the code changes what a trial computes."""


class Trial(StrictModel):
    """What is learnt and by which seed; the kinds of trials add where. Equal trials find the same on one machine.

    The seed decides everything random: the world, its pairs, the reference, the order of training.
    """

    objective: ObjectiveConfig
    seed: int = Field(ge=0, lt=1 << 31)


class CurvePoint(StrictModel):
    """Figures of the policy after `step` optimizer steps, by name."""

    step: int
    figures: dict[str, float]


class TrialRecord(StrictModel):
    """What a trial found, with the settings that led to it."""

    key: str
    settings: dict[str, Any]
    seconds: float
    points: tuple[CurvePoint, ...] = Field(min_length=2)

    def curve(self, name: str) -> list[float]:
        """One figure at every point."""
        return [point.figures[name] for point in self.points]

    @property
    def steps(self) -> list[int]:
        return [point.step for point in self.points]


Kind = TypeVar("Kind", bound=Trial)


def trial_key(trial: Trial) -> str:
    """Names a trial by everything that decides its result: its kind, its settings, the code's version."""
    return content_key({"kind": type(trial).__name__, **_settings(trial)})


def content_key(content: Mapping[str, Any]) -> str:
    """A name for what is computed from `content` by this version of the code."""
    text = json.dumps({"version": CODE_VERSION, **content}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def find_record(trial: Trial, folder: Path) -> TrialRecord | None:
    """The record of a finished trial, None when there is none; raises ConfigError for a file that is none."""
    path = folder / f"{trial_key(trial)}.json"
    tree = read_record(path, "a trial")
    return None if tree is None else validate(TrialRecord, tree, str(path))


def perform(trial: Kind, folder: Path, run: Callable[[Kind], tuple[CurvePoint, ...]]) -> TrialRecord:
    """The record of `trial`: read from `folder` when it is there, else `run` and written."""
    found = find_record(trial, folder)
    if found is not None:
        return found
    began = time.perf_counter()
    points = run(trial)
    record = TrialRecord(
        key=trial_key(trial), settings=_settings(trial), seconds=time.perf_counter() - began, points=points
    )
    write_whole(folder / f"{record.key}.json", record.model_dump_json(indent=1).encode())
    return record


def write_whole(path: Path, content: bytes) -> None:
    """A file that is complete or absent. Two processes may find out the same: the last one's file stays."""
    own = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with atomic_file(own) as file:
        file.write(content)
    own.replace(path)


def log_steps(num_steps: int, num_points: int) -> list[int]:
    """0 and at most `num_points` further steps up to `num_steps`, evenly spaced in the logarithm."""
    spaced = (round(num_steps ** (number / (num_points - 1))) for number in range(num_points))
    return sorted({0, *spaced})


def _settings(trial: Trial) -> dict[str, Any]:
    """Settings that are not at their default: a new key of a configuration does not give old trials new names."""
    settings: dict[str, Any] = trial.model_dump(mode="json", exclude_defaults=True)
    return settings
