"""The weighting study: instance weights on whole and damaged text, beside counting every sample alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
from pydantic import Field

from mixwright.data_mixing.config_file import StrictModel, load_config
from mixwright.data_mixing.errors import ConfigError, nearest
from mixwright.data_mixing.loss_weighting import LossWeighting
from mixwright.launch.mixing_study import StudyConfig, load_study, prepare_corpora, with_texts_at_hand
from mixwright.pretrain.proxy import ProxyConfig, ProxyRecord, ProxyRun
from mixwright.pretrain.sweeps.comparison import Comparison, compare
from mixwright.pretrain.sweeps.damage import Damage
from mixwright.pretrain.sweeps.perform import Execute

BASELINE = "uniform"


class WeightingStudyConfig(StrictModel):
    """`study` is the mixing study whose setting `setting` is trained on, all its domains alike."""

    study: Path
    setting: str
    validate_every: int = Field(gt=0)
    seeds: int = Field(default=3, ge=1)
    data: dict[str, Damage] = Field(min_length=1)
    strategies: dict[str, LossWeighting] = Field(min_length=1)


class WeightingStudy:
    """The runs of the study: every strategy on all data, with every seed."""

    def __init__(
        self, config: WeightingStudyConfig, base: StudyConfig, domains: Sequence[str], strategies: Sequence[str]
    ) -> None:
        self.config, self.base, self.domains = config, base, tuple(domains)
        self.strategies = {name: config.strategies[name] for name in strategies}
        self.records: dict[tuple[str, str], dict[int, ProxyRecord]] = {
            (data, strategy): {} for data in config.data for strategy in (BASELINE, *self.strategies)
        }

    @property
    def proxy(self) -> ProxyConfig:
        """What every run trains, and for how long."""
        return self.base.proxy.model_copy(update={"validate_every": self.config.validate_every})

    def perform(self, execute: Execute) -> None:
        """All runs; seed by seed, so that an early end leaves whole seeds."""
        for seed in range(self.config.seeds):
            runs = [self._run(data, strategy, seed) for data, strategy in self.records]
            for found, record in zip(self.records.values(), execute(runs), strict=True):
                found[seed] = record

    def compare(self, data: str, strategy: str) -> Comparison | None:
        """Perplexity on whole test rows beside the baseline's on the same data."""
        return compare(self.records[data, strategy], self.records[data, BASELINE], self.domains)

    def steps_to_baseline(self, data: str, strategy: str) -> list[int | None]:
        """By seed: the first validated step with a mean loss that the baseline has only at its end; None: never."""
        found = []
        for seed, record in self.records[data, strategy].items():
            wanted = mean_loss(self.records[data, BASELINE][seed].last)
            steps = [point.step for point in record.validation if mean_loss(point.loss) <= wanted]
            found.append(steps[0] if steps else None)
        return found

    def throughput(self, data: str, strategy: str) -> float:
        """Tokens per second beside the baseline's run with the same seed, median over seeds."""
        own, base = self.records[data, strategy], self.records[data, BASELINE]
        return median(base[seed].seconds / own[seed].seconds for seed in own) if own else math.nan

    def effective(self, data: str, strategy: str) -> float:
        """Effective sample size as a part of the samples, mean over seeds."""
        sizes = [record.effective_sample_size for record in self.records[data, strategy].values()]
        return float(np.mean([1.0 if size is None else size for size in sizes])) if sizes else math.nan

    def _run(self, data: str, strategy: str, seed: int) -> ProxyRun:
        policy = {"kind": "static", "mixture": dict.fromkeys(self.domains, 1)}
        if strategy != BASELINE:
            policy["loss_weighting"] = self.strategies[strategy].model_dump(mode="json", exclude_defaults=True)
        return ProxyRun(
            store=self.base.folder / "store",
            domains=self.domains,
            policy=policy,
            config=self.proxy,
            damage=self.config.data[data],
            seed=seed,
        )


def mean_loss(loss: Mapping[str, float]) -> float:
    """Mean over the domains, nats per token."""
    return float(np.mean(list(loss.values())))


def load_weighting_study(path: Path, strategies: Sequence[str], seeds: int | None) -> WeightingStudy:
    """Read the configuration and prepare the texts. Raises ConfigError and DataError."""
    config = load_config(WeightingStudyConfig, path)
    if seeds is not None:
        config = config.model_copy(update={"seeds": seeds})
    for name in strategies:
        if name not in config.strategies and name != BASELINE:
            raise ConfigError(f"the study has no strategy {name!r}{nearest(name, [*config.strategies])}")
    named = load_study(path.parent / config.study)
    if config.setting not in named.settings:
        hint = nearest(config.setting, named.settings)
        raise ConfigError(f"{path}: setting: {config.study} has no setting {config.setting!r}{hint}")
    base = with_texts_at_hand(named)
    # With other texts at hand the settings have other names, in the same order.
    setting = list(base.settings.values())[list(named.settings).index(config.setting)]
    prepare_corpora(base, {})
    chosen = [name for name in strategies or config.strategies if name != BASELINE]
    return WeightingStudy(config, base, setting.domains, chosen)
