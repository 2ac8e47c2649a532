"""Weights in the style of Weight Compander: w = a arctan(v / b) in place of v, with a and b learned per matrix.

    |w| < a pi / 2        dw/dv = a b / (b**2 + v**2): a / b > 1 at 0, vanishing for |v| >> b

What is known of the paper's function is its abstract: weights are bounded and pushed away from 0. This is one such
function, and no claim about theirs (spec/methods.md 13). v starts where w is the model's own initial weight, so the
first forward is unchanged. Decay acts on v. a, b > 0 by softplus.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from mixwright.pretrain.errors import TrainingError
from mixwright.pretrain.model_options.config import WeightCompander

SMALLEST_PEAK = 1e-3
"""Stands for the largest weight of a matrix that begins as zeros."""


class Compander(nn.Module):
    """A parametrisation of one weight."""

    def __init__(self, weight: Tensor, config: WeightCompander) -> None:
        super().__init__()
        peak = max(float(weight.detach().abs().max()), SMALLEST_PEAK)
        height = 2 / math.pi * config.headroom * peak
        self.raw_height = _positive(height, config.learn)
        self.raw_width = _positive(height / config.slope, config.learn)

    def forward(self, v: Tensor) -> Tensor:
        return companded(v, self.raw_height, self.raw_width)

    def right_inverse(self, w: Tensor) -> Tensor:
        """v with companded(v) = w; |w| must be below the bound."""
        height, width = F.softplus(self.raw_height), F.softplus(self.raw_width)
        return width * torch.tan(w / height)


def companded(v: Tensor, raw_height: Tensor, raw_width: Tensor) -> Tensor:
    """a arctan(v / b), a = softplus(raw_height), b = softplus(raw_width), both [1]."""
    return F.softplus(raw_height) * torch.arctan(v / F.softplus(raw_width))


def _positive(value: float, learn: bool) -> nn.Parameter:
    """[1], of which softplus is `value`."""
    return nn.Parameter(torch.tensor([math.log(math.expm1(value))]), requires_grad=learn)


def compand(causal_lm: Any, config: WeightCompander) -> None:
    """Parametrise the weight of every linear projection but the output projection; embeddings and norms stay.

    Raises TrainingError when there is none.
    """
    head = causal_lm.get_output_embeddings()
    modules = [m for m in causal_lm.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    if not modules:
        raise TrainingError(
            f"options.weight_compander: model type {causal_lm.config.model_type!r} has no linear projection"
        )
    for module in modules:
        parametrize.register_parametrization(module, "weight", Compander(module.weight, config))


def merge(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` (full parameters by name) with plain weights in place of parametrised ones."""
    suffix = ".parametrizations.weight.original"
    merged = {name: value for name, value in state.items() if ".parametrizations.weight." not in name}
    for name in (name for name in state if name.endswith(suffix)):
        prefix = name.removesuffix("original")
        raw_height, raw_width = state[f"{prefix}0.raw_height"], state[f"{prefix}0.raw_width"]
        merged[name.removesuffix(suffix) + ".weight"] = companded(state[name], raw_height, raw_width)
    return merged
