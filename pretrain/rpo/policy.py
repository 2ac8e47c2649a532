"""The model to align: log-probabilities of completions, without padding and without logits of all tokens.

P groups, C completions of each, M predicted tokens, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from mixwright.data_mixing.answers import one_line
from mixwright.kernels.linear_nll import TokenLosses
from mixwright.pretrain.errors import TrainingError
from mixwright.pretrain.head import LanguageModel
from mixwright.pretrain.rpo import attention
from mixwright.pretrain.rpo.config import Layout, LoraConfig, PolicyModelConfig
from mixwright.pretrain.rpo.groups import CompletionLogProbs, Group
from mixwright.pretrain.rpo.layout import PackedGroups, lay_out
from mixwright.pretrain.rpo.model_folder import find_model
from mixwright.pretrain.schedules import apply_dropout

TOLERANCE = 1e-4
"""Nats per token by which log-probabilities of a layout may differ from those of plain forwards."""
TRIED_WINDOW = 4
"""Tokens of sliding windows while layouts are tried, so that groups of a few tokens reach beyond them."""


class PolicyModel(LanguageModel):
    """A `transformers` causal language model that is asked how likely completions are.

    `adapters` is peft's face of the same model where it trains low-rank adapters, else None.
    """

    adapters: Any

    def __init__(self, causal_lm: Any, adapters: Any = None) -> None:
        super().__init__(causal_lm)
        object.__setattr__(self, "adapters", adapters)  # not a submodule: its parameters are the backbone's

    def forward(  # type: ignore[override]  # a policy reads groups of completions where its base reads rows
        self, packed: PackedGroups, entropy: bool = False
    ) -> CompletionLogProbs:
        """Sums of log-probabilities of all completions, differentiable; `entropy` adds those of the predictions.

        Raises ValueError for blocks if the model was loaded for the padded layout.
        """
        hidden_MD = self._hidden_states(packed).flatten(0, 1).index_select(0, packed.source_M)
        losses: TokenLosses = self.head(hidden_MD, packed.target_M, precise=True, entropy=entropy)
        return CompletionLogProbs(
            logp_PC=_sums(-losses.nll_N, packed.length_PC),
            length_PC=packed.length_PC,
            entropy_PC=None if losses.entropy_N is None else _sums(losses.entropy_N.detach(), packed.length_PC),
        )

    def _hidden_states(self, packed: PackedGroups) -> Tensor:
        """What the head is given, [B, T, D]."""
        options: dict[str, Any] = {}
        if packed.blocks is not None:
            if not attention.is_installed(self.causal_lm):
                raise ValueError("this model was loaded for the padded layout: it would not keep blocks apart")
            mask = attention.no_mask(packed.tokens_BT)
            options = {"position_ids": packed.positions_BT, "attention_mask": mask, "blocks": packed.blocks}
        hidden_BTD: Tensor = self.backbone(input_ids=packed.tokens_BT, use_cache=False, **options).last_hidden_state
        return hidden_BTD

    def without_adapters(self) -> AbstractContextManager[None]:
        """Within it the model is the one that was loaded, which the reference is where adapters are trained.

        Raises ValueError without adapters: there is no way back to the parameters that were loaded.
        """
        if self.adapters is None:
            raise ValueError("this model trains no adapters, which could be left out")
        without: AbstractContextManager[None] = self.adapters.disable_adapter()
        return without


def load_policy(
    config: PolicyModelConfig, *, layout: Layout, max_tokens: int | None = None, seed: int = 0
) -> PolicyModel:
    """The model of a configuration in float32, without dropout; new adapters are drawn with `seed`.

    `max_tokens` are those of the longest prompt with a completion, for which the model must have positions.

    Log-probabilities of a few groups in `layout` are compared with plain forwards: whether a model keeps packed
    sequences apart, or changes its logits after the head, is a matter of its code. Raises TrainingError for a model
    that cannot be loaded, does not pass this trial, or has no place for the adapters.
    """
    causal_lm = _load(find_model(config.path))
    _check_positions(causal_lm.config.get_text_config(), max_tokens)
    _remove_dropout(causal_lm)
    groups = _tried_groups(causal_lm.config.get_text_config().vocab_size)
    with _narrow_windows(causal_lm):
        expected_PC = plain_log_probs(causal_lm, groups)
        found_PC = _try_layout(causal_lm, groups, layout)
    _compare(found_PC, expected_PC, groups, causal_lm.config.model_type, layout)
    adapters = None if config.lora is None else _add_adapters(causal_lm, config.lora, seed)
    if config.gradient_checkpointing:
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    return PolicyModel(causal_lm, adapters).train()


@torch.no_grad()
def plain_log_probs(causal_lm: Any, groups: Sequence[Group]) -> Tensor:
    """What `PolicyModel` computes, [P, C], from the model's own logits and one sequence at a time."""
    was_training = causal_lm.training
    causal_lm.eval()
    rows = []
    for group in groups:
        for completion in group.completions:
            tokens_T = torch.from_numpy(np.concatenate([group.prompt, completion]).astype(np.int64))
            logits_TV = causal_lm(input_ids=tokens_T[None, :-1], use_cache=False).logits[0]
            logp_T = torch.log_softmax(logits_TV.double(), 1).gather(1, tokens_T[1:, None])[:, 0]
            rows.append(logp_T[max(len(group.prompt) - 1, 0) :].sum())
    causal_lm.train(was_training)
    return torch.stack(rows).reshape(len(groups), -1)


def _sums(values_M: Tensor, length_PC: Tensor) -> Tensor:
    """Sums over the tokens of each completion, float32 [P, C], added up in float64 in the order of the tokens."""
    sums = torch.segment_reduce(values_M.double(), "sum", lengths=length_PC.flatten(), unsafe=True)
    return sums.reshape(length_PC.shape).float()


def _load(folder: Path) -> Any:
    disable_progress_bar()
    try:
        # A local folder, so no revision of the hub (bandit B615).
        causal_lm, report = AutoModelForCausalLM.from_pretrained(  # nosec B615
            folder, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise TrainingError(f"model.path: {str(folder)!r} cannot be loaded: {one_line(error)}") from None
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise TrainingError(f"model.path: {str(folder)!r} lacks {len(missing)} parameters, the first {missing[0]!r}")
    return causal_lm


def _check_positions(config: Any, max_tokens: int | None) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    if max_tokens is not None and positions is not None and positions < max_tokens:
        raise TrainingError(
            f"sequences of up to {max_tokens} tokens exceed the model's max_position_embeddings = {positions}: cut the "
            "pairs (data.max_tokens), sample less (evaluation.max_new_tokens) or use a model with more positions"
        )


def _remove_dropout(causal_lm: Any) -> None:
    """With dropout the policy would differ from its reference before the first step."""
    apply_dropout(causal_lm, 0.0)
    for module in causal_lm.modules():
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):  # what a model's own code hands to F.dropout
                setattr(module, name, 0.0)


def _add_adapters(causal_lm: Any, config: LoraConfig, seed: int) -> Any:
    """Freeze the model and put low-rank adapters into it; returns peft's face of it."""
    try:
        import peft
    except ImportError:
        raise TrainingError("model.lora needs the package peft: pip install 'mixwright[lora]'") from None
    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    projection = causal_lm.get_output_embeddings()
    torch.manual_seed(seed)
    try:
        adapters = peft.get_peft_model(
            causal_lm,
            peft.LoraConfig(
                task_type="CAUSAL_LM",
                r=config.rank,
                lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides it by the rank, whole or not
                lora_dropout=config.dropout,
                target_modules=targets,
            ),
        )
    except ValueError as error:
        raise TrainingError(f"model.lora.target_modules: {targets!r}: {one_line(error)}") from None
    if causal_lm.get_output_embeddings() is not projection:
        raise TrainingError(
            f"model.lora.target_modules: {targets!r} takes in the output projection, which the loss head reads without "
            "adapters: leave it out"
        )
    return adapters


def _tried_groups(vocab_size: int) -> list[Group]:
    """Unequal groups: long and short prompts and completions, one of a single token, one prompt that is empty."""
    tokens = (np.arange(64) * 7919 % vocab_size).astype(np.int32)
    lengths = [(7, (5, 3)), (1, (1, 6)), (0, (4, 2)), (3, (9, 1))]
    groups, place = [], 0
    for index, (num_prompt, (num_chosen, num_rejected)) in enumerate(lengths):
        prompt, chosen, rejected, _ = np.split(tokens[place:], np.cumsum([num_prompt, num_chosen, num_rejected]))
        groups.append(Group(index, prompt, (chosen, rejected)))
        place += groups[-1].num_tokens
    return groups


@torch.no_grad()
def _try_layout(causal_lm: Any, groups: Sequence[Group], layout: Layout) -> Tensor:
    kind = causal_lm.config.model_type
    try:
        if layout != "padded":
            attention.install(causal_lm)
        return PolicyModel(causal_lm).train()(lay_out(groups, layout)).logp_PC  # type: ignore[no-any-return]
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        raise TrainingError(
            f"model type {kind!r} cannot be given the layout {layout!r}: {one_line(error)}{_way_out(layout)}"
        ) from error


def _compare(found_PC: Tensor, expected_PC: Tensor, groups: Sequence[Group], kind: str, layout: Layout) -> None:
    length_PC = lay_out(groups, layout).length_PC
    difference = float(((found_PC - expected_PC).abs() / length_PC).max())
    if not difference < TOLERANCE:
        raise TrainingError(
            f"model type {kind!r} gives other log-probabilities in training with the layout {layout!r} than in plain "
            f"forwards (by {difference:.3g} nats per token){_way_out(layout)}"
        )


def _way_out(layout: Layout) -> str:
    return "" if layout == "padded" else "; use training.layout: padded"


@contextlib.contextmanager
def _narrow_windows(causal_lm: Any) -> Iterator[None]:
    """Give attention that sees a window of tokens a window of a few, wherever `transformers` keeps its size."""
    holders = [causal_lm.config, causal_lm.config.get_text_config(), *causal_lm.modules()]
    windows = {
        (id(holder), name): (holder, name, size)
        for holder in holders
        for name in ("sliding_window", "attention_chunk_size")
        if isinstance(size := getattr(holder, name, None), int) and size > 0
    }
    for holder, name, _ in windows.values():
        setattr(holder, name, TRIED_WINDOW)
    try:
        yield
    finally:
        for holder, name, size in windows.values():
            setattr(holder, name, size)
