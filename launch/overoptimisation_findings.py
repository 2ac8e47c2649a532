"""What the study of overoptimisation found: figures of arms over seeds, and which expected orderings hold.

Every figure is a mean over seeds with its standard error; differences of arms are paired by seed, since trials of one
seed share world, pairs and reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mixwright.launch.overoptimisation_study import OveroptimisationStudy, Part
from mixwright.pretrain.rpo.config import ObjectiveConfig
from mixwright.pretrain.rpo.trial import TrialRecord

DPO, COMPARED = 0.0, 0.2
"""The etas whose drops and divergences are compared."""
KL_LEVELS = (1.0, 2.0, 4.0, 8.0)
EARLY = 0.1
"""The part of a run in which a peak is early."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its standard error; NaN with one seed."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        spread = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
        return cls(float(np.mean(values)), spread)

    def __str__(self) -> str:
        return self.text()

    def text(self, digits: int = 3, signed: bool = False) -> str:
        sign = "+" if signed else ""
        error = "" if math.isnan(self.error) else f" ± {self.error:.{digits}f}"
        return f"{self.mean:{sign}.{digits}f}{error}"


@dataclass(frozen=True)
class Arm:
    """The trials of one objective in one part, by seed."""

    name: str
    objective: ObjectiveConfig
    by_seed: Mapping[int, TrialRecord]

    @property
    def eta(self) -> float | None:
        """Of an arm of the sweep: the coefficient of the paper's cumulative regulariser on chosen completions."""
        sft = self.objective.sft
        is_swept = sft is not None and sft.regulariser == "cumulative" and sft.base == "chosen"
        return sft.eta if sft is not None and is_swept else None

    @property
    def steps(self) -> list[int]:
        return next(iter(self.by_seed.values())).steps

    def each(self, figure: Callable[[TrialRecord], float]) -> dict[int, float]:
        return {seed: figure(record) for seed, record in self.by_seed.items()}

    def mean(self, figure: Callable[[TrialRecord], float]) -> Estimate:
        return Estimate.of(list(self.each(figure).values()))

    def final(self, name: str) -> Estimate:
        """A figure after the last step."""
        return self.mean(last(name))

    def curves(self, name: str) -> np.ndarray:
        """One figure of all seeds at all points, float64 [seeds, points]."""
        return np.array([record.curve(name) for record in self.by_seed.values()])


def last(name: str) -> Callable[[TrialRecord], float]:
    """The figure after the last step."""
    return lambda record: record.points[-1].figures[name]


def peak_place(record: TrialRecord) -> int:
    """The point with the highest gold reward: by samples of their own where rewards are estimated."""
    figures = record.points[0].figures
    return int(np.argmax(record.curve("selection_reward" if "selection_reward" in figures else "reward")))


def peak(record: TrialRecord) -> float:
    """Gold reward at the peak."""
    return record.points[peak_place(record)].figures["reward"]


def peak_step(record: TrialRecord) -> float:
    return float(record.points[peak_place(record)].step)


def drop(record: TrialRecord) -> float:
    """From the peak to the end."""
    return peak(record) - last("reward")(record)


def held_out_stop(record: TrialRecord) -> float:
    """Gold reward where the accuracy on held-out pairs is highest, which needs no gold reward to find."""
    return record.points[int(np.argmax(record.curve("held_out_accuracy")))].figures["reward"]


def reward_at(level: float) -> Callable[[TrialRecord], float]:
    """Gold reward where the divergence first reaches `level`, linear between points; NaN where it never does."""

    def reward(record: TrialRecord) -> float:
        kl, rewards = record.curve("kl"), record.curve("reward")
        for place in range(1, len(kl)):
            if kl[place] >= level > kl[place - 1]:
                share = (level - kl[place - 1]) / (kl[place] - kl[place - 1])
                return rewards[place - 1] + share * (rewards[place] - rewards[place - 1])
        return math.nan

    return reward


def arms_of(study: OveroptimisationStudy, part: Part) -> dict[str, Arm]:
    """Arms of a part with at least one finished trial, in the order of the study."""
    objectives = study.arms(part)
    return {name: Arm(name, objectives[name], seeds) for name, seeds in study.records[part].items() if seeds}


def sweep_of(arms: Mapping[str, Arm]) -> list[Arm]:
    """The arms of the sweep by eta."""
    return sorted((arm for arm in arms.values() if arm.eta is not None), key=lambda arm: arm.eta or 0.0)


def difference(
    first: Arm, second: Arm, figure: Callable[[TrialRecord], float], other: Callable[[TrialRecord], float] | None = None
) -> Estimate:
    """`figure` of the first arm minus that (or another) of the second, paired by seed."""
    own, base = first.each(figure), second.each(other or figure)
    values = [own[seed] - base[seed] for seed in own if seed in base]
    return Estimate.of([value for value in values if not math.isnan(value)] or [math.nan])


def gold_verdicts(arms: Mapping[str, Arm]) -> list[str]:
    """The orderings that are expected of the language with a gold reward."""
    sweep = sweep_of(arms)
    by_eta = {arm.eta: arm for arm in sweep}
    lines = []
    if DPO in by_eta:
        lines += _verdicts_on_dpo(by_eta[DPO])
    lines += _ordered(sweep, "reward", "final gold reward rises with eta", rising=True)
    if DPO in by_eta and COMPARED in by_eta:
        lines += _verdicts_on_pair(by_eta[DPO], by_eta[COMPARED])
    return [*lines, *_ordered(sweep, "chosen_logp", "final log p(chosen) rises with eta", rising=True)]


def bandit_verdicts(arms: Mapping[str, Arm]) -> list[str]:
    """The orderings that are expected of the bandit."""
    sweep = sweep_of(arms)
    by_eta = {arm.eta: arm for arm in sweep}
    lines = []
    if DPO in by_eta and 0.05 in by_eta:
        more = difference(by_eta[0.05], by_eta[DPO], last("reward"))
        lines.append(says(more.mean > 0, f"final gold reward at eta 0.05 above DPO's, by {more.text(signed=True)}"))
    lines += _ordered(sweep, "uncovered", "probability of uncovered actions falls with eta", rising=False)
    lines += _ordered(sweep, "chosen_logp", "final log p(chosen) rises with eta", rising=True)
    return lines


def text_verdicts(arms: Mapping[str, Arm]) -> list[str]:
    """The orderings that are expected of the preference file."""
    sweep = sweep_of(arms)
    return [
        *_ordered(sweep, "chosen_logp", "log p(chosen) per token of training pairs rises with eta", rising=True),
        *_ordered(
            sweep, "held_out_chosen_logp", "log p(chosen) per token of held-out pairs rises with eta", rising=True
        ),
        *_ordered(sweep, "kl", "divergence from the reference falls with eta", rising=False),
    ]


def says(holds: bool, text: str) -> str:
    """One verdict."""
    return f"{'holds' if holds else 'DOES NOT HOLD'}: {text}"


def _verdicts_on_dpo(dpo: Arm) -> list[str]:
    below = dpo.mean(lambda record: record.points[0].figures["reward"] - last("reward")(record))
    step, num_steps = dpo.mean(peak_step), dpo.steps[-1]
    rise = dpo.mean(lambda record: last("accuracy")(record) - record.points[peak_place(record)].figures["accuracy"])
    return [
        says(step.mean <= EARLY * num_steps, f"DPO's gold reward peaks early, at step {step.text(0)} of {num_steps:,}"),
        says(below.mean > 0, f"DPO ends below the reference's gold reward, by {below}"),
        says(rise.mean > 0, f"DPO's accuracy on training pairs rises after its peak, by {rise}"),
    ]


def _verdicts_on_pair(dpo: Arm, compared: Arm) -> list[str]:
    drops, kls = (dpo.mean(drop), compared.mean(drop)), (dpo.final("kl"), compared.final("kl"))
    fall = difference(dpo, compared, drop)
    apart = difference(dpo, compared, peak)
    return [
        says(
            drops[0].mean >= 1.5 * drops[1].mean,
            f"DPO's drop from peak to end, {drops[0]}, is at least 1.5 times that of eta {COMPARED:g}, {drops[1]} "
            f"(difference {fall.text(signed=True)})",
        ),
        says(
            kls[0].mean >= 3 * kls[1].mean,
            f"DPO's final divergence, {kls[0].text(2)}, is at least 3 times that of eta {COMPARED:g}, "
            f"{kls[1].text(2)}: {kls[0].mean / kls[1].mean:.2f} times",
        ),
        says(
            abs(apart.mean) <= 0.05,
            f"DPO's peak is within 0.05 of that of eta {COMPARED:g}: {apart.text(signed=True)}",
        ),
    ]


def _ordered(sweep: Sequence[Arm], figure: str, text: str, *, rising: bool) -> list[str]:
    """A verdict on the order of an arm's final figure over eta, by differences of neighbours; none for one arm."""
    if len(sweep) < 2:
        return []
    sign = 1 if rising else -1
    steps = [(low, high, difference(high, low, last(figure))) for low, high in pairwise(sweep)]
    values = ", ".join(f"{arm.eta:g}: {arm.final(figure)}" for arm in sweep)
    failing = [f"{low.eta:g} to {high.eta:g}" for low, high, step in steps if sign * step.mean <= 0]
    where = f"; not from {', '.join(failing)}" if failing else ""
    least = min((step for _, _, step in steps), key=lambda step: sign * step.mean)
    smallest = f"; smallest step {least.text(signed=True)}"
    return [says(not failing, f"{text} ({values}{smallest}{where})")]
