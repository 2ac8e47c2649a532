"""Pictures of ensembles: losses by the number of members with their laws; what is extrapolated is dashed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from mixwright.launch.ensemble_scaling import Scaling
from mixwright.pretrain.ensemble.curve import EnsembleEvaluation
from mixwright.pretrain.ensemble.scaling import MemberLaw, PowerLaw

matplotlib.use("Agg")  # no display on a training node

from matplotlib import pyplot

FARTHEST = 4
"""How many times beyond the last measured point a law is drawn."""


def draw_scaling(found: Scaling, path: Path) -> None:
    """One panel over members; further ones over parameters and over text where there are laws."""
    panels = 1 + (found.over_parameters is not None) + (found.standard is not None)
    figure, axes = pyplot.subplots(1, panels, figsize=(6.5 * panels, 4.6), constrained_layout=True, squeeze=False)
    for evaluation, law in zip(found.evaluations, found.laws, strict=True):
        draw_curve(axes[0, 0], evaluation, law, found.fitted, f"{evaluation.num_parameters:,} parameters")
    axes[0, 0].set_title("loss by number of members")
    left = list(axes[0, 1:])
    if found.over_parameters is not None:
        floors = {float(e.num_parameters): law.law.floor for e, law in zip(found.evaluations, found.laws, strict=True)}
        _draw_law(left.pop(0), floors, found.over_parameters, "parameters", "floor E over members (extrapolated)")
    if found.standard is not None:
        _draw_law(left.pop(0), dict(found.standard_points), found.standard, "training tokens", "standard recipe")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_curve(axis: Any, evaluation: EnsembleEvaluation, law: MemberLaw, fitted: bool, label: str) -> None:
    """Means over subsets with errors, every subset as a dot, the law: solid where measured, dashed beyond."""
    points = evaluation.curve(fitted=fitted)
    losses_S = evaluation.losses(fitted=fitted).mean(axis=1)
    sizes = [len(subset) for subset in evaluation.subsets]
    ks = [point.k for point in points]
    line = axis.plot(ks, [point.loss for point in points], "o", label=label)[0]
    axis.plot(sizes, losses_S, ".", color=line.get_color(), alpha=0.35, markersize=4)
    _draw_beyond(axis, law.law, ks[0], ks[-1], line.get_color())
    axis.axhline(law.law.floor, color=line.get_color(), linewidth=0.8, linestyle=":")
    axis.set_xlabel("members K")
    axis.set_ylabel("test loss, nats per token")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, title="solid: fit, dashed: extrapolated, dotted: K to infinity", title_fontsize=7)


def _draw_law(axis: Any, points: dict[float, float], law: PowerLaw, name: str, title: str) -> None:
    xs = sorted(points)
    axis.plot(xs, [points[x] for x in xs], "o")
    _draw_beyond(axis, law, xs[0], xs[-1], "C0")
    axis.set_xscale("log")
    axis.set_xlabel(f"{name} (solid: fit, dashed: extrapolated)")
    axis.set_ylabel("test loss, nats per token")
    axis.set_title(title)
    axis.grid(alpha=0.25)


def _draw_beyond(axis: Any, law: PowerLaw, first: float, last: float, color: str) -> None:
    inside, outside = np.geomspace(first, last, 60), np.geomspace(last, FARTHEST * last, 60)
    axis.plot(inside, [law(float(x)) for x in inside], color=color, linewidth=1)
    axis.plot(outside, [law(float(x)) for x in outside], color=color, linewidth=1, linestyle="--")
