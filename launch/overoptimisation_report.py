"""The tables of the study of overoptimisation: on the terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mixwright.launch.overoptimisation_findings import (
    KL_LEVELS,
    Arm,
    Estimate,
    arms_of,
    bandit_verdicts,
    drop,
    gold_verdicts,
    held_out_stop,
    last,
    peak,
    peak_step,
    reward_at,
    text_verdicts,
)
from mixwright.launch.overoptimisation_pictures import draw
from mixwright.launch.overoptimisation_study import OveroptimisationStudy, Part
from mixwright.launch.study_report import markdown
from mixwright.launch.study_tables import show_tables
from mixwright.pretrain.rpo.bandit import draw_bandit, landmarks

Column = tuple[str, Callable[[Arm], str]]
Tables = list[tuple[str, list[str], list[list[str]]]]


def _final(title: str, name: str, digits: int = 3) -> Column:
    return title, lambda arm: arm.final(name).text(digits)


COMMON: list[Column] = [("arm", lambda arm: arm.name), ("seeds", lambda arm: str(len(arm.by_seed)))]
PEAKS: list[Column] = [
    ("peak reward", lambda arm: str(arm.mean(peak))),
    ("at step", lambda arm: f"{arm.mean(peak_step).mean:.0f}"),
    _final("final reward", "reward"),
    ("drop", lambda arm: str(arm.mean(drop))),
    _final("final KL", "kl", 2),
]
COLUMNS: Mapping[Part, list[Column]] = {
    "bandit": [
        *COMMON,
        *PEAKS,
        _final("on uncovered actions", "uncovered"),
        _final("log p(chosen)", "chosen_logp", 2),
        _final("log p(rejected)", "rejected_logp", 2),
        _final("accuracy", "accuracy"),
    ],
    "gold": [
        *COMMON,
        *PEAKS,
        _final("valid", "validity"),
        _final("log p(chosen)", "chosen_logp", 1),
        _final("log p(rejected)", "rejected_logp", 1),
        _final("accuracy", "accuracy"),
        _final("held-out accuracy", "held_out_accuracy"),
        ("reward at best held-out accuracy", lambda arm: str(arm.mean(held_out_stop))),
    ],
    "text": [
        *COMMON,
        _final("held-out accuracy", "held_out_accuracy"),
        _final("held-out AUC", "held_out_auc"),
        _final("training accuracy", "accuracy"),
        _final("log p(chosen)", "chosen_logp"),
        _final("log p(rejected)", "rejected_logp"),
        _final("held-out log p(chosen)", "held_out_chosen_logp"),
        _final("KL", "kl", 1),
        _final("ends in `A: number`", "well_formed", 2),
        _final("right", "right", 2),
    ],
}
TITLES: Mapping[Part, str] = {
    "bandit": "The bandit",
    "gold": "The language with a gold reward",
    "text": "A preference file of mathematics",
}
VERDICTS = {"bandit": bandit_verdicts, "gold": gold_verdicts, "text": text_verdicts}


def show(study: OveroptimisationStudy) -> None:
    """Print the tables and the verdicts."""
    show_tables(_tables(study), _verdicts(study))


def write_evidence(study: OveroptimisationStudy, folder: Path) -> list[Path]:
    """`overoptimisation_study.md` and, when there is a finished trial, `.png`; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    page, picture = folder / "overoptimisation_study.md", folder / "overoptimisation_study.png"
    arms = {part: arms_of(study, part) for part in study.parts}
    parts = ["# Overoptimisation of preferences", _preface(study)]
    if any(arms.values()):
        draw(arms, picture)
        parts.append(f"![gold reward]({picture.name})")
    for title, header, rows in _tables(study):
        parts += [f"## {title}", markdown(header, rows)]
    parts += ["## What was expected", "\n".join(f"- {line}" for line in _verdicts(study))]
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return [page, picture] if any(arms.values()) else [page]


def _tables(study: OveroptimisationStudy) -> Tables:
    tables: Tables = []
    for part in study.parts:
        found = arms_of(study, part)
        columns = COLUMNS[part]
        rows = [[cell(arm) for _, cell in columns] for arm in found.values()]
        missing = [[name, "0", "not run", *[""] * (len(columns) - 3)] for name in study.arms(part) if name not in found]
        tables.append((TITLES[part], [title for title, _ in columns], rows + missing))
        if part == "gold" and found:
            tables.append(_matched(list(found.values())))
    return tables


def _matched(arms: Sequence[Arm]) -> tuple[str, list[str], list[list[str]]]:
    """Gold rewards at equal divergence, where a curve first reaches it."""
    header = ["arm", *(f"at KL {level:g}" for level in KL_LEVELS), "DPO's at this arm's final KL"]
    dpo = next((arm for arm in arms if arm.eta == 0), None)
    rows = []
    for arm in arms:
        cells = [_reached(arm, level) for level in KL_LEVELS]
        rows.append([arm.name, *cells, "" if dpo is None or arm is dpo else _of_dpo(arm, dpo)])
    return "Gold reward in the language at equal divergence", header, rows


def _reached(arm: Arm, level: float) -> str:
    values = [value for value in arm.each(reward_at(level)).values() if not math.isnan(value)]
    if not values:
        return "not reached"
    missed = "" if len(values) == len(arm.by_seed) else f" ({len(values)} of {len(arm.by_seed)})"
    return f"{Estimate.of(values)}{missed}"


def _of_dpo(arm: Arm, dpo: Arm) -> str:
    """DPO's reward on the way through the divergence at which this arm ends, seed by seed."""
    ends = arm.each(last("kl"))
    values = [reward_at(ends[seed])(record) for seed, record in dpo.by_seed.items() if seed in ends]
    values = [value for value in values if not math.isnan(value)]
    return str(Estimate.of(values)) if values else "not reached"


def _verdicts(study: OveroptimisationStudy) -> list[str]:
    lines = []
    for part in study.parts:
        found = arms_of(study, part)
        if found:
            lines += [
                f"{TITLES[part].removeprefix('The ').removeprefix('A ')}: {line}" for line in VERDICTS[part](found)
            ]
    return lines


def _landmarks(study: OveroptimisationStudy) -> str:
    """Rewards of the policies that the bandit's curves are read against, means over its seeds."""
    world, seeds = study.config.bandit.world, study.seeds("bandit")
    each = [landmarks(draw_bandit(world, seed)) for seed in seeds]
    return ", ".join(f"{name} {np.mean([one[name] for one in each]):.2f}" for name in each[0])


def _preface(study: OveroptimisationStudy) -> str:
    records = [record for arms in study.records.values() for seeds in arms.values() for record in seeds.values()]
    minutes = sum(record.seconds for record in {record.key: record for record in records}.values()) / 60
    gold, marks = study.config.gold.world, _landmarks(study)
    return (
        "Written by `python launch/study.py overoptimisation`; how it is done and what it is not: docs/studies.md. "
        "Means over seeds with standard errors. `drop` is from the peak to the end of training. In the language the "
        f"reward is estimated on {gold.num_samples:,} samples, the step of the peak is chosen on as many others; KL is "
        "KL(policy || reference) of whole responses in nats, on the policy's own samples. Accuracy is that of implicit "
        "rewards on training pairs unless it says otherwise. log p is of whole answers, on mathematics per token. "
        f"Rewards in the bandit: {marks}. All "
        f"trials together took {minutes:.0f} minutes of a process each, on a machine that did other work too."
    )
