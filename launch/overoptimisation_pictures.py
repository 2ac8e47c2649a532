"""The study of overoptimisation as a picture: one row of panels per part, colours by eta alike in all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

from mixwright.launch.overoptimisation_findings import Arm, sweep_of
from mixwright.launch.overoptimisation_study import Part

matplotlib.use("Agg")  # no display on a training node

from matplotlib import pyplot

Panel = Callable[[Any, Mapping[str, Arm]], None]


def draw(parts: Mapping[Part, Mapping[str, Arm]], path: Path) -> None:
    """Three panels for each part that has trials."""
    rows = [(part, arms) for part, arms in parts.items() if arms]
    figure, axes = pyplot.subplots(len(rows), 3, figsize=(15, 4.3 * len(rows)), constrained_layout=True, squeeze=False)
    for (part, arms), (*row,) in zip(rows, axes, strict=True):
        for axis, panel in zip(row, _PANELS[part], strict=True):
            panel(axis, arms)
            axis.grid(alpha=0.25)
        row[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _over_steps(title: str, name: str, ylabel: str) -> Panel:
    """A figure of the sweep over optimizer steps; bands are standard errors over seeds."""

    def panel(axis: Any, arms: Mapping[str, Arm]) -> None:
        for arm, color in _coloured(sweep_of(arms)):
            mean, error = _mean_and_error(arm.curves(name))
            steps = np.array(arm.steps) + 1
            axis.plot(steps, mean, color=color, label=_label(arm))
            axis.fill_between(steps, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
        _as_steps(axis, title, ylabel)

    return panel


def _over_distance(title: str) -> Panel:
    """Gold reward over the root of the divergence, means over seeds at equal steps; a dot where training ends."""

    def panel(axis: Any, arms: Mapping[str, Arm]) -> None:
        for arm, color in _coloured(sweep_of(arms)):
            distance = np.sqrt(arm.curves("kl").mean(axis=0).clip(min=0))  # rounding, at the reference
            reward, _ = _mean_and_error(arm.curves("reward"))
            axis.plot(distance, reward, color=color)
            axis.plot(distance[-1:], reward[-1:], "o", color=color)
        _with_reference(axis, arms)
        axis.set_xlabel("square root of KL(policy || reference), nats; dot: end of training")
        axis.set_ylabel("gold reward")
        axis.set_title(title)

    return panel


def _gold_over_steps(title: str) -> Panel:
    lines = _over_steps(title, "reward", "gold reward (band: standard error over seeds)")

    def panel(axis: Any, arms: Mapping[str, Arm]) -> None:
        lines(axis, arms)
        _with_reference(axis, arms)

    return panel


def _controls(axis: Any, arms: Mapping[str, Arm]) -> None:
    """Gold reward of what is compared with the sweep, beside both of its compared arms."""
    wanted = [arm for arm in arms.values() if arm.eta in (None, 0.0, 0.2)]
    for number, arm in enumerate(wanted):
        is_swept = arm.eta is not None
        color = "0.2" if arm.eta == 0 else "0.6" if is_swept else f"C{number}"
        mean, _ = _mean_and_error(arm.curves("reward"))
        axis.plot(np.array(arm.steps) + 1, mean, color=color, linestyle="--" if is_swept else "-", label=arm.name)
    _with_reference(axis, arms)
    _as_steps(axis, "language: controls beside eta 0 and 0.2", "gold reward")
    axis.legend(fontsize=8)


def _with_reference(axis: Any, arms: Mapping[str, Arm]) -> None:
    start = np.mean([record.curve("reward")[0] for arm in arms.values() for record in arm.by_seed.values()])
    axis.axhline(float(start), color="0.4", linestyle=":", linewidth=1, label="reference policy")


def _as_steps(axis: Any, title: str, ylabel: str) -> None:
    axis.set_xscale("log")
    axis.set_xlabel("optimizer steps + 1")
    axis.set_ylabel(ylabel)
    axis.set_title(title)


def _coloured(sweep: Sequence[Arm]) -> list[tuple[Arm, Any]]:
    colours = pyplot.get_cmap("viridis")(np.linspace(0, 0.9, max(len(sweep), 1)))
    return list(zip(sweep, colours, strict=False))


def _label(arm: Arm) -> str:
    return f"eta {arm.eta:g}" + (" (DPO)" if arm.eta == 0 else "")


def _mean_and_error(curves: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    mean: NDArray[np.float64] = curves.mean(axis=0)
    if len(curves) == 1:
        return mean, np.zeros_like(mean)
    return mean, curves.std(axis=0, ddof=1) / np.sqrt(len(curves))


_PANELS: Mapping[Part, tuple[Panel, Panel, Panel]] = {
    "bandit": (
        _gold_over_steps("bandit: gold reward"),
        _over_distance("bandit: gold reward by distance"),
        _over_steps("bandit: probability of uncovered actions", "uncovered", "probability"),
    ),
    "gold": (_gold_over_steps("language: gold reward"), _over_distance("language: gold reward by distance"), _controls),
    "text": (
        _over_steps("mathematics: accuracy on held-out pairs", "held_out_accuracy", "accuracy"),
        _over_steps("mathematics: held-out chosen answers", "held_out_chosen_logp", "log p, nats per token"),
        _over_steps("mathematics: divergence on samples", "kl", "KL(policy || reference), nats"),
    ),
}
