"""The Hugging Face folder of a model with options: a plain model where there is one that computes the same.

late dropout, initialisation, BackSlash     nothing to do
weight compander                            w = a arctan(v / b) is written
stochastic experts                          the first expert of every layer, the one that evaluations use
normalised softmax of outputs               the scaled, normalised matrix is written; tied embeddings become untied
normalised softmax of hidden states         no plain model computes it: the body alone, the head in a file beside it
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mixwright.pretrain.errors import TrainingError
from mixwright.pretrain.head import LanguageModel
from mixwright.pretrain.model_options.compander import merge
from mixwright.pretrain.model_options.normalised_head import NormalisedHead
from mixwright.pretrain.model_options.stochastic_experts import first_paths

HEAD_FILE = "normalised_head.safetensors"


def write_export(model: LanguageModel, state: dict[str, Tensor], parameters: dict[str, Tensor], folder: Path) -> None:
    """Write configuration and weights. `state` has the causal model's names, `parameters` those of LanguageModel."""
    causal_lm, head = model.causal_lm, model.head
    state = first_paths(merge(state), causal_lm)
    if not isinstance(head, NormalisedHead):
        causal_lm.save_pretrained(folder, state_dict=state)
        return
    weight_VD = head.plain_weight(parameters["head.weight"], parameters["head.gain"]).contiguous()
    with _untied(causal_lm.config):
        if not head.hidden:
            causal_lm.save_pretrained(folder, state_dict=state | {f"{_output_name(causal_lm)}.weight": weight_VD})
            return
        prefix = f"{causal_lm.base_model_prefix}."
        body = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        causal_lm.base_model.save_pretrained(folder, state_dict=body)
    biases = {} if head.bias is None else {"bias": parameters["head.bias"]}
    save_file({"weight": weight_VD, **biases}, folder / HEAD_FILE, metadata={"hidden": "normalised to length 1"})


def how_to_load(folder: Path) -> str:
    """One line for the end of a run: what the folder holds."""
    if (folder / HEAD_FILE).exists():
        return (
            "transformers: AutoModel.from_pretrained, the body alone: its head normalises hidden states, which no "
            f"plain model does, and is in {HEAD_FILE}"
        )
    return "transformers: AutoModelForCausalLM.from_pretrained"


def refuse_export_without_head(folder: Path) -> None:
    """Raise TrainingError for a folder that holds a body only: a loaded model would get a random head."""
    if (folder / HEAD_FILE).exists():
        raise TrainingError(
            f"model.path: {str(folder)!r} holds the body of a model without its head, which normalises hidden states "
            f"and is beside it in {HEAD_FILE}; start from a run with options.normalised_softmax.normalise: output"
        )


@contextlib.contextmanager
def _untied(config: Any) -> Iterator[None]:
    """The head that is written is no longer the embedding; what is trained stays tied."""
    tied = config.tie_word_embeddings
    config.tie_word_embeddings = False
    try:
        yield
    finally:
        config.tie_word_embeddings = tied


def _output_name(causal_lm: Any) -> str:
    projection = causal_lm.get_output_embeddings()
    names: Iterator[str] = (name for name, module in causal_lm.named_modules() if module is projection)
    return next(names)
