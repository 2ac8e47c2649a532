"""The aligned model as a Hugging Face folder, with its tokenizer and chat template; adapters merged, and beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from mixwright.pretrain.model import cast_parameters, named_as_saved
from mixwright.pretrain.model_options.exporting import write_export
from mixwright.pretrain.rpo.config import PolicyModelConfig
from mixwright.pretrain.rpo.policy import PolicyModel, load_policy

ADAPTER = "adapter"


def write_policy(
    config: PolicyModelConfig, model: PolicyModel, parameters: dict[str, Tensor], tokenizer: Any, folder: Path
) -> None:
    """Write `parameters` (by PolicyModel name, whole) as a folder that `from_pretrained` reads; called on one rank.

    A model with adapters is written merged, and the adapters alone in `adapter`.
    """
    disable_progress_bar()
    if model.adapters is not None:
        whole = whole_policy(config, parameters, "cpu").float()
        whole.adapters.save_pretrained(folder / ADAPTER)
        whole.adapters.merge_and_unload().save_pretrained(folder)
    else:
        write_export(model, named_as_saved(model, parameters), parameters, folder)
    tokenizer.save_pretrained(folder)


def whole_policy(config: PolicyModelConfig, parameters: dict[str, Tensor], device: torch.device | str) -> PolicyModel:
    """A copy of the policy on this rank alone, from whole `parameters`: what is sharded cannot be sampled from."""
    model = lone_policy(config, device, next(iter(parameters.values())).dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameters[name])
    return model


def lone_policy(config: PolicyModelConfig, device: torch.device | str, dtype: torch.dtype) -> PolicyModel:
    """The model as it was before training, on this rank alone, ready to be sampled from."""
    plain = config.model_copy(update={"gradient_checkpointing": False})
    return cast_parameters(load_policy(plain, layout="padded").to(device), dtype).eval()
