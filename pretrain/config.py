"""The configuration of a pretraining run: what a YAML file in `configs/` may say, and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mixwright.data_mixing.config_file import StrictModel, load_config, read_yaml
from mixwright.data_mixing.errors import ConfigError, nearest
from mixwright.data_mixing.service import listen_address
from mixwright.pretrain.model_options.config import ModelOptions

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]

OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "training.rows_per_step",
    "train_micro_batch_size_per_gpu": "training.micro_batch_rows",
    "gradient_accumulation_steps": "training.rows_per_step and training.micro_batch_rows",
    "gradient_clipping": "training.clip_norm",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
}
"""DeepSpeed settings that have one place already, and where."""


class RunConfig(StrictModel):
    """Name, home and seeds of the run; everything that it writes is below `folder`/`name`.

    `seed` decides the order of the data and dropout, and the initial parameters unless `init_seed` does.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}$")
    folder: Path = Path("runs")
    seed: int = Field(default=0, ge=0, lt=1 << 62)
    init_seed: int | None = Field(default=None, ge=0, lt=1 << 62)

    @property
    def seed_of_parameters(self) -> int:
        """The seed of the initial parameters."""
        return self.seed if self.init_seed is None else self.init_seed


class DataConfig(StrictModel):
    """The token store to read. `prepare` names the configuration that makes it when it is not there yet."""

    store: Path
    prepare: Path | None = None


class ModelConfig(StrictModel):
    """Any `transformers` causal language model: a new one from `config`, or the checkpoint at `path`.

    `config` is passed to `AutoConfig.for_model` (it must hold `model_type`); the store's vocabulary size is
    filled in when `vocab_size` is not given. `document_masks` keeps the documents of a row apart.
    """

    config: dict[str, Any] | None = None
    path: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    document_masks: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.config is None) == (self.path is None):
            raise ValueError("exactly one of `config` (a new model) and `path` (a checkpoint) must be given")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("`config` needs a `model_type`, e.g. llama or gpt2")
        return self


class OptimizerConfig(StrictModel):
    """AdamW; decay applies to matrices only (parameters with two or more dimensions), never to norms and biases."""

    lr: float = Field(gt=0)
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)


class ScheduleConfig(StrictModel):
    """Learning rate over steps: warm-up, then cosine to `final_ratio`, or stable then a linear decay (WSD)."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    decay_steps: int = Field(default=0, ge=0, description="length of the final decay, wsd only")
    final_ratio: Share = 0.1

    @model_validator(mode="after")
    def _decay_is_for_wsd(self) -> ScheduleConfig:
        if (self.kind == "wsd") != (self.decay_steps > 0):
            raise ValueError("decay_steps > 0 goes with kind: wsd, and only with it")
        return self


class DropoutPoint(StrictModel):
    """Dropout probability from `step` on."""

    step: int = Field(ge=0)
    p: float = Field(ge=0, lt=1)


class TrainingConfig(StrictModel):
    """Shape of the run. `rows_per_step` is the global batch: it does not change with the number of ranks.

    `zero_stage` 0 with bfloat16 runs as ZeRO 1 (see engine.py).
    `z_loss` is the coefficient of PaLM's `lse**2` term, averaged over tokens. `dropout` is a step function of
    the optimizer step; empty leaves the model's own setting.
    """

    num_steps: Positive
    rows_per_step: Positive
    micro_batch_rows: Positive
    clip_norm: float = Field(default=1.0, ge=0)
    zero_stage: Literal[0, 1, 2, 3] = 0
    z_loss: float = Field(default=0.0, ge=0)
    dropout: tuple[DropoutPoint, ...] = ()
    num_threads: int | None = Field(default=None, gt=0, description="CPU threads per rank")

    @field_validator("dropout")
    @classmethod
    def _ordered(cls, points: tuple[DropoutPoint, ...]) -> tuple[DropoutPoint, ...]:
        if any(a.step >= b.step for a, b in itertools.pairwise(points)):
            raise ValueError("dropout points must have increasing steps")
        return points


class MixingConfig(StrictModel):
    """What is read at first, how ranks follow changes, and the service that takes changes.

    `policy` is a policy document or the path of one. A policy becomes effective at least `lead_steps` after it
    is seen. `service`: `auto` trains on without a controller when Ray cannot start, `required` stops instead
    (exit code 3), `none` starts none. `feed: actor` reads rows through the Ray cluster, on nodes without the store;
    rows that do not come within `feed_timeout_s` end the job (exit code 3). `metrics: [HOST:]PORT` makes the service
    answer Prometheus there.
    """

    policy: Path | dict[str, Any]
    prefetch_steps: int = Field(default=4, ge=1, le=1024)
    lead_steps: int = Field(default=8, ge=2)
    report_every: Positive = 10
    service: Literal["auto", "required", "none"] = "auto"
    address: str | None = Field(default=None, description="a Ray cluster; None: RAY_ADDRESS, else a local Ray")
    service_timeout_s: float = Field(default=60.0, gt=0)
    metrics: str | None = None
    feed: Literal["local", "actor"] = "local"
    feed_timeout_s: float = Field(default=60.0, gt=0)

    @field_validator("metrics")
    @classmethod
    def _is_listen_address(cls, metrics: str | None) -> str | None:
        if metrics is not None:
            listen_address(metrics)
        return metrics

    @model_validator(mode="after")
    def _lead_covers_prefetch(self) -> MixingConfig:
        if self.lead_steps < self.prefetch_steps + 3:
            raise ValueError(
                f"lead_steps must be at least prefetch_steps + 3 = {self.prefetch_steps + 3}, so that no rank has "
                f"already prepared a batch that a new policy changes; found {self.lead_steps}"
            )
        return self


class EvaluationConfig(StrictModel):
    """Per-domain cross-entropy on `rows_per_domain` fixed held-out rows, every `every` steps (0: never)."""

    every: int = Field(default=0, ge=0)
    rows_per_domain: Positive = 32
    test_rows_per_domain: Positive = 64


class CheckpointConfig(StrictModel):
    """A checkpoint every `every` steps and at the end; the newest `keep` stay on disk."""

    every: Positive = 500
    keep: Positive = 2


class WandbConfig(StrictModel):
    """Weights & Biases. Its key is no setting: it comes from WANDB_API_KEY or `wandb login`.

    `mode: offline` writes to the run folder alone, for `wandb sync` later.
    """

    project: str = Field(min_length=1)
    entity: str | None = None
    mode: Literal["offline", "online"] = "online"


class MetricsConfig(StrictModel):
    """Where figures go besides the console; `metrics.jsonl` is always written.

    `row_log` keeps loss and weight of every row that is trained on, for `mixwright mix hard-samples`.
    """

    tensorboard: bool = True
    wandb: WandbConfig | None = None
    row_log: bool = False


class DistillationConfig(StrictModel):
    """What the student learns beside the text: `(1 - share) * CE + share * temperature**2 * KL(teachers || student)`.

    `teachers` are run folders or exports; their predictions are pooled: mean logits, or `arithmetic` means.
    `teacher_temperature` divides the teachers' logits alone, `temperature` those of both. `cache` is a folder that
    `mixwright distill prepare` made of the same teachers, which are then not run.
    """

    teachers: tuple[Path, ...] = Field(min_length=1)
    share: float = Field(default=0.5, gt=0, le=1)
    pooling: Literal["logits", "arithmetic"] = "logits"
    teacher_temperature: float = Field(default=1.0, gt=0)
    temperature: float = Field(default=1.0, gt=0)
    cache: Path | None = None

    @model_validator(mode="after")
    def _cached_at_one_temperature(self) -> DistillationConfig:
        if self.cache is not None and self.temperature != 1:
            raise ValueError("a cache holds predictions at temperature 1: leave `temperature` out, or `cache`")
        return self


def refuse_owned_settings(settings: dict[str, Any], owners: Mapping[str, str]) -> dict[str, Any]:
    """`settings` for DeepSpeed; raises ValueError for a key that has its place elsewhere, saying where."""
    for key in settings:
        if key in owners:
            raise ValueError(f"{key!r} is set by {owners[key]}, not here")
    if "stage" in settings.get("zero_optimization", {}):
        raise ValueError("'zero_optimization.stage' is set by training.zero_stage, not here")
    return settings


class PretrainConfig(StrictModel):
    """A pretraining run, whole. `deepspeed` holds further DeepSpeed settings, passed through as they are."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    options: ModelOptions = ModelOptions()
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig
    distillation: DistillationConfig | None = None
    mixing: MixingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    deepspeed: dict[str, Any] = Field(default_factory=dict)

    @field_validator("deepspeed")
    @classmethod
    def _not_owned(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return refuse_owned_settings(settings, OWNED_DEEPSPEED_KEYS)

    @model_validator(mode="after")
    def _schedule_fits(self) -> PretrainConfig:
        if self.schedule.warmup_steps + self.schedule.decay_steps > self.training.num_steps:
            raise ValueError(
                f"schedule.warmup_steps + schedule.decay_steps = "
                f"{self.schedule.warmup_steps + self.schedule.decay_steps} exceeds "
                f"training.num_steps = {self.training.num_steps}"
            )
        return self

    @model_validator(mode="after")
    def _distils_plainly(self) -> PretrainConfig:
        if self.distillation is not None and self.training.z_loss:
            raise ValueError("training.z_loss must be 0 with `distillation`: the teachers bound the logits already")
        return self

    @model_validator(mode="after")
    def _options_fit(self) -> PretrainConfig:
        self.options.check_fit(
            is_new_model=self.model.config is not None,
            zero_stage=self.training.zero_stage,
            gradient_checkpointing=self.model.gradient_checkpointing,
            num_steps=self.training.num_steps,
            drops_already=bool(self.training.dropout),
        )
        return self

    @property
    def run_dir(self) -> Path:
        return self.run.folder / self.run.name


def load_pretrain_config(path: Path, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Read a run's configuration; other configuration files that it names are relative to its own folder.

    Raises ConfigError.
    """
    config = load_config(PretrainConfig, path, overrides)
    changes: dict[str, Any] = {}
    if config.data.prepare is not None:
        prepare = _existing(path.parent / config.data.prepare, "data.prepare")
        changes["data"] = config.data.model_copy(update={"prepare": prepare})
    if isinstance(config.mixing.policy, Path):
        policy = read_yaml(_existing(path.parent / config.mixing.policy, "mixing.policy"))
        changes["mixing"] = config.mixing.model_copy(update={"policy": policy})
    return config.model_copy(update=changes)


def _existing(path: Path, key: str) -> Path:
    try:
        is_there = path.is_file()
    except OSError as error:  # a name that no file can have
        raise ConfigError(f"{key}: {path.name[:80]}...: {error.strerror}") from None
    if not is_there:
        siblings = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        hint = nearest(path.name, siblings) if siblings else ""
        raise ConfigError(f"{key}: no such file {path}{hint}")
    return path
