"""The study of overoptimisation: what happens to what people want while the preference loss keeps falling.

Three parts, each a small world that is trained in with every objective (arm) and every seed: a bandit whose figures are
exact, a language with a programmatic gold reward, and a preference file of mathematics (spec/posttraining.md 2.4).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from pydantic import Field

from mixwright.data_mixing.config_file import StrictModel, load_config
from mixwright.data_mixing.errors import ConfigError, nearest
from mixwright.launch.ray_tasks import TaskMap, TaskOptions, task_map
from mixwright.pretrain.rpo.bandit import BanditConfig, BanditTrial, run_bandit
from mixwright.pretrain.rpo.config import ObjectiveConfig
from mixwright.pretrain.rpo.gold_trial import GoldConfig, GoldTrial, make_world, run_gold
from mixwright.pretrain.rpo.text_trial import TextConfig, TextTrial, fingerprint_of, prepare_texts, run_text
from mixwright.pretrain.rpo.trial import TrialRecord, find_record, perform, trial_key

Part = Literal["bandit", "gold", "text"]
AnyTrial: TypeAlias = BanditTrial | GoldTrial | TextTrial
Say = Callable[[str], None]
Arms = dict[str, ObjectiveConfig]


class BanditPart(StrictModel):
    """Arms in the bandit; `seeds` are numbers, so that others can be kept for trying things out."""

    world: BanditConfig = BanditConfig()
    seeds: tuple[int, ...] = Field(min_length=1)
    arms: Arms = Field(min_length=1)


class GoldPart(StrictModel):
    """Arms in the language with a gold reward."""

    world: GoldConfig
    seeds: tuple[int, ...] = Field(min_length=1)
    arms: Arms = Field(min_length=1)


class TextPart(StrictModel):
    """Arms on a preference file, which is relative to the study's own; without the file the part is left out."""

    world: TextConfig
    seeds: tuple[int, ...] = Field(min_length=1)
    arms: Arms = Field(min_length=1)


class OveroptimisationConfig(StrictModel):
    """The study, whole; records and references are kept in `folder`."""

    folder: Path
    bandit: BanditPart
    gold: GoldPart
    text: TextPart | None = None


@dataclass(frozen=True)
class Task:
    """A trial to perform, or only what all trials of its seed share."""

    trial: AnyTrial
    only_prepare: bool = False


Map = TaskMap[Task, TrialRecord | None]


class OveroptimisationStudy:
    """The trials of the study; `records` grows with each, by part, arm and seed."""

    def __init__(self, config: OveroptimisationConfig, arms: Sequence[str], num_seeds: int | None) -> None:
        self.config = config
        self.parts: dict[Part, BanditPart | GoldPart | TextPart] = {"bandit": config.bandit, "gold": config.gold}
        if config.text is not None:
            self.parts["text"] = config.text
            self._content = fingerprint_of(config.text.world.pairs)
        self._num_seeds = num_seeds
        self._chosen = self._choose(arms)
        self.records: dict[Part, dict[str, dict[int, TrialRecord]]] = {
            part: {arm: {} for arm in self.arms(part)} for part in self.parts
        }

    @property
    def trials_folder(self) -> Path:
        return self.config.folder / "trials"

    def arms(self, part: Part) -> Arms:
        """Arms of a part that were chosen."""
        return {name: arm for name, arm in self.parts[part].arms.items() if name in self._chosen}

    def seeds(self, part: Part) -> tuple[int, ...]:
        return self.parts[part].seeds[: self._num_seeds]

    def trial(self, part: Part, arm: str, seed: int) -> AnyTrial:
        """One trial of the study."""
        objective, owner = self.parts[part].arms[arm], self.parts[part]
        if isinstance(owner, BanditPart):
            return BanditTrial(objective=objective, seed=seed, world=owner.world)
        if isinstance(owner, GoldPart):
            return GoldTrial(objective=objective, seed=seed, world=owner.world)
        return TextTrial(objective=objective, seed=seed, world=owner.world, content=self._content)

    def perform(self, map_: Map, say: Say, deadline: float | None = None) -> None:
        """All trials, part by part and seed by seed, so that an early end leaves whole seeds. Raises OutOfTime."""
        for part in self.parts:
            self._perform_part(part, map_, say, deadline)

    def _perform_part(self, part: Part, map_: Map, say: Say, deadline: float | None) -> None:
        wanted = [(arm, seed) for seed in self.seeds(part) for arm in self.arms(part)]
        waiting: dict[str, list[tuple[str, int]]] = {}
        for arm, seed in wanted:
            trial = self.trial(part, arm, seed)
            found = find_record(trial, self.trials_folder)
            if found is None:
                waiting.setdefault(trial_key(trial), []).append((arm, seed))
            else:
                self.records[part][arm][seed] = found
        firsts = [names[0] for names in waiting.values()]
        if part != "bandit":
            by_seed = {seed: arm for arm, seed in reversed(firsts)}
            for _ in map_([Task(self.trial(part, arm, seed), True) for seed, arm in sorted(by_seed.items())], deadline):
                pass
        began, done = time.monotonic(), len(wanted) - sum(map(len, waiting.values()))
        for _, record in map_([Task(self.trial(part, *name)) for name in firsts], deadline):
            assert record is not None
            for arm, seed in waiting[record.key]:
                self.records[part][arm][seed] = record
                done += 1
                minutes = (time.monotonic() - began) / 60
                say(f"{minutes:6.1f} min  {part} {done}/{len(wanted)}  {arm}, seed {seed}  {record.seconds:.0f} s")

    def _choose(self, names: Sequence[str]) -> set[str]:
        known = {name for part in self.parts.values() for name in part.arms}
        for name in names:
            if name not in known:
                raise ConfigError(f"the study has no arm {name!r}{nearest(name, known)}")
        return set(names) or known


@contextmanager
def trial_map(study: OveroptimisationStudy, num_workers: int, address: str | None) -> Iterator[Map]:
    """Performs tasks of the study `num_workers` at a time as Ray tasks; 0: one after the other, here."""
    work = partial(perform_task, folder=study.trials_folder.resolve())
    with task_map(work, num_workers, TaskOptions("a trial of the study"), address) as map_:
        yield map_


def perform_task(task: Task, folder: Path) -> TrialRecord | None:
    """The record of a task's trial; None where it only prepares."""
    torch.set_num_threads(1)
    trial, references = task.trial, folder.parent / "references"
    if task.only_prepare:
        if isinstance(trial, GoldTrial):
            make_world(trial.world, trial.seed, references)
        elif isinstance(trial, TextTrial):
            prepare_texts(trial, references)
        return None
    if isinstance(trial, BanditTrial):
        return perform(trial, folder, run_bandit)
    if isinstance(trial, GoldTrial):
        return perform(trial, folder, partial(run_gold, folder=references))
    return perform(trial, folder, partial(run_text, folder=references))


def load_overoptimisation_study(
    path: Path, arms: Sequence[str], num_seeds: int | None, say: Say
) -> OveroptimisationStudy:
    """Read the study; paths in it are relative to its file. Raises ConfigError."""
    config = load_config(OveroptimisationConfig, path)
    changes: dict[str, object] = {"folder": path.parent / config.folder}
    if config.text is not None:
        data = path.parent / config.text.world.pairs
        world = config.text.world.model_copy(update={"pairs": data.resolve()})
        changes["text"] = config.text.model_copy(update={"world": world})
        if not data.is_file():
            say(f"{data} is not here: the part on a preference file is left out")
            changes["text"] = None
    return OveroptimisationStudy(config.model_copy(update=changes), arms, num_seeds)
