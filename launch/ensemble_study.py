"""The ensemble study: what decay, members and distillation are worth when text is scarce (spec/posttraining.md 3.4).

In order: tune one model; the standard recipe at its best number of epochs; members by the tuned recipe and by the rule
for members; students of their ensemble at equal steps, beside students without a teacher and of a single model. What is
chosen is chosen on the validation split, what is reported is of the test split. Every run is kept and read again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field

from mixwright.data_mixing.config_file import StrictModel, load_config
from mixwright.data_mixing.corpora import find_files, load_corpora_config
from mixwright.data_mixing.errors import ConfigError, DataError, nearest
from mixwright.data_mixing.prepare import prepare
from mixwright.data_mixing.store import TokenStore
from mixwright.launch.ensemble_runs import Perform, TuningRecord, member_recipe, tune
from mixwright.launch.training_runs import RunResult
from mixwright.pretrain.config import PretrainConfig
from mixwright.pretrain.distill.config import DistillConfig, LogitsConfig, SamplesConfig
from mixwright.pretrain.distill.pipeline import prepare_student
from mixwright.pretrain.ensemble.config import EnsembleConfig, Recipe, Runs, load_ensemble_config

Say = Callable[[str], None]


class StandardConfig(StrictModel):
    """The recipe with the usual decay, at several numbers of epochs."""

    lr: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    epochs: tuple[float, ...] = Field(min_length=1)


class ArmConfig(StrictModel):
    """One kind of student. `weight_decay`: candidates, the best of which with the first seed is taken for all."""

    teachers: Literal["none", "ensemble", "single"] = "none"
    learns: tuple[Literal["samples", "logits"], ...] = ()
    source: Literal["ensemble", "members"] = "ensemble"
    weight_decay: tuple[float, ...] = Field(min_length=1)


class StudentsConfig(StrictModel):
    """Students: `real_epochs` passes over the text at a share of `share` samples decide the steps of all of them."""

    real_epochs: float = Field(gt=0)
    lr: float = Field(gt=0)
    share: float = Field(gt=0, lt=1)
    num_rows: int = Field(gt=0)
    logits: LogitsConfig = LogitsConfig()
    arms: dict[str, ArmConfig] = Field(min_length=1)


class EnsembleStudyConfig(StrictModel):
    """The study, whole. `num_teachers` members teach, all `num_members` are evaluated.

    `fallback_corpora` is text that every installation has, for where `corpora` is absent. `width_key` is the key of
    model.config that `--widths` changes.
    """

    ensemble: Path
    corpora: Path
    fallback_corpora: Path
    seeds: tuple[int, ...] = Field(min_length=1)
    num_members: int = Field(ge=2)
    num_teachers: int = Field(ge=1)
    standard: StandardConfig
    students: StudentsConfig
    default_arms: tuple[str, ...] = ()
    width_key: str = "n_embd"


@dataclass
class Found:
    """What the study has found so far, by its parts; what is missing was not run."""

    tuning: TuningRecord | None = None
    standard: dict[float, dict[int, RunResult]] = field(default_factory=dict)
    tuned: dict[int, RunResult] = field(default_factory=dict)
    members: dict[str, list[RunResult]] = field(default_factory=dict)
    students: dict[str, dict[float, dict[int, RunResult]]] = field(default_factory=dict)

    def best_epochs(self) -> float:
        """Number of epochs of the standard recipe with the lowest validation loss with the first seed."""
        return min(self.standard, key=lambda epochs: next(iter(self.standard[epochs].values())).validation)

    def best_decay(self, arm: str) -> float:
        """Decay of an arm with the lowest validation loss with the first seed."""
        return min(self.students[arm], key=lambda decay: next(iter(self.students[arm][decay].values())).validation)


class EnsembleStudy:
    """The runs of the study, part by part; `found` grows with each."""

    def __init__(self, config: EnsembleStudyConfig, ensemble: EnsembleConfig, base: PretrainConfig, say: Say) -> None:
        self.config, self.ensemble, self.base, self._say = config, ensemble, base, say
        self._said: set[str] = set()
        self.store = TokenStore.open(base.data.store)
        self.runs = Runs(base, self.store, ensemble.warmup_share)
        self.found = Found()

    @property
    def folder(self) -> Path:
        return self.ensemble.folder

    def at_width(self, width: int) -> EnsembleStudy:
        """The study of a model of another width, in a folder of its own. Raises ConfigError."""
        key, settings = self.config.width_key, self.base.model.config or {}
        if key not in settings:
            raise ConfigError(f"width_key: the run's model.config has no {key!r}{nearest(key, settings)}")
        model = self.base.model.model_copy(update={"config": {**settings, key: width}})
        ensemble = self.ensemble.model_copy(update={"folder": self.folder / f"width-{width}"})
        return EnsembleStudy(self.config, ensemble, self.base.model_copy(update={"model": model}), self._say)

    def perform_ensemble(self, perform: Perform) -> None:
        """Tuning and members, without what they are compared with."""
        self.tune(perform)
        self.train_members(perform)

    def all_runs(self) -> list[RunResult]:
        """Every run that is part of what was found, once."""
        found = self.found
        groups = [
            found.tuned,
            *found.standard.values(),
            *(by for arm in found.students.values() for by in arm.values()),
        ]
        runs = [run for group in groups for run in group.values()]
        runs += [run for members in found.members.values() for run in members]
        return list({run.folder: run for run in runs}.values())

    def choose(self, names: Sequence[str]) -> list[str]:
        """Arms by name, the default ones when none is named. Raises ConfigError."""
        arms = self.config.students.arms
        for name in [*names, *self.config.default_arms]:
            if name not in arms:
                raise ConfigError(f"the study has no students {name!r}{nearest(name, arms)}")
        return list(names or self.config.default_arms or arms)

    def perform(self, perform: Perform, arms: Sequence[str]) -> None:
        """All runs, the parts in an order in which an early end leaves most."""
        for part in (self.tune, self.train_standard, self.train_members):
            self._say(f"-- {part.__name__.replace('_', ' ')}")
            part(perform)
        self._say("-- train students")
        self.train_students(perform, arms)

    def tune(self, perform: Perform) -> None:
        """The tuned recipe, and runs of it with every seed."""
        self.found.tuning = tune(self.ensemble, self.runs, perform, self._say)
        self.found.tuned = self._of_seeds(perform, self.found.tuning.best.recipe)

    def train_standard(self, perform: Perform) -> None:
        """The standard recipe: every number of epochs with the first seed, the best one with all."""
        settings = self.config.standard
        recipes = {
            epochs: Recipe(lr=settings.lr, weight_decay=settings.weight_decay, epochs=epochs)
            for epochs in settings.epochs
        }
        first = self.config.seeds[0]
        results = perform([self._keyed(recipe, first) for recipe in recipes.values()])
        self.found.standard = {epochs: {first: result} for epochs, result in zip(recipes, results, strict=True)}
        best = self.found.best_epochs()
        self.found.standard[best] = self._of_seeds(perform, recipes[best])

    def train_members(self, perform: Perform) -> None:
        """Members by the tuned recipe as it is, and by the rule for members."""
        assert self.found.tuning is not None
        settings, numbers = self.ensemble.members, range(self.config.num_members)
        recipe, tuned = member_recipe(self.ensemble), self.found.tuning.best.recipe
        by_rule = [self.runs.member(recipe, self.folder / "members", number, settings) for number in numbers]
        results = perform([*by_rule, *(self._keyed(tuned, settings.first_seed + number) for number in numbers)])
        self.found.members = {"rule": results[: len(by_rule)], "tuned": results[len(by_rule) :]}

    def train_students(self, perform: Perform, arms: Sequence[str]) -> None:
        """Students with every seed; candidates for the decay with the first one."""
        first, *others = self.config.seeds
        candidates = [(arm, decay) for arm in arms for decay in self._arm(arm).weight_decay]
        self._add(perform, [(arm, decay, first) for arm, decay in candidates])
        self._add(perform, [(arm, self.found.best_decay(arm), seed) for arm in arms for seed in others])

    def _add(self, perform: Perform, wanted: Sequence[tuple[str, float, int]]) -> None:
        """Perform students by arm, decay and seed, and note what they found."""
        results = perform([self._student(arm, decay, seed) for arm, decay, seed in wanted])
        for (arm, decay, seed), result in zip(wanted, results, strict=True):
            self.found.students.setdefault(arm, {}).setdefault(decay, {})[seed] = result

    def teachers_of(self, arm: str) -> list[Path]:
        """Folders of an arm's teachers."""
        if self._arm(arm).teachers == "ensemble":
            return [result.folder for result in self.found.members["rule"][: self.config.num_teachers]]
        return [next(iter(self.found.tuned.values())).folder]

    def _student(self, arm: str, decay: float, seed: int) -> PretrainConfig:
        """The run of an arm; its samples, store and cache are made when they are not there."""
        students, settings = self.config.students, self._arm(arm)
        recipe = Recipe(lr=students.lr, weight_decay=decay, epochs=students.real_epochs / (1 - students.share))
        if settings.teachers == "none":
            return self._keyed(recipe, seed)  # one more point of the tuning's grid, for all that it matters
        base = self.runs.run(recipe, self.folder / "students", f"{arm}-{decay:g}-seed{seed}", seed=seed)
        config = DistillConfig(
            run=Path("(the study's)"),
            folder=self.folder / "teachers",
            teachers=tuple(self.teachers_of(arm)),
            samples=self._samples(settings) if "samples" in settings.learns else None,
            logits=students.logits if "logits" in settings.learns else None,
        )
        return prepare_student(config, base, self._say_once, _told(self._say))

    def _say_once(self, text: str) -> None:
        """What is prepared for one seed is found again for the others."""
        if text not in self._said:
            self._said.add(text)
            self._say(text)

    def _samples(self, settings: ArmConfig) -> SamplesConfig:
        students = self.config.students
        return SamplesConfig(num_rows=students.num_rows, share=students.share, source=settings.source)

    def _arm(self, name: str) -> ArmConfig:
        return self.config.students.arms[name]

    def _keyed(self, recipe: Recipe, seed: int) -> PretrainConfig:
        return self.runs.keyed(recipe, self.folder / "tuning", seed=seed)

    def _of_seeds(self, perform: Perform, recipe: Recipe) -> dict[int, RunResult]:
        seeds = self.config.seeds
        return dict(zip(seeds, perform([self._keyed(recipe, seed) for seed in seeds]), strict=True))


def _told(say: Say) -> Callable[[str, int, int], None]:
    """Tells of each tenth of a stage."""
    told: set[tuple[str, int]] = set()

    def tell(stage: str, done: int, total: int) -> None:
        tenth = 10 * done // max(total, 1)
        if (stage, tenth) not in told:
            told.add((stage, tenth))
            say(f"  {stage}: {done}/{total}")

    return tell


def load_ensemble_study(path: Path, say: Say) -> EnsembleStudy:
    """Read the study and prepare its text. Raises ConfigError and DataError."""
    config = load_config(EnsembleStudyConfig, path)
    ensemble, base = load_ensemble_config(path.parent / config.ensemble)
    corpora = path.parent / config.corpora
    if not _is_at_hand(corpora):
        corpora = path.parent / config.fallback_corpora
        say(f"the text of {config.corpora} is not here: {config.fallback_corpora} instead, in a folder of its own")
        ensemble = ensemble.model_copy(update={"folder": ensemble.folder / "fallback"})
    store = load_corpora_config(corpora)
    prepare(store, corpora.parent)
    data = base.data.model_copy(update={"store": store.output})
    return EnsembleStudy(config, ensemble, base.model_copy(update={"data": data}), say)


def _is_at_hand(corpora: Path) -> bool:
    try:
        for name, source in load_corpora_config(corpora).domains.items():
            find_files(name, source, corpora.parent)
    except DataError:
        return False
    return True
