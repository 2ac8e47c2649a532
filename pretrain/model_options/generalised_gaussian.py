"""Initial matrices from a generalised Gaussian, density ~ exp(-|x / a|**shape), of variance xi / fan-in.

    |x| = a g**(1 / shape),  g ~ Gamma(1 / shape),  a**2 = variance * Gamma(1 / shape) / Gamma(3 / shape)

Fan-in is what a projection sums over: columns of a Linear [out, in], rows of GPT-2's Conv1D [in, out]. An embedding
sums nothing and an output projection may share its matrix: both keep the standard deviation that the model gives
them. Norms and biases stay. Source: spec/methods.md 14.3, without the fan-out that the authors' code takes for fan-in.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mixwright.pretrain.errors import TrainingError
from mixwright.pretrain.model_options.config import GeneralisedGaussianInit

RESIDUAL_WRITERS = frozenset(
    ("o_proj", "down_proj", "c_proj", "out_proj", "dense", "dense_4h_to_h", "fc2", "fc_out", "wo", "w2")
)
"""Names that `transformers` models give to the last projection of an attention or MLP block."""


@torch.no_grad()
def initialise(causal_lm: Any, config: GeneralisedGaussianInit) -> None:
    """Draw every matrix of a new model anew, with torch's global generator.

    Raises TrainingError for a parameter whose fan-in is not known, or when nothing is found to scale by depth.
    """
    head = causal_lm.get_output_embeddings()
    done: set[int] = set()
    num_writers = 0
    for name, module in causal_lm.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or id(weight) in done or weight.ndim < 2:
            continue
        if isinstance(module, nn.Embedding) or module is head:
            _fill(weight, config.shape, float(weight.std()))
            _clear_padding(module)
        elif isinstance(module, nn.Linear | Conv1D):
            writes = config.residual_scaling and name.rpartition(".")[2] in RESIDUAL_WRITERS
            num_writers += writes
            depth = 2 * causal_lm.config.num_hidden_layers if writes else 1
            _fill(weight, config.shape, math.sqrt(config.xi / (_fan_in(module) * depth)))
        else:
            continue
        done.add(id(weight))
    _check_complete(causal_lm, done)
    if config.residual_scaling and not num_writers:
        raise TrainingError(
            f"options.generalised_gaussian_init: no projection into the residual stream is known in model type "
            f"{causal_lm.config.model_type!r}; set residual_scaling: false to draw it without"
        )


def draw(shape: float, std: float, size: torch.Size) -> Tensor:
    """Independent values with mean 0 and standard deviation `std`, float32."""
    magnitude = torch.distributions.Gamma(1 / shape, 1.0).sample(size) ** (1 / shape)
    scale = std * math.exp((math.lgamma(1 / shape) - math.lgamma(3 / shape)) / 2)
    sign = torch.randint(0, 2, size).mul_(2).sub_(1)
    return magnitude.mul_(scale).mul_(sign)


def _fill(weight: Tensor, shape: float, std: float) -> None:
    weight.copy_(draw(shape, std, weight.shape))


def _fan_in(projection: nn.Linear | Conv1D) -> int:
    return int(projection.weight.shape[1 if isinstance(projection, nn.Linear) else 0])


def _clear_padding(module: nn.Module) -> None:
    if getattr(module, "padding_idx", None) is not None:
        module.weight[module.padding_idx].zero_()  # type: ignore[index]


def _check_complete(causal_lm: nn.Module, done: set[int]) -> None:
    for name, parameter in causal_lm.named_parameters():
        if parameter.ndim >= 2 and id(parameter) not in done:
            raise TrainingError(
                f"options.generalised_gaussian_init: the fan-in of {name} {list(parameter.shape)} is not known (only "
                "those of linear projections are)"
            )
