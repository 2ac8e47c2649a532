"""The mixing study: its configuration, its corpora, and the runs that it consists of."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from tokenizers import Tokenizer

from mixwright.data_mixing.config_file import StrictModel, load_config, validate
from mixwright.data_mixing.corpora import CorporaConfig, find_files, load_corpora_config
from mixwright.data_mixing.errors import ConfigError, DataError, nearest
from mixwright.data_mixing.prepare import prepare
from mixwright.pretrain.proxy import ProxyConfig, ProxyRecord, ProxyRun
from mixwright.pretrain.sweeps.comparison import Comparison, compare
from mixwright.pretrain.sweeps.fits import Fitted, Problem, begin_fit, drive
from mixwright.pretrain.sweeps.perform import Execute

BASELINE = "stratified"
GARBAGE = "garbage"
GARBAGE_DOCUMENTS, GARBAGE_WORDS = 1000, 500


class Setting(StrictModel):
    """Domains that are mixed. With `garbage`, one of them is made of random words, and its loss counts for nothing."""

    domains: tuple[str, ...] = Field(min_length=2)
    garbage: bool = False
    note: str = ""

    @property
    def counted(self) -> tuple[str, ...]:
        """Domains whose perplexity makes the mean."""
        return tuple(name for name in self.domains if not (self.garbage and name == GARBAGE))


class Contender(StrictModel):
    """A policy document, or the fit that ends in one. `per_arm` values are multiplied by the number of domains."""

    policy: dict[str, Any] | None = None
    fit: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    per_arm: dict[str, int] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one(self) -> Contender:
        if (self.policy is None) == (self.fit is None):
            raise ValueError("give either policy or fit")
        return self

    def document(self, num_arms: int) -> dict[str, Any]:
        """The policy for so many arms."""
        return {**(self.policy or {}), **{key: value * num_arms for key, value in self.per_arm.items()}}


class StudyConfig(StrictModel):
    """A study, whole. Paths are relative to the configuration file.

    Where the texts of `corpora` are absent, those of `fallback_corpora` take their place, domain by domain as
    `fallback_domains` says, in rows and a vocabulary of the same size.
    """

    corpora: Path
    fallback_corpora: Path
    fallback_domains: dict[str, str] = Field(default_factory=dict)
    folder: Path
    row_length: int = Field(default=128, gt=0)
    vocab_size: int = Field(default=512, gt=0)
    proxy: ProxyConfig
    seeds: int = Field(default=3, ge=1)
    fit_steps: int = Field(gt=0)
    fit_seed: int = Field(ge=0)
    settings: dict[str, Setting] = Field(min_length=1)
    policies: dict[str, Contender] = Field(min_length=1)
    default_policies: tuple[str, ...] = Field(min_length=1)

    def choose(
        self, settings: Sequence[str], policies: Sequence[str]
    ) -> tuple[dict[str, Setting], dict[str, Contender]]:
        """The named ones, or the default selection; raises ConfigError for an unknown name."""
        for kind, names, known in (("setting", settings, [*self.settings]), ("policy", policies, [*self.policies])):
            for name in names:
                if name not in known and name != BASELINE:
                    raise ConfigError(f"the study has no {kind} {name!r}{nearest(name, known)}")
        chosen = [name for name in policies or self.default_policies if name != BASELINE]
        return (
            {name: self.settings[name] for name in settings or self.settings},
            {name: self.policies[name] for name in chosen},
        )


def load_study(path: Path) -> StudyConfig:
    """Read a study's configuration; its paths become absolute. Raises ConfigError."""
    config = load_config(StudyConfig, path)
    moved = {
        name: (path.parent / getattr(config, name)).resolve() for name in ("corpora", "fallback_corpora", "folder")
    }
    return config.model_copy(update=moved)


def with_texts_at_hand(config: StudyConfig) -> StudyConfig:
    """The study on its corpora, or on the ones that every installation has. Raises ConfigError."""
    corpora = load_corpora_config(config.corpora)
    try:
        for name, source in corpora.domains.items():
            find_files(name, source, config.corpora.parent)
        return config
    except DataError:
        if not config.fallback_domains:
            raise
    stand_in = config.fallback_domains
    settings = {
        name: setting.model_copy(update={"domains": tuple(stand_in.get(d, d) for d in setting.domains), "note": ""})
        for name, setting in config.settings.items()
    }
    renamed = {"-".join(setting.domains): setting for setting in settings.values()}
    folder = config.folder / "fallback"
    return config.model_copy(update={"corpora": config.fallback_corpora, "settings": renamed, "folder": folder})


@dataclass
class Outcome:
    """What is known of one policy in one setting so far."""

    records: dict[int, ProxyRecord] = field(default_factory=dict)
    fitted: Fitted | None = None


Outcomes = dict[tuple[str, str], Outcome]
"""By (setting, policy)."""


class Study:
    """The runs of a study: first those that fits need, then the ones that are compared."""

    def __init__(self, config: StudyConfig, settings: Mapping[str, Setting], policies: Mapping[str, Contender]) -> None:
        self.config, self.settings, self.policies = config, settings, policies
        self.outcomes: Outcomes = {(s, p): Outcome() for s in settings for p in (BASELINE, *policies)}
        self._stores = {name: self._store(setting) for name, setting in settings.items()}

    def fit(self, execute: Execute) -> None:
        """Every fit of the selection, once per setting."""
        wanted = [(s, p) for s, p in self.outcomes if p != BASELINE and self.policies[p].fit is not None]
        fits = [
            begin_fit(str(self.policies[p].fit), self._problem(s, self.config.fit_steps), self.policies[p].options)
            for s, p in wanted
        ]
        for cell, fitted in zip(wanted, drive(fits, execute), strict=True):
            self.outcomes[cell].fitted = fitted

    def compare(self, execute: Execute) -> None:
        """Every policy in every setting with every seed; seed by seed, so that an early end leaves whole seeds."""
        for seed in range(self.config.seeds):
            cells = [(s, p) for s, p in self.outcomes if self._document(s, p) is not None]
            runs = [self._final_run(s, p, seed) for s, p in cells]
            for cell, record in zip(cells, execute(runs), strict=True):
                self.outcomes[cell].records[seed] = record

    def table(self, setting: str) -> dict[str, Comparison | None]:
        """Comparison by policy, the baseline first; None for what has not been run."""
        baseline = self.outcomes[setting, BASELINE].records
        counted = self.settings[setting].counted
        return {p: compare(self.outcomes[setting, p].records, baseline, counted) for p in (BASELINE, *self.policies)}

    def _document(self, setting: str, policy: str) -> dict[str, Any] | None:
        problem = self._problem(setting, self.config.proxy.num_steps)
        if policy == BASELINE:
            return problem.uniform()
        contender, fitted = self.policies[policy], self.outcomes[setting, policy].fitted
        if contender.fit is not None:
            return fitted.document if fitted else None
        return contender.document(len(problem.domains)) | self._target(setting, contender)

    def _target(self, setting: str, contender: Contender) -> dict[str, Any]:
        """The garbage's loss counts for nothing: policies that weigh losses are told so."""
        chosen = self.settings[setting]
        if not chosen.garbage or (contender.policy or {}).get("kind") != "aioli":
            return {}
        return {"target": {name: float(name in chosen.counted) for name in chosen.domains}}

    def _final_run(self, setting: str, policy: str, seed: int) -> ProxyRun:
        problem = self._problem(setting, self.config.proxy.num_steps)
        return problem.run_policy(self._document(setting, policy) or {}, seed - problem.seed)

    def _problem(self, setting: str, num_steps: int) -> Problem:
        chosen = self.settings[setting]
        counts = [float(name in chosen.counted) for name in chosen.domains]
        return Problem(
            store=self._stores[setting],
            domains=chosen.domains,
            config=self.config.proxy.of_length(num_steps),
            seed=self.config.fit_seed,
            target=tuple(count / sum(counts) for count in counts),
        )

    def _store(self, setting: Setting) -> Path:
        folder = self.config.folder
        return folder / "store-garbage" if setting.garbage else folder / "store"


def prepare_corpora(config: StudyConfig, settings: Mapping[str, Setting]) -> None:
    """The study's token stores, made unless they are there. Raises DataError and ConfigError."""
    corpora = load_corpora_config(config.corpora)
    if config.corpora == config.fallback_corpora:
        shape = (f"sequence_length={config.row_length}", f"tokenizer.train.vocab_size={config.vocab_size}")
        corpora = load_corpora_config(config.corpora, shape)
    corpora = corpora.model_copy(update={"output": config.folder / "store"})
    prepare(corpora, config.corpora.parent)
    for setting in settings.values():
        if setting.garbage:
            prepare(_with_garbage(config, corpora), config.corpora.parent)
            return


def _with_garbage(config: StudyConfig, corpora: CorporaConfig) -> CorporaConfig:
    """The same corpora and tokenizer, and a domain of random words."""
    tokenizer = config.folder / "store" / "tokenizer"
    source = config.folder / "garbage.jsonl"
    if not source.exists():
        write_garbage(tokenizer, source)
    tree = corpora.model_dump(mode="json", exclude_unset=True)
    tree |= {"output": str(config.folder / "store-garbage"), "tokenizer": {"path": str(tokenizer)}}
    tree["domains"][GARBAGE] = {"paths": [str(source)]}
    return validate(CorporaConfig, tree, "garbage corpora")


def write_garbage(tokenizer: Path, path: Path) -> None:
    """Documents of words drawn alike from the tokenizer's vocabulary: nothing to learn but which words there are."""
    vocabulary = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab()
    words = sorted(word for word in vocabulary if word.isascii() and word.isalnum())
    chance = random.Random(0)  # nosec B311  # the same garbage every time is wanted
    lines = (json.dumps({"text": " ".join(chance.choices(words, k=GARBAGE_WORDS))}) for _ in range(GARBAGE_DOCUMENTS))
    part = path.with_suffix(".part")
    try:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from None
