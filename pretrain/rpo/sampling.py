"""Completions sampled from a model after given prompts, and how far from its reference it is on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixwright.pretrain.rpo.groups import Group
from mixwright.pretrain.rpo.layout import PackedGroups, lay_out
from mixwright.pretrain.rpo.policy import PolicyModel

KL_BLOCK_TOKENS = 256
"""Tokens whose logits of both models are formed at a time."""


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are drawn: until one of `end_ids` or `max_new_tokens`, from logits divided by `temperature`."""

    max_new_tokens: int
    temperature: float
    end_ids: tuple[int, ...]


def end_ids(model: PolicyModel, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end what the model writes: those of its generation settings, and the tokenizer's end of text."""
    settings = getattr(model.causal_lm, "generation_config", None)
    stated = getattr(settings, "eos_token_id", None)
    found = [*(stated if isinstance(stated, list) else [stated]), tokenizer.eos_token_id]
    return tuple(dict.fromkeys(one for one in found if one is not None))


@torch.no_grad()
def sample_completions(
    model: PolicyModel, prompts: Sequence[NDArray[np.int32]], settings: SamplingSettings, seed: int
) -> list[NDArray[np.int32]]:
    """One completion per prompt, with the id that ended it; the same for one seed and list of prompts.

    A prompt without tokens begins with an end, as documents do.
    """
    filler = settings.end_ids[0] if settings.end_ids else 0
    begun = [prompt if len(prompt) else np.array([filler], np.int32) for prompt in prompts]
    width = max(map(len, begun))
    device = next(model.parameters()).device
    tokens_BT = torch.full((len(begun), width), filler, dtype=torch.int64)
    mask_BT = torch.zeros_like(tokens_BT)
    for row, prompt in enumerate(begun):
        tokens_BT[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask_BT[row, width - len(prompt) :] = 1
    torch.manual_seed(seed)
    was_training = model.training
    model.eval()
    rows_BS: Tensor = model.causal_lm.generate(
        input_ids=tokens_BT.to(device),
        attention_mask=mask_BT.to(device),
        do_sample=True,
        temperature=settings.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=list(settings.end_ids) or None,
        pad_token_id=filler,
        use_cache=True,
    )
    model.train(was_training)
    return [_until_end(row, settings.end_ids) for row in rows_BS[:, width:].cpu().numpy().astype(np.int32)]


def _until_end(completion: NDArray[np.int32], ends_at: tuple[int, ...]) -> NDArray[np.int32]:
    ends = np.flatnonzero(np.isin(completion, ends_at))
    return completion[: ends[0] + 1] if len(ends) else completion


@torch.no_grad()
def divergence_on_samples(
    policy: PolicyModel,
    reference: PolicyModel | None,
    prompts: Sequence[NDArray[np.int32]],
    completions: Sequence[NDArray[np.int32]],
) -> list[float]:
    """KL(policy || reference) over each completion, nats: the sum over its tokens of the divergence of next tokens.

    `reference` None is the policy without its adapters.

    Its mean over the policy's own samples is an unbiased estimate of the divergence of whole completions, with less
    noise than log-ratios of the samples (Rao-Blackwellised; spec/posttraining.md 5.4).
    """
    device = next(policy.parameters()).device
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if len(prompt) == 0 and len(completion) < 2:  # its one token is given, not predicted
            found.append(0.0)
            continue
        packed = lay_out([Group(0, prompt, (completion,))], "padded").to(device)
        hidden = [_predicting_states(policy, packed), _reference_states(policy, reference, packed)]
        parts = zip(*(torch.split(states_MD, KL_BLOCK_TOKENS) for states_MD in hidden), strict=True)
        found.append(sum(_divergence(policy, own_mD, reference or policy, other_mD) for own_mD, other_mD in parts))
    return found


def _predicting_states(model: PolicyModel, packed: PackedGroups) -> Tensor:
    """What the head is given for each predicted token of one sequence, [M, D]."""
    hidden_BTD: Tensor = model.backbone(input_ids=packed.tokens_BT, use_cache=False).last_hidden_state
    return hidden_BTD[0, packed.source_M]


def _reference_states(policy: PolicyModel, reference: PolicyModel | None, packed: PackedGroups) -> Tensor:
    if reference is not None:
        return _predicting_states(reference, packed)
    with policy.without_adapters():
        return _predicting_states(policy, packed)


def _divergence(policy: PolicyModel, own_mD: Tensor, reference: PolicyModel, other_mD: Tensor) -> float:
    own_mV = torch.log_softmax(policy.head.logits(own_mD), dim=-1)
    other_mV = torch.log_softmax(reference.head.logits(other_mD), dim=-1)
    return float((own_mV.exp() * (own_mV - other_mV)).sum())
