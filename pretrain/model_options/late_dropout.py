"""Dropout that is off first and on later: repeated data need it, early learning does without (spec/methods.md 18).

The rate is a function of the step alone, so there is nothing to checkpoint.
"""

from __future__ import annotations

from torch import nn

from mixwright.pretrain.errors import TrainingError
from mixwright.pretrain.model_options.config import LateDropout
from mixwright.pretrain.schedules import has_dropout


def late_dropout_probability(config: LateDropout, step: int) -> float:
    """Probability at optimizer step `step` (0-based): 0 before `start_step`, `p` from `start_step + ramp_steps - 1`."""
    if step < config.start_step:
        return 0.0
    return config.p * min((step - config.start_step + 1) / max(config.ramp_steps, 1), 1.0)


def check_can_drop(causal_lm: nn.Module, model_type: str) -> None:
    """Raise TrainingError when the model has no place where dropout could be switched on."""
    if not has_dropout(causal_lm):
        raise TrainingError(
            f"options.late_dropout: model type {model_type!r} has nothing to drop (no nn.Dropout module, no dropout "
            "attribute of its attention)"
        )
