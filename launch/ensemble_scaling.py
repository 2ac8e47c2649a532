"""What evaluations of ensembles say about more members, more parameters and more text; the table of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mixwright.launch.console import RunConsole
from mixwright.pretrain.ensemble.curve import EnsembleEvaluation
from mixwright.pretrain.ensemble.scaling import (
    DataMultiple,
    Interval,
    MemberLaw,
    PowerLaw,
    Prediction,
    data_multiple,
    fit_power,
    member_law,
    predict_last,
)


@dataclass(frozen=True)
class Scaling:
    """Evaluations with their laws over members; `over_parameters` is the law of their floors, `standard` over tokens.

    `standard_points` are losses of the standard recipe by tokens.
    """

    evaluations: tuple[EnsembleEvaluation, ...]
    fitted: bool
    laws: tuple[MemberLaw, ...]
    predictions: tuple[Prediction | None, ...]
    over_parameters: PowerLaw | None
    standard_points: Mapping[float, float]
    standard: PowerLaw | None
    tokens: float | None

    @classmethod
    def of(
        cls,
        evaluations: Sequence[EnsembleEvaluation],
        *,
        fitted: bool,
        standard: Mapping[float, float],
        tokens: float | None,
    ) -> Scaling:
        """Fit all that there are points for. Raises EnsembleError for an ensemble of fewer than three members."""
        laws = tuple(member_law(evaluation, fitted=fitted) for evaluation in evaluations)
        floors = {e.num_parameters: law.law.floor for e, law in zip(evaluations, laws, strict=True)}
        return cls(
            evaluations=tuple(evaluations),
            fitted=fitted,
            laws=laws,
            predictions=tuple(predict_last(e, fitted=fitted) if len(e.members) >= 4 else None for e in evaluations),
            over_parameters=fit_power(list(floors), list(floors.values())) if len(floors) >= 3 else None,
            standard_points=dict(standard),
            standard=fit_power(list(standard), list(standard.values())) if len(standard) >= 3 else None,
            tokens=tokens,
        )

    def multiple(self, loss: float) -> DataMultiple | None:
        """How many times the text the standard recipe would need; None without its law."""
        if self.standard is None or self.tokens is None:
            return None
        return data_multiple(self.standard, loss, self.tokens)


def show_scaling(found: Scaling, console: RunConsole) -> None:
    """Print the laws; what is extrapolated is called so."""
    header = ["parameters", "K", "found at K", "E (K to infinity)", "A", "alpha", "predicted from K - 1"]
    rows = []
    for evaluation, law, prediction in zip(found.evaluations, found.laws, found.predictions, strict=True):
        last = evaluation.curve(fitted=found.fitted)[-1]
        rows.append(
            [
                f"{evaluation.num_parameters:,}",
                str(last.k),
                f"{last.loss:.4f}",
                f"{law.law.floor:.4f} {_show(law.floor)}",
                f"{law.law.scale:.4f}",
                f"{law.law.exponent:.2f} {_show(law.exponent)}",
                "" if prediction is None else f"{prediction.predicted:.4f} ({prediction.error:+.4f})",
            ]
        )
    console.table("L = E + A / K^alpha (95 % intervals over rows; E is extrapolated)", header, rows)
    for law in found.laws:
        if law.law.is_thin:
            console.say(f"{law.law.num_points} points for three parameters: the exponent is not to be trusted")
    if found.over_parameters is not None:
        over = found.over_parameters
        console.say(
            f"floors over parameters N: E = {over.floor:.4f} + {over.scale:.4g} / N^{over.exponent:.2f} "
            f"({over.num_points} points); both to infinity, extrapolated: {over.floor:.4f}"
        )
    for evaluation, law in zip(found.evaluations, found.laws, strict=True):
        best = evaluation.curve(fitted=found.fitted)[-1]
        for name, loss in ((f"K = {best.k}", best.loss), ("K to infinity", law.law.floor)):
            multiple = found.multiple(loss)
            if multiple is not None:
                console.say(f"{evaluation.num_parameters:,} parameters, {name}: {describe_multiple(multiple)}")


def describe_multiple(multiple: DataMultiple) -> str:
    """One line."""
    if math.isinf(multiple.multiple):
        return "below what the standard recipe's law reaches with any amount of text"
    note = ", extrapolated beyond the text it was measured on" if multiple.extrapolates else ""
    return f"as the standard recipe with {multiple.multiple:.2f}x the text{note}"


def _show(interval: Interval) -> str:
    return f"({interval.low:.2f} to {interval.high:.2f})"
