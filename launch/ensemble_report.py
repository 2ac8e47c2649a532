"""The ensemble study's tables: on the terminal, as Markdown, and as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from mixwright.launch.ensemble_findings import NGRAM, Arm, Findings
from mixwright.launch.ensemble_pictures import draw_curve
from mixwright.launch.study_report import markdown
from mixwright.launch.study_tables import show_tables
from mixwright.pretrain.ensemble.curve import EnsembleEvaluation

MODELS = ["model", "recipe", "steps", "seeds", "loss at T = 1", "loss at fitted T", "below the tuned model", "kept"]
CURVES = ["members by", "K", "mean of logits", "fitted T", "at fitted T", "mean of probabilities", "gain over one"]
LAWS = ["members by", "E", "A", "alpha", "alpha, one member left out", "K - 1 predict K", "found", "error"]

Rows = list[list[str]]


def show(found: Findings) -> None:
    """Print the tables."""
    show_tables(_tables(found), (*_overlaps(found), *_verdicts(found)), width=170)


def write_evidence(found: Findings, folder: Path) -> tuple[Path, Path]:
    """`ensemble_study.md` and `ensemble_study.png`; returns both."""
    folder.mkdir(parents=True, exist_ok=True)
    page, picture = folder / "ensemble_study.md", folder / "ensemble_study.png"
    _draw(found, picture)
    parts = ["# Ensembles and students of little text", _preface(found), f"![losses]({picture.name})"]
    for title, header, rows in _tables(found):
        parts += [f"## {title}", markdown(header, rows)]
    parts += ["## What was expected", "\n".join(f"- {line}" for line in (*_verdicts(found), *_overlaps(found)))]
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page, picture


def _tables(found: Findings) -> list[tuple[str, list[str], Rows]]:
    tables = [("Single models and students", MODELS, _models(found))]
    if found.ensembles:
        tables += [("Ensembles", CURVES, _curves(found)), ("L = E + A / K^alpha at T = 1", LAWS, _laws(found))]
    if found.candidates:
        tables.append(("Decays tried, first seed, validation", ["students", "decay: loss"], _candidates(found)))
    return tables


def _models(found: Findings) -> Rows:
    arms = [*found.standard, *([found.tuned] if found.tuned else [])]
    rows = [_model(found, arm, "") for arm in arms]
    for name, arm in found.students.items():
        has_teacher = bool(found.ensembles) and found.tuned is not None and name != "control"
        kept = f"{100 * found.kept(name, fitted=False):.0f} %" if has_teacher else ""
        rows.append(_model(found, arm, kept))
    return rows


def _model(found: Findings, arm: Arm, kept: str) -> list[str]:
    below = ""
    if found.tuned is not None and arm is not found.tuned:
        below = _signed(*arm.below(found.tuned, fitted=False))
    return [
        arm.name,
        arm.recipe,
        f"{arm.steps:,}",
        str(len(arm.plain)),
        _with_error(arm.loss(fitted=False), arm.spread(fitted=False)),
        _with_error(arm.loss(fitted=True), arm.spread(fitted=True)),
        below,
        kept,
    ]


def _curves(found: Findings) -> Rows:
    rows = []
    for name, evaluation in found.ensembles.items():
        plain, fitted = evaluation.curve(fitted=False), evaluation.curve(fitted=True)
        arithmetic = found.arithmetic[name].curve(fitted=False)
        for one, warm, mean in zip(plain, fitted, arithmetic, strict=True):
            rows.append(
                [
                    name,
                    str(one.k),
                    f"{one.loss:.4f}",
                    f"{warm.temperature:.3f}",
                    f"{warm.loss:.4f}",
                    f"{mean.loss:.4f}",
                    _signed(one.gain, one.gain_error) if one.k > 1 else "",
                ]
            )
    return rows


def _laws(found: Findings) -> Rows:
    rows = []
    for name, law in found.laws.items():
        prediction, without = found.predictions[name], law.exponent_without_one
        rows.append(
            [
                name,
                f"{law.law.floor:.4f} ({law.floor.low:.3f} to {law.floor.high:.3f})",
                f"{law.law.scale:.4f}",
                f"{law.law.exponent:.2f} ({law.exponent.low:.2f} to {law.exponent.high:.2f})",
                "" if without is None else f"{without.low:.2f} to {without.high:.2f}",
                f"{prediction.predicted:.4f}",
                f"{prediction.found:.4f}",
                f"{prediction.error:+.4f} ({prediction.predicted_from_all - prediction.found:+.4f} from all subsets)",
            ]
        )
    return rows


def _candidates(found: Findings) -> Rows:
    return [
        [name, ", ".join(f"{decay:g}: {loss:.4f}" for decay, loss in losses.items())]
        for name, losses in found.candidates.items()
    ]


def _verdicts(found: Findings) -> list[str]:
    """One line for each thing that was expected, with its figure."""
    lines = []
    if found.tuned is not None and found.standard:
        best = min(found.standard, key=lambda arm: arm.loss(fitted=False))
        gain, error = found.tuned.below(best, fitted=False)
        lines.append(
            _says(gain > 0, f"tuned decay below the default at its best epochs by {_signed(gain, error)} nats")
        )
    for name, evaluation in found.ensembles.items():
        lines += _ensemble_verdicts(found, name, evaluation)
    if found.tuned is not None and found.ensembles and found.students:
        lines += _student_verdicts(found)
    return lines


def _ensemble_verdicts(found: Findings, name: str, evaluation: EnsembleEvaluation) -> list[str]:
    points = evaluation.curve(fitted=False)
    steps = [point.step for point in points[1:]]
    exponent, prediction = found.laws[name].law.exponent, found.predictions[name]
    error, last = prediction.error, prediction.k
    losses_S = evaluation.plain_SR.mean(axis=1)
    singles = {subset[0]: losses_S[number] for number, subset in enumerate(evaluation.subsets) if len(subset) == 1}
    never = all(
        losses_S[number] <= sum(singles[one] for one in subset) / len(subset) + 1e-9
        for number, subset in enumerate(evaluation.subsets)
    )
    return [
        _says(min(steps) > 0, f"members by {name}: loss falls with every member, by {_list(steps)} nats"),
        _says(0.7 <= exponent <= 1.3, f"members by {name}: exponent {exponent:.2f} in 0.7 to 1.3"),
        _says(
            abs(error) <= 0.02, f"members by {name}: K <= {last - 1} predict K = {last} within 0.02 nats, {error:+.4f}"
        ),
        _says(never, f"members by {name}: no subset loses more than its members do in the mean"),
    ]


def _student_verdicts(found: Findings) -> list[str]:
    taught = {name: arm for name, arm in found.students.items() if name != "control"}
    lines = []
    if taught:
        best = min(taught, key=lambda name: taught[name].loss(fitted=False))
        for fitted in (False, True):
            kept, at = found.kept(best, fitted=fitted), "at fitted temperatures" if fitted else "at T = 1"
            over, error = taught[best].below_rows(found.teacher_rows(fitted=fitted), fitted=fitted)
            lines.append(
                _says(
                    kept >= 0.8,
                    f"the best student ({best}) keeps {100 * kept:.0f} % of the teachers' gain {at}; it is "
                    f"{_signed(over, error)} nats below them (error over rows)",
                )
            )
        for control in ("control", "self"):
            if control in found.students and control != best:
                gain, error = taught[best].below(found.students[control], fitted=False)
                text = f"the best student ({best}) is {_signed(gain, error)} nats below `{control}` at equal steps"
                lines.append(_says(gain > 0, text))
    return lines


def _overlaps(found: Findings) -> list[str]:
    return [
        _says(
            overlap.shared == 0,
            f"{overlap.split} text: {overlap.shared} of {overlap.total:,} runs of {NGRAM} tokens stand in training too",
        )
        for overlap in found.overlaps
    ]


def _preface(found: Findings) -> str:
    return (
        "Written by `python launch/study.py ensemble`; how it is done and what it is not: docs/studies.md. "
        f"{found.num_tokens:,} training tokens, {found.num_parameters:,} parameters, losses in nats per token on all "
        "test rows. Settings and temperatures were chosen on the validation split. Errors of models are standard "
        "errors over seeds, differences of models are paired by seed; errors of ensembles are over rows, paired. "
        f"`kept` is the share of the teachers' gain ({found.num_teachers} members by the rule) over the tuned single "
        "model. All runs "
        f"together: {found.core_seconds / 60:.0f} minutes of steps on one core each, two at a time on a shared machine."
    )


def _draw(found: Findings, path: Path) -> None:
    """Left: members and their laws. Right: every kind of model."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 5.2), constrained_layout=True)
    for name, evaluation in found.ensembles.items():
        draw_curve(left, evaluation, found.laws[name], False, f"members by {name}")
    left.set_title("mean of logits at T = 1")
    _draw_models(found, right)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_models(found: Findings, axis: Any) -> None:
    arms = [*found.standard, *([found.tuned] if found.tuned else []), *found.students.values()]
    places = range(len(arms))
    for fitted, marker in ((False, "o"), (True, "x")):
        losses = [arm.loss(fitted=fitted) for arm in arms]
        errors = [0.0 if math.isnan(arm.spread(fitted=fitted)) else arm.spread(fitted=fitted) for arm in arms]
        label = "at its fitted temperature" if fitted else "at temperature 1"
        axis.errorbar(losses, places, xerr=errors, fmt=marker, label=label, capsize=2)
    if found.ensembles:
        teachers = float(found.teacher_rows(fitted=False).mean())
        axis.axvline(teachers, color="0.3", linestyle="--", linewidth=1, label=f"{found.num_teachers} teachers, T = 1")
    axis.set_yticks(places, [arm.name for arm in arms])
    axis.invert_yaxis()
    axis.set_xlabel("test loss, nats per token (bars: standard error over seeds)")
    axis.grid(alpha=0.25, axis="x")
    axis.legend(fontsize=8)


def _says(holds: bool, text: str) -> str:
    return f"{'holds' if holds else 'DOES NOT HOLD'}: {text}"


def _signed(value: float, error: float) -> str:
    return f"{value:+.4f}" if math.isnan(error) else f"{value:+.4f} ± {error:.4f}"


def _with_error(value: float, error: float) -> str:
    return f"{value:.4f}" if math.isnan(error) else f"{value:.4f} ± {error:.4f}"


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)
