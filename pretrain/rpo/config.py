"""The configuration of a preference-optimisation run: what its YAML file may say, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mixwright.data_mixing.config_file import StrictModel, load_config
from mixwright.pretrain.config import (
    CheckpointConfig,
    OptimizerConfig,
    Positive,
    RunConfig,
    ScheduleConfig,
    Share,
    WandbConfig,
    refuse_owned_settings,
)

Loss = Literal["dpo", "ipo", "hinge", "robust", "auc", "ensloss"]
Reduction = Literal["seq_sum", "seq_mean", "token_mean"]
Layout = Literal["shared_prompt", "packed", "padded"]
Preset = Literal["liu2024", "liu2024_avg", "pang2024", "trl_rpo_alpha"]

OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "training.pairs_per_step",
    "train_micro_batch_size_per_gpu": "training.micro_batch_pairs",
    "gradient_accumulation_steps": "training.pairs_per_step and training.micro_batch_pairs",
    "gradient_clipping": "training.clip_norm",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
}
"""DeepSpeed settings that have one place already, and where."""


class ColumnsConfig(StrictModel):
    """Names of the columns. Texts, or lists of messages (`role`, `content`); for lists `prompt` may be null, then the
    messages that chosen and rejected begin with alike are the prompt."""

    prompt: str | None = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"


class PairDataConfig(StrictModel):
    """Preference pairs: JSONL (also .gz), Parquet, or a `datasets` path.

    `train` and `evaluation` name them; without `evaluation`, `held_out_pairs` of the training pairs are held out, whole
    prompts by their hash. Prompts longer than `max_prompt_tokens` lose their beginning (`keep_end`) or make the pair
    bad; completions that do not fit into `max_tokens` beside their prompt lose their end (`cut`), or make it bad. Bad
    pairs are dropped and counted, or end the command (`on_bad_pair`). `end` says whether completions end with the
    tokenizer's end of text. `folder` holds tokenised pairs and reference log-probabilities, in places named by what
    decides them (default: `preferences` in the run's folder).
    """

    train: str
    evaluation: str | None = None
    split: str = "train"
    evaluation_split: str = "test"
    columns: ColumnsConfig = ColumnsConfig()
    held_out_pairs: int = Field(default=0, ge=0)
    max_tokens: int = Field(default=1024, gt=1)
    max_prompt_tokens: int = Field(default=512, gt=0)
    long_prompt: Literal["keep_end", "bad"] = "keep_end"
    long_completion: Literal["cut", "bad"] = "cut"
    on_bad_pair: Literal["drop", "error"] = "drop"
    end: bool = True
    folder: Path | None = None

    @model_validator(mode="after")
    def _room_for_completions(self) -> PairDataConfig:
        if self.max_prompt_tokens >= self.max_tokens:
            raise ValueError(
                f"max_prompt_tokens = {self.max_prompt_tokens} leaves no room for a completion in "
                f"max_tokens = {self.max_tokens}"
            )
        if self.evaluation is not None and self.held_out_pairs:
            raise ValueError("give `evaluation` (pairs of their own) or `held_out_pairs`, not both")
        return self


class LoraConfig(StrictModel):
    """Train low-rank adapters only (needs `peft`); `target_modules` as peft understands them."""

    rank: Positive = 16
    alpha: float = Field(default=32.0, gt=0)
    dropout: Share = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"


class PolicyModelConfig(StrictModel):
    """The model to align: a Hugging Face folder or a run of ours; it is also the reference.

    `chat_template` is a Jinja file that replaces the tokenizer's.
    """

    path: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None
    chat_template: Path | None = None


class SftConfig(StrictModel):
    """The SFT term: `weight` times the negative log-likelihood of the base distribution's completions.

    `reduction`: mean over pairs of the sum (`seq_sum`) or mean (`seq_mean`) of their tokens, or mean over all tokens of
    the optimizer step (`token_mean`). Exactly one of `eta` (weight = eta * beta) and `weight`.
    `regulariser` names the two forms of the paper instead: `cumulative` is seq_sum with weight eta * beta, `average` is
    seq_mean with weight eta. `base`: the chosen completions, or one sample of the reference model per prompt.
    """

    regulariser: Literal["cumulative", "average"] | None = None
    reduction: Reduction | None = None
    eta: float | None = Field(default=None, ge=0)
    weight: float | None = Field(default=None, ge=0)
    base: Literal["chosen", "reference"] = "chosen"

    @model_validator(mode="after")
    def _one_meaning(self) -> SftConfig:
        if (self.regulariser is None) == (self.reduction is None):
            raise ValueError("give exactly one of `regulariser` (cumulative, average) and `reduction`")
        if (self.eta is None) == (self.weight is None):
            raise ValueError("give exactly one of `eta` (times beta) and `weight` (absolute)")
        if self.regulariser is not None and self.eta is None:
            raise ValueError("`regulariser` takes `eta`; an absolute `weight` goes with `reduction`")
        return self


PRESETS: dict[Preset, dict[str, Any]] = {
    "liu2024": {"beta": 0.01, "sft": {"regulariser": "cumulative", "eta": 0.005}},
    "liu2024_avg": {"beta": 0.5, "sft": {"regulariser": "average", "eta": 0.2}},
    "pang2024": {"beta": 0.1, "sft": {"reduction": "seq_mean", "weight": 1.0}},
    "trl_rpo_alpha": {"beta": 0.1, "sft": {"reduction": "token_mean", "weight": 1.0}},
}
"""Published settings (spec/posttraining.md 2.2, 2.3); keys that are given beside the preset win.

pang2024 is the form of arXiv 2404.19733v3, which divides by the completion's tokens (v1 counted the prompt's too).
"""


class ObjectiveConfig(StrictModel):
    """loss(margin) + SFT term; margin = reward(chosen) - reward(rejected) - target_margin.

    The reward of a completion is `beta * (log p - log p_reference)`; `length_normalised` divides the logarithms by the
    number of tokens, `reference_free` leaves the reference out (with both and a `target_margin`: SimPO). Losses:
    `dpo` (logistic; `label_smoothing` as in conservative DPO), `robust` (unbiased under that share of flipped labels),
    `hinge`, `ipo`, `auc` (logistic over every chosen and every rejected completion of the step: Mann-Whitney),
    `ensloss` (stochastic derivatives of calibrated losses). The last two look at all pairs of a step together.
    """

    preset: Preset | None = None
    loss: Loss = "dpo"
    beta: float = Field(default=0.1, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    length_normalised: bool = False
    reference_free: bool = False
    target_margin: float = 0.0
    preference_weight: float = Field(default=1.0, ge=0)
    sft: SftConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and isinstance(tree.get("preset"), str) and tree["preset"] in PRESETS:
            return {**PRESETS[tree["preset"]], **tree}
        return tree

    @model_validator(mode="after")
    def _fits(self) -> ObjectiveConfig:
        if self.label_smoothing and self.loss not in ("dpo", "robust"):
            raise ValueError(f"label_smoothing goes with loss: dpo or robust, not {self.loss}")
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError("loss: robust needs label_smoothing, the share of labels that are expected to be flipped")
        if self.loss == "ipo" and self.target_margin:
            raise ValueError("loss: ipo has the target 1 / (2 beta) already: leave target_margin out")
        if self.preference_weight == 0 and self.sft is None:
            raise ValueError("preference_weight: 0 without `sft` leaves nothing to learn")
        return self


ONE_MODEL = {"float32": 1e-3, "bfloat16": 2e-2}
"""Nats per token within which two forwards of one model agree, by dtype.

They come in other groups: GPUs take another kernel for another number of tokens, which rounds otherwise. Two layouts in
bfloat16 differ by up to 0.01 on completions of a few tokens (small models), and that is no sign of another model.
"""


class ReferenceConfig(StrictModel):
    """Reference log-probabilities are computed once and kept beside the tokenised pairs.

    `cache` names another folder, which must be of this model, tokenizer, data and template. At every start
    `verify_pairs` of them are computed again, and before the first step the policy must have them; a difference beyond
    `tolerance` nats per token is an error (default: 0.001, for bfloat16 0.02).
    """

    cache: Path | None = None
    verify_pairs: int = Field(default=8, ge=0)
    tolerance: float | None = Field(default=None, gt=0)

    def tolerance_in(self, dtype: str) -> float:
        """Nats per token by which log-probabilities computed in `dtype` may differ."""
        return ONE_MODEL[dtype] if self.tolerance is None else self.tolerance


class RpoTrainingConfig(StrictModel):
    """Shape of the run; `pairs_per_step` is the global batch. Either `num_steps` or `num_epochs` (of all pairs).

    `layout`: `shared_prompt` packs each prompt once for both completions, `packed` once for each; neither has padding.
    `padded` is the usual padded batch, for models whose attention the other two cannot replace.
    """

    num_steps: Positive | None = None
    num_epochs: Annotated[float, Field(gt=0)] | None = None
    pairs_per_step: Positive
    micro_batch_pairs: Positive
    layout: Layout = "shared_prompt"
    clip_norm: float = Field(default=1.0, ge=0)
    zero_stage: Literal[0, 1, 2, 3] = 0
    num_threads: int | None = Field(default=None, gt=0, description="CPU threads per rank")
    report_every: Positive = 10

    @model_validator(mode="after")
    def _one_length(self) -> RpoTrainingConfig:
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError("exactly one of `num_steps` and `num_epochs` must be given")
        return self


class RpoEvaluationConfig(StrictModel):
    """Every `every` steps (0: at the beginning and end only): held-out pairs, `generations` samples kept as text, and
    the KL divergence to the reference on `kl_samples` fresh samples, with its standard error."""

    every: int = Field(default=0, ge=0)
    generations: int = Field(default=4, ge=0)
    kl_samples: int = Field(default=16, ge=0)
    max_new_tokens: Positive = 64
    temperature: float = Field(default=1.0, gt=0)


class RpoMetricsConfig(StrictModel):
    """Where figures go besides the console; `metrics.jsonl` is always written."""

    tensorboard: bool = True
    wandb: WandbConfig | None = None


class RpoConfig(StrictModel):
    """A preference-optimisation run, whole. `deepspeed` holds further DeepSpeed settings, passed through."""

    run: RunConfig
    data: PairDataConfig
    model: PolicyModelConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    reference: ReferenceConfig = ReferenceConfig()
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    training: RpoTrainingConfig
    evaluation: RpoEvaluationConfig = RpoEvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: RpoMetricsConfig = RpoMetricsConfig()
    deepspeed: dict[str, Any] = Field(default_factory=dict)

    @field_validator("deepspeed")
    @classmethod
    def _not_owned(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return refuse_owned_settings(settings, OWNED_DEEPSPEED_KEYS)

    @property
    def run_dir(self) -> Path:
        return self.run.folder / self.run.name

    @property
    def prepared_folder(self) -> Path:
        """Where tokenised pairs and reference log-probabilities are kept."""
        return self.data.folder or self.run.folder / "preferences"


def load_rpo_config(path: Path, overrides: Sequence[str] = ()) -> RpoConfig:
    """Read a run's configuration; paths in it are relative to the working directory. Raises ConfigError."""
    return load_config(RpoConfig, path, overrides)
