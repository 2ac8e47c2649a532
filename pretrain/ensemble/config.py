"""What `mixwright ensemble` is told: a run, a recipe, the grid around it, members; and the runs that follow from it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mixwright.data_mixing.config_file import StrictModel, load_config, validate
from mixwright.data_mixing.manifest import fingerprint
from mixwright.data_mixing.store import TokenStore
from mixwright.pretrain.config import Positive, PretrainConfig, load_pretrain_config
from mixwright.pretrain.ensemble.tune import decay_of

KEY_LENGTH = 16


class Recipe(StrictModel):
    """Regularisation of a run. The decay is given as it is, or as a time scale 1 / (lr * decay) in epochs."""

    lr: float = Field(gt=0)
    epochs: float = Field(gt=0)
    weight_decay: float | None = Field(default=None, ge=0)
    decay_time_epochs: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_decay(self) -> Recipe:
        if (self.weight_decay is None) == (self.decay_time_epochs is None):
            raise ValueError("give exactly one of weight_decay and decay_time_epochs")
        return self

    def decay(self, steps_per_epoch: float) -> float:
        """Weight decay as AdamW takes it."""
        if self.weight_decay is not None:
            return self.weight_decay
        assert self.decay_time_epochs is not None
        return decay_of(self.decay_time_epochs, self.lr, steps_per_epoch)

    def scaled(self, epochs: float, decay: float) -> Recipe:
        """The recipe with its epochs and its decay multiplied."""
        time = None if self.decay_time_epochs is None else self.decay_time_epochs / decay
        own = None if self.weight_decay is None else self.weight_decay * decay
        return self.model_copy(update={"epochs": self.epochs * epochs, "weight_decay": own, "decay_time_epochs": time})


class TuneConfig(StrictModel):
    """The grid of `mixwright ensemble tune`; defaults are the paper's. A loss is the mean over `seeds`.

    `weight_decay` values, or time scales `decay_time_epochs` instead. `max_runs` bounds what is spent.
    """

    lr: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    weight_decay: tuple[float, ...] = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
    decay_time_epochs: tuple[float, ...] = ()
    epochs: tuple[float, ...] = (1, 2, 4, 8, 16, 32, 64)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    max_runs: Positive = 100
    all_axes_at_once: bool = False

    @field_validator("lr", "weight_decay", "decay_time_epochs", "epochs")
    @classmethod
    def _increasing(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if any(a >= b for a, b in itertools.pairwise(values)):
            raise ValueError("values of a grid must increase")
        return values

    @property
    def grid(self) -> dict[str, tuple[float, ...]]:
        """Values by axis, in the order in which they are descended along."""
        if self.decay_time_epochs:
            return {"decay_time_epochs": self.decay_time_epochs, "epochs": self.epochs, "lr": self.lr}
        return {"weight_decay": self.weight_decay, "epochs": self.epochs, "lr": self.lr}


class MembersConfig(StrictModel):
    """How members differ from the tuned recipe and from each other (the paper: twice the epochs, half the decay).

    `vary`: `both` seeds, or the order of the data (`order`) or the initial parameters (`init`) alone.
    """

    recipe: Literal["tuned", "given"] = "tuned"
    epochs_factor: float = Field(default=2.0, gt=0)
    decay_factor: float = Field(default=0.5, ge=0)
    vary: Literal["both", "order", "init"] = "both"
    first_seed: int = Field(default=1, ge=0)


class ResourcesConfig(StrictModel):
    """What one run takes: ranks (torchrun starts more than one), CPUs and GPUs of all of them together."""

    ranks: Positive = 1
    cpus: Positive = 1
    gpus: int = Field(default=0, ge=0)


class EnsembleConfig(StrictModel):
    """An ensemble, whole. `run` is a run configuration whose lr, decay, steps, warm-up and seeds are replaced."""

    run: Path
    folder: Path
    recipe: Recipe
    warmup_share: float = Field(default=0.02, ge=0, lt=1)
    tune: TuneConfig = TuneConfig()
    members: MembersConfig = MembersConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="after")
    def _recipe_is_of_the_grid(self) -> EnsembleConfig:
        for axis, values in self.tune.grid.items():
            value = getattr(self.recipe, axis)
            if value is None:
                raise ValueError(f"recipe.{axis} is missing: tune.{axis} is tuned")
            if value not in values:
                raise ValueError(
                    f"recipe.{axis} = {value:g} is not in tune.{axis}: {', '.join(f'{v:g}' for v in values)}"
                )
        return self


def load_ensemble_config(path: Path, overrides: Sequence[str] = ()) -> tuple[EnsembleConfig, PretrainConfig]:
    """The ensemble and its run, whose configuration is relative to the ensemble's file. Raises ConfigError."""
    config = load_config(EnsembleConfig, path, overrides)
    return config, load_pretrain_config(path.parent / config.run)


class Runs:
    """Run configurations of an ensemble: a base, and what a recipe and seeds make of it."""

    def __init__(self, base: PretrainConfig, store: TokenStore, warmup_share: float) -> None:
        self.base, self._warmup_share = base, warmup_share
        self._store_fingerprint = store.fingerprint
        rows = sum(domain.num_rows for domain in store.domains())
        self.steps_per_epoch = rows / base.training.rows_per_step
        self.num_tokens = rows * store.manifest.sequence_length

    def run(
        self, recipe: Recipe, folder: Path, name: str, *, seed: int, init_seed: int | None = None
    ) -> PretrainConfig:
        """A run of the recipe; it validates after its last step."""
        steps = max(round(recipe.epochs * self.steps_per_epoch), 1)
        changes: dict[str, dict[str, Any]] = {
            "run": {"name": name, "folder": str(folder), "seed": seed, "init_seed": init_seed},
            "optimizer": {"lr": recipe.lr, "weight_decay": recipe.decay(self.steps_per_epoch)},
            "schedule": {"warmup_steps": round(self._warmup_share * steps)},
            "training": {"num_steps": steps},
            "evaluation": {"every": steps},
            "data": {"prepare": None},  # the store is there
        }
        return self.changed(changes)

    def changed(self, changes: dict[str, dict[str, Any]]) -> PretrainConfig:
        """The base with single settings replaced, checked again as a whole. Raises ConfigError."""
        tree = self.base.model_dump(mode="json")
        for section, values in changes.items():
            tree[section] = {**(tree[section] or {}), **values}
        return validate(PretrainConfig, tree, "run")

    def keyed(self, recipe: Recipe, folder: Path, *, seed: int) -> PretrainConfig:
        """A run named by everything that decides its result, so that equal ones are performed once."""
        config = self.run(recipe, folder, "unnamed", seed=seed)
        content = config.model_dump(
            mode="json", exclude={"run": {"name", "folder"}, "data": True}, exclude_defaults=True
        )
        key = fingerprint({"store": self._store_fingerprint, **content})[:KEY_LENGTH]
        return self.run(recipe, folder, key, seed=seed)

    def member(self, recipe: Recipe, folder: Path, number: int, members: MembersConfig) -> PretrainConfig:
        """Member `number` (0, 1, ...)."""
        seed, fixed = members.first_seed + number, members.first_seed
        order_seed = fixed if members.vary == "init" else seed
        init_seed = fixed if members.vary == "order" else seed
        return self.run(recipe, folder, f"member-{number}", seed=order_seed, init_seed=init_seed)
