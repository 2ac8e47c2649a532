"""What a linear head is given, checked once: the inputs every engine of `linear_nll` and `linear_loss` shares.

Letters in names: N tokens of the micro-batch, D hidden size, V vocabulary, n tokens of a block.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class HeadInputs(NamedTuple):
    """One head on one micro-batch: logits are `softcap(hidden @ weight.T + bias) * inv_temperature`.

    `softcap(x) = cap * tanh(x / cap)` belongs to the model, so the temperature divides what it returns.
    """

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    targets_N: Tensor
    inv_temperature_N: Tensor | None
    softcap: float | None
    ignore_index: int
    vocab_start: int = 0  # class of the weight's first row, where the weight is one shard of the vocabulary

    @property
    def row_dtype(self) -> torch.dtype:
        """Losses and row coefficients are float64 for double inputs, else float32."""
        return torch.float64 if self.hidden_ND.dtype == torch.float64 else torch.float32

    def has_target(self) -> Tensor:
        """Bool [N]: rows whose target is not ignored."""
        return self.targets_N != self.ignore_index

    def safe_targets(self) -> Tensor:
        """Targets with an arbitrary valid class where they are ignored, int64 [N]."""
        return torch.where(self.has_target(), self.targets_N, 0)

    def columns(self) -> Tensor:
        """Row of `weight_VD` that a target belongs to, int64 [N]: outside 0..V-1 if ignored or in another shard."""
        return torch.where(self.has_target(), self.targets_N - self.vocab_start, -1)

    def live_rows(self) -> Tensor:
        """Bool [N]: rows that have a target and a finite sum of hidden values. The others enter no matmul."""
        return self.hidden_ND.sum(1, dtype=self.row_dtype).isfinite() & self.has_target()

    def live_hidden(self) -> Tensor:
        """Hidden with zeros in the rows that are not live, so that 0 * NaN meets no sum; [N, D]."""
        return self.hidden_ND.masked_fill(~self.live_rows()[:, None], 0)

    def rows(self, span: slice) -> HeadInputs:
        """The same head on some of the rows."""
        inv_temperature_n = None if self.inv_temperature_N is None else self.inv_temperature_N[span]
        return self._replace(
            hidden_ND=self.hidden_ND[span], targets_N=self.targets_N[span], inv_temperature_N=inv_temperature_n
        )


def check_head(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    softcap: float | None,
    *,
    may_be_empty: bool = False,
) -> None:
    """Raise ValueError or TypeError, in one line, for shapes, dtypes or devices that do not fit together.

    `may_be_empty`: the weight is a shard and may have no rows.
    """
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden {list(hidden_ND.shape)} and weight {list(weight_VD.shape)} do not fit: expected [N, D] and [V, D]"
        )
    if weight_VD.shape[0] == 0 and not may_be_empty:
        raise ValueError("weight has no rows: a head needs at least one class")
    if targets_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"targets have shape {list(targets_N.shape)}, expected [{hidden_ND.shape[0]}] like hidden")
    if targets_N.dtype != torch.int64:
        raise TypeError(f"targets are {targets_N.dtype}, expected torch.int64")
    if hidden_ND.dtype not in FLOAT_DTYPES:
        raise TypeError(f"hidden is {hidden_ND.dtype}, expected one of float32, bfloat16, float16, float64")
    for name, tensor in (("weight", weight_VD), ("bias", bias_V)):
        if tensor is not None and tensor.dtype != hidden_ND.dtype:
            raise TypeError(f"{name} is {tensor.dtype} but hidden is {hidden_ND.dtype}: cast one of them first")
    if bias_V is not None and bias_V.shape != weight_VD.shape[:1]:
        raise ValueError(f"bias has shape {list(bias_V.shape)}, expected [{weight_VD.shape[0]}]")
    for name, tensor in (("weight", weight_VD), ("targets", targets_N), ("bias", bias_V)):
        if tensor is not None and tensor.device != hidden_ND.device:
            raise ValueError(f"{name} is on {tensor.device} but hidden is on {hidden_ND.device}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap is {softcap}, expected a positive number or None")


def inverse_temperature(temperature: float | Tensor, hidden_ND: Tensor, row_dtype: torch.dtype) -> Tensor | None:
    """1/temperature per row, [N] in the row dtype; None for the plain temperature 1."""
    if isinstance(temperature, Tensor):
        if temperature.requires_grad:
            raise ValueError("temperature requires a gradient, which linear_nll does not compute: detach it")
        if temperature.ndim and temperature.shape != hidden_ND.shape[:1]:
            raise ValueError(f"temperature has shape {list(temperature.shape)}, expected [] or [{hidden_ND.shape[0]}]")
        return temperature.to(hidden_ND.device, row_dtype).reciprocal().expand(hidden_ND.shape[0]).contiguous()
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}, expected a positive number")
    if temperature == 1.0:
        return None
    return torch.full(hidden_ND.shape[:1], 1.0 / temperature, dtype=row_dtype, device=hidden_ND.device)


def refuse_targets_out_of_range(targets_N: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raise IndexError naming the first offending row. Only for CPU tensors: on a GPU it would wait for the device."""
    outside_N = ((targets_N < 0) | (targets_N >= vocabulary)) & (targets_N != ignore_index)
    if bool(outside_N.any()):
        row = int(outside_N.nonzero()[0])
        raise IndexError(
            f"target {int(targets_N[row])} at row {row} is outside 0..{vocabulary - 1} "
            f"and is not ignore_index={ignore_index}"
        )
