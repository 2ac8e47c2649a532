"""From a configuration to a `transformers` model with a Head, and back to a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar

from mixwright.data_mixing.errors import nearest
from mixwright.pretrain.config import ModelConfig
from mixwright.pretrain.errors import TrainingError
from mixwright.pretrain.head import LanguageModel
from mixwright.pretrain.model_options.apply import fit_head, language_model
from mixwright.pretrain.model_options.config import ModelOptions
from mixwright.pretrain.model_options.exporting import refuse_export_without_head, write_export

PLAIN = ModelOptions()
"""No option at all."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Module = TypeVar("Module", bound=nn.Module)


def build_model(
    config: ModelConfig,
    *,
    vocab_size: int,
    sequence_length: int,
    eos_id: int,
    seed: int,
    options: ModelOptions = PLAIN,
) -> LanguageModel:
    """A new or loaded model that fits the token store, in float32; the same on every rank for one `seed`.

    Raises TrainingError when the model does not exist, cannot embed the store's tokens, has too few positions,
    computes its logits in a way that the Head does not reproduce, or has no place for one of the options.
    """
    torch.manual_seed(seed)
    causal_lm = _new(config.config, vocab_size, eos_id) if config.config else _load(str(config.path))
    _check_vocabulary(causal_lm.config, vocab_size)
    _check_positions(causal_lm.config, sequence_length)
    if config.gradient_checkpointing:
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    model = language_model(causal_lm, options, is_new=config.config is not None)
    _check_head(model, vocab_size)
    fit_head(model, options)
    if config.document_masks:
        model.document_end = eos_id
        _check_document_masks(model, eos_id)
    return model


def _new(settings: dict[str, Any], vocab_size: int, eos_id: int) -> Any:
    model_type = settings["model_type"]
    if model_type not in CONFIG_MAPPING_NAMES:
        raise TrainingError(
            f"model.config.model_type: no such model {model_type!r}{nearest(model_type, CONFIG_MAPPING_NAMES)}"
        )
    special = {"eos_token_id": eos_id, "bos_token_id": eos_id, "pad_token_id": None}  # nosec B105  # numbers of tokens
    defaults = {"vocab_size": vocab_size, **special}
    try:
        config = AutoConfig.for_model(**{**defaults, **settings})
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TrainingError(f"model.config: {model_type!r} cannot be built: {_one_line(error)}") from error


def _load(path: str) -> Any:
    refuse_export_without_head(Path(path))
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)  # nosec B615  # the user's model, without its code
    except (OSError, ValueError) as error:
        raise TrainingError(f"model.path: {path!r} cannot be loaded: {_one_line(error)}") from error


@torch.no_grad()
def _check_document_masks(model: LanguageModel, ends: int) -> None:
    """Try it: whether a document's losses depend on the one before it in the row is a matter of the model's code."""
    others = [token for token in range(4) if token != ends][:3]
    rows_BS = torch.tensor(
        [[others[0], ends, others[1], others[2], ends], [others[2], ends, others[1], others[2], ends]]
    )
    was_training = model.training
    try:
        losses_BT = model.eval()(rows_BS).nll_N.reshape(2, -1)
    except TypeError as error:
        raise TrainingError(f"model.document_masks: this model takes no position_ids: {_one_line(error)}") from error
    finally:
        model.train(was_training)
    if not torch.allclose(losses_BT[0, 2:], losses_BT[1, 2:], rtol=1e-4, atol=1e-5):
        kind = model.causal_lm.config.model_type
        raise TrainingError(
            f"model.document_masks: model type {kind!r} does not keep the documents of a row apart; set it to false"
        )


def _check_vocabulary(config: Any, vocab_size: int) -> None:
    if config.vocab_size < vocab_size:
        raise TrainingError(
            f"model.vocab_size = {config.vocab_size} is smaller than the token store's vocabulary of {vocab_size}: "
            "prepare the data with this model's tokenizer, or use a model with at least that vocabulary"
        )


def _check_positions(config: Any, sequence_length: int) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < sequence_length:
        raise TrainingError(
            f"the token store's sequence_length = {sequence_length} exceeds the model's "
            f"max_position_embeddings = {positions}: prepare shorter rows or use a model with more positions"
        )


@torch.no_grad()
def _check_head(model: LanguageModel, vocab_size: int) -> None:
    """Compare the Head with the model's own logits on a few tokens: some models scale or cap them in private."""
    training = model.training
    model.eval()
    tokens_BS = (torch.arange(16) * 7919 % vocab_size).reshape(2, 8)
    logits = model.causal_lm(input_ids=tokens_BS[:, :-1], use_cache=False).logits.float()
    expected_N = F.cross_entropy(logits.flatten(0, 1), tokens_BS[:, 1:].reshape(-1), reduction="none")
    difference = float((model(tokens_BS).nll_N - expected_N).abs().max())
    model.train(training)
    if not difference < 1e-3:
        raise TrainingError(
            f"model type {model.causal_lm.config.model_type!r} changes its logits after the output projection in a way "
            f"that the loss head does not know (losses differ by {difference:.3g} nats)"
        )


def export(model: LanguageModel, parameters: dict[str, Tensor], tokenizer_folder: Path, folder: Path) -> None:
    """Write a Hugging Face folder: full `parameters` (by LanguageModel name), configuration and tokenizer."""
    disable_progress_bar()
    write_export(model, named_as_saved(model, parameters), parameters, folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)  # nosec B615  # a local folder


def named_as_saved(model: LanguageModel, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """`parameters` (by LanguageModel name) and buffers by the names of the causal model, tied ones under each name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}  # a tied one by its first name
    own_parameters = model.causal_lm.named_parameters(remove_duplicate=False)
    state = {name: parameters[names[id(parameter)]] for name, parameter in own_parameters}
    buffers = model.causal_lm.state_dict().items()
    return state | {name: buffer for name, buffer in buffers if name not in state and buffer.numel()}


def cast_parameters(model: Module, dtype: torch.dtype) -> Module:
    """Bring the model's floating parameters to `dtype`, in place, and return it; tied ones stay tied.

    Buffers keep theirs, as under DeepSpeed: of rotary frequencies in bfloat16, angles at position 2000 are wrong by 0.2
    to 0.9 rad (heads of 8 to 64).
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def num_parameters(model: nn.Module) -> int:
    """Number of trained values; a parameter shared by two modules counts once (ZeRO-3 shards at their full size)."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
