"""What `mixwright distill` is told: a student's run, teachers, and which of their samples and logits it learns from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from mixwright.data_mixing.config_file import StrictModel, load_config
from mixwright.data_mixing.domain import check_domain_name
from mixwright.pretrain.config import Positive, PretrainConfig, load_pretrain_config


class SamplesConfig(StrictModel):
    """Rows sampled from the teachers and the share of the student's rows that are theirs; the rest is real text.

    `source`: `ensemble` samples from the pooled prediction of every token, `members` takes each row from one member.
    `temperature` divides logits that the teachers' own temperature has divided already.
    """

    num_rows: Positive
    share: float = Field(gt=0, lt=1)
    source: Literal["ensemble", "members"] = "ensemble"
    temperature: float = Field(default=1.0, gt=0)
    batch_rows: Positive = 64
    seed: int = Field(default=0, ge=0)
    domain: str = "synthetic"

    @model_validator(mode="after")
    def _named(self) -> SamplesConfig:
        check_domain_name(self.domain)
        return self


class LogitsConfig(StrictModel):
    """The student's loss: `(1 - share) * CE + share * temperature**2 * KL(teachers || student)`.

    `top_k` keeps that many predictions of each token on disk, and the mass of the others; None runs the teachers on
    every micro-batch. A cache pays where rows are read more than once or twice.
    """

    share: float = Field(default=0.9, gt=0, le=1)
    temperature: float = Field(default=1.0, gt=0)
    top_k: Positive | None = None

    @model_validator(mode="after")
    def _cached_at_one_temperature(self) -> LogitsConfig:
        if self.top_k is not None and self.temperature != 1:
            raise ValueError("a cache holds predictions at temperature 1: leave `temperature` out, or `top_k`")
        return self


class DistillConfig(StrictModel):
    """A distillation, whole. `run` is the student's run; its data, mixture and number of steps follow from the rest.

    `folder` holds what is made of the teachers: samples, the store with them, the cache. `teacher_temperature: fit`
    minimises the pooled loss on the validation split. `real_epochs` passes over the real text decide the number of
    steps, `real_epochs * rows / (rows_per_step * (1 - samples.share))`; None keeps the run's own. `policy` replaces the
    mixture of real domains by their sizes and the synthetic one by its share.
    """

    run: Path
    folder: Path
    teachers: tuple[Path, ...] = Field(min_length=1)
    pooling: Literal["logits", "arithmetic"] = "logits"
    teacher_temperature: float | Literal["fit"] = "fit"
    calibration_rows_per_domain: Positive = 256
    samples: SamplesConfig | None = None
    logits: LogitsConfig | None = None
    real_epochs: float | None = Field(default=None, gt=0)
    policy: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _learns_something(self) -> DistillConfig:
        if self.samples is None and self.logits is None:
            raise ValueError("give `samples`, `logits` or both: without them the student learns nothing from teachers")
        if isinstance(self.teacher_temperature, float | int) and self.teacher_temperature <= 0:
            raise ValueError("teacher_temperature must be positive, or `fit`")
        return self


def load_distill_config(path: Path, overrides: Sequence[str] = ()) -> tuple[DistillConfig, PretrainConfig]:
    """The distillation and its student's run, which is relative to the distillation's file. Raises ConfigError."""
    config = load_config(DistillConfig, path, overrides)
    return config, load_pretrain_config(path.parent / config.run)
