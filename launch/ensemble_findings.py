"""What the ensemble study found: every model on the same test rows, alone, together and as a student."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.overlap import Overlap, shared_ngrams
from mixwright.data_mixing.store import TokenStore
from mixwright.launch.ensemble_study import EnsembleStudy
from mixwright.launch.training_runs import RunResult
from mixwright.pretrain.ensemble.curve import EnsembleEvaluation, evaluate_ensemble
from mixwright.pretrain.ensemble.member import inspect_member
from mixwright.pretrain.ensemble.scaling import MemberLaw, Prediction, member_law, predict_last

NGRAM = 32
ALL_ROWS = 1 << 20


@dataclass(frozen=True)
class Arm:
    """Models of one kind by seed: losses on every test row at temperature 1 and at their own fitted temperature."""

    name: str
    recipe: str
    steps: int
    plain: Mapping[int, NDArray[np.float64]]
    fitted: Mapping[int, NDArray[np.float64]]

    def loss(self, *, fitted: bool) -> float:
        """Mean over seeds, nats per token."""
        return float(np.mean([rows_R.mean() for rows_R in self._rows(fitted).values()]))

    def spread(self, *, fitted: bool) -> float:
        """Standard error of that mean over seeds; NaN with one seed."""
        return _error([float(rows_R.mean()) for rows_R in self._rows(fitted).values()])

    def below(self, other: Arm, *, fitted: bool) -> tuple[float, float]:
        """What this arm is below another, paired by seed, with the standard error over seeds."""
        own, base = self._rows(fitted), other._rows(fitted)
        both = [seed for seed in own if seed in base]
        differences = [float(base[seed].mean() - own[seed].mean()) for seed in both]
        return float(np.mean(differences)), _error(differences)

    def below_rows(self, base_R: NDArray[np.float64], *, fitted: bool) -> tuple[float, float]:
        """What this arm's mean over seeds is below given losses, with the standard error paired over rows."""
        difference_R = base_R - np.mean(list(self._rows(fitted).values()), axis=0)
        return float(difference_R.mean()), float(difference_R.std(ddof=1) / math.sqrt(len(difference_R)))

    def _rows(self, fitted: bool) -> Mapping[int, NDArray[np.float64]]:
        return self.fitted if fitted else self.plain


@dataclass(frozen=True)
class Findings:
    """Arms in the order of the study; ensembles by recipe and pooling, with their laws. Missing parts are empty."""

    num_tokens: int
    num_parameters: int
    num_teachers: int
    core_seconds: float
    overlaps: tuple[Overlap, ...]
    standard: tuple[Arm, ...]
    tuned: Arm | None
    students: Mapping[str, Arm]
    candidates: Mapping[str, Mapping[float, float]]
    ensembles: Mapping[str, EnsembleEvaluation]
    arithmetic: Mapping[str, EnsembleEvaluation]
    laws: Mapping[str, MemberLaw]
    predictions: Mapping[str, Prediction]

    def teacher_rows(self, *, fitted: bool) -> NDArray[np.float64]:
        """Losses [R] of the ensemble that teaches: the first members by the rule for members."""
        evaluation = self.ensembles["rule"]
        number = evaluation.subsets.index(tuple(range(self.num_teachers)))
        losses_R: NDArray[np.float64] = evaluation.losses(fitted=fitted)[number]
        return losses_R

    def kept(self, name: str, *, fitted: bool) -> float:
        """Share of the teachers' gain over the tuned single model that an arm of students keeps."""
        assert self.tuned is not None
        single = self.tuned.loss(fitted=fitted)
        gain = single - float(self.teacher_rows(fitted=fitted).mean())
        return (single - self.students[name].loss(fitted=fitted)) / gain


def find(study: EnsembleStudy) -> Findings:
    """Score everything that was trained on all test rows."""
    found, store = study.found, study.store
    score = _Scorer(study.folder / "spool", store)
    epochs = study.runs.steps_per_epoch
    standard = tuple(
        score.arm(
            f"standard, {passes:g} epochs", f"decay {study.config.standard.weight_decay:g}", passes * epochs, runs
        )
        for passes, runs in sorted(found.standard.items())
    )
    tuned = None
    if found.tuning is not None:
        recipe = found.tuning.best.recipe
        decay = recipe.decay(epochs)
        name = f"tuned, {recipe.epochs:g} epochs"
        tuned = score.arm(name, f"decay {decay:g}, lr {recipe.lr:g}", recipe.epochs * epochs, found.tuned)
    steps = study.config.students.real_epochs / (1 - study.config.students.share) * epochs
    students, candidates = {}, {}
    for name, by_decay in found.students.items():
        best = found.best_decay(name)
        students[name] = score.arm(name, f"decay {best:g}", steps, by_decay[best])
        candidates[name] = {decay: next(iter(runs.values())).validation for decay, runs in by_decay.items()}
    ensembles = {name: score.ensemble(runs, "logits") for name, runs in found.members.items()}
    return Findings(
        num_tokens=study.runs.num_tokens,
        num_parameters=next(iter(ensembles.values())).num_parameters if ensembles else 0,
        num_teachers=study.config.num_teachers,
        core_seconds=sum(run.seconds for run in study.all_runs() if math.isfinite(run.seconds)),
        overlaps=tuple(shared_ngrams(store, split, NGRAM) for split in ("validation", "test")),
        standard=standard,
        tuned=tuned,
        students=students,
        candidates=candidates,
        ensembles=ensembles,
        arithmetic={name: score.ensemble(runs, "arithmetic") for name, runs in found.members.items()},
        laws={name: member_law(evaluation, fitted=False) for name, evaluation in ensembles.items()},
        predictions={name: predict_last(evaluation, fitted=False) for name, evaluation in ensembles.items()},
    )


class _Scorer:
    """Scores models on all rows of the test split, calibrated on all of the validation split."""

    def __init__(self, folder: Path, store: TokenStore) -> None:
        self._folder, self._store = folder, store

    def arm(self, name: str, recipe: str, steps: float, runs: Mapping[int, RunResult]) -> Arm:
        alone = {seed: self.ensemble([run], "logits") for seed, run in runs.items() if math.isfinite(run.validation)}
        plain = {seed: one.plain_SR[0] for seed, one in alone.items()}
        return Arm(name, recipe, round(steps), plain, {seed: one.fitted_SR[0] for seed, one in alone.items()})

    def ensemble(self, runs: Sequence[RunResult], pooling: str) -> EnsembleEvaluation:
        return evaluate_ensemble(
            [inspect_member(run.folder) for run in runs],
            self._store,
            folder=self._folder,
            pooling="logits" if pooling == "logits" else "arithmetic",
            rows_per_domain=ALL_ROWS,
            calibration_rows_per_domain=ALL_ROWS,
        )


def _error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
