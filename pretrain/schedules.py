"""Learning rate and dropout as pure functions of the optimizer step: nothing to checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import nn

from mixwright.pretrain.config import DropoutPoint, ScheduleConfig


def learning_rate(config: ScheduleConfig, peak: float, step: int, num_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based) of `num_steps`.

    Warm-up is linear and reaches `peak` at step `warmup_steps - 1`; the decay reaches `final_ratio * peak` at
    the last step.
    """
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.kind == "constant":
        return peak
    decay_start = config.warmup_steps if config.kind == "cosine" else num_steps - config.decay_steps
    progress = min(max((step - decay_start + 1) / (num_steps - decay_start), 0.0), 1.0)
    if config.kind == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    return peak * (1 - (1 - config.final_ratio) * progress)


def dropout_probability(points: Sequence[DropoutPoint], step: int) -> float | None:
    """Probability in force at `step`, None before the first point (the model's own setting stays)."""
    reached = [point.p for point in points if point.step <= step]
    return reached[-1] if reached else None


def apply_dropout(model: nn.Module, p: float) -> None:
    """Set every dropout probability of a `transformers` model: dropout modules and attention dropout."""
    for module, name in _dropout_places(model):
        setattr(module, name, p)


def has_dropout(model: nn.Module) -> bool:
    """Whether `apply_dropout` finds anything to set."""
    return next(_dropout_places(model), None) is not None


def _dropout_places(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            yield module, "p"
        elif isinstance(getattr(module, "attention_dropout", None), float | int):
            yield module, "attention_dropout"
