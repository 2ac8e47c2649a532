"""Normalised softmax: logits are a scale times W_v / |W_v|, h / |h| or both, through `linear_nll`.

    normalise: output     z_v = s <h, W_v / |W_v|>              a plain head with other weights: exported as one
    normalise: hidden     z_v = s <h / |h|, W_v>                no plain head computes it: exported apart from the body
    normalise: both       z_v = s <h / |h|, W_v / |W_v|>        likewise

Both operands are normalised outside the kernel, in float32: V D + N D values more, never N V. s = s_0 exp(gain), so
that the learned value moves by ratios and is positive.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixwright.pretrain.head import Head
from mixwright.pretrain.model_options.config import NormalisedSoftmax


class NormalisedHead(Head):
    """A Head with the parameters of the one that it replaces, and the logarithm of its scale's gain, [1]."""

    def __init__(self, head: Head, config: NormalisedSoftmax) -> None:
        super().__init__(head, head.softcap, head.temperature)
        self.outputs, self.hidden = config.normalise != "hidden", config.normalise != "output"
        self.first_scale = config.scale or unit_variance_scale(head.weight, config)
        self.gain = nn.Parameter(torch.zeros(1), requires_grad=config.learn_scale)

    def operands(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        """What the kernel is given: normalised as configured, hidden states times the scale."""
        scaled_ND = (_unit(hidden_ND) if self.hidden else _wide(hidden_ND)) * self._scale(self.gain)
        weight_VD = _unit(self.weight) if self.outputs else self.weight
        return scaled_ND.to(hidden_ND.dtype), weight_VD.to(self.weight.dtype)

    def _scale(self, gain: Tensor) -> Tensor:
        return self.first_scale * torch.exp(_wide(gain))

    def plain_weight(self, weight_VD: Tensor, gain: Tensor) -> Tensor:
        """The matrix that gives these logits as `hidden @ matrix.T` (of normalised hidden, where they are)."""
        directions_VD = _unit(weight_VD) if self.outputs else _wide(weight_VD)
        return (directions_VD * self._scale(gain)).to(weight_VD.dtype)


def unit_variance_scale(weight_VD: Tensor, config: NormalisedSoftmax) -> float:
    """The scale whose first logits have about unit variance, for hidden states of unit mean square."""
    width = math.sqrt(weight_VD.shape[1])
    if config.normalise == "both":
        return width
    return 1.0 if config.normalise == "output" else width / float(weight_VD.detach().norm(dim=1).mean())


def _unit(rows_XD: Tensor) -> Tensor:
    """Rows of length 1, float32 or wider; rows of zeros stay zeros."""
    return F.normalize(_wide(rows_XD), dim=-1)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
