"""Attention for rows that hold many prompts and completions: no token of padding, no N x N mask.

Any `transformers` model that looks its attention up by name and hands keyword arguments on to it can be given this one.
A block [prompt | first | second | ...] costs one causal call for prompt and first completion, and for every other
completion one call with its own queries and the keys [prompt | completion].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mixwright.pretrain.rpo.layout import Block

NAME = "mixwright_blocks"
NOT_OURS = {"softcap": "a soft cap", "position_bias": "a position bias", "s_aux": "sinks"}
"""What some models ask of their attention and torch's fused kernels cannot do, by the name of the argument."""


def install(causal_lm: Any) -> None:
    """Let a model attend in blocks where its forward is given `blocks`; without them its attention is torch's.

    Raises ValueError for a model whose attention cannot be replaced.
    """
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    causal_lm.set_attn_implementation(NAME)
    if not is_installed(causal_lm):  # transformers says so in a warning only
        raise ValueError("its attention cannot be replaced")


def is_installed(causal_lm: Any) -> bool:
    """Whether a model's forward knows `blocks`."""
    return bool(causal_lm.config.get_text_config()._attn_implementation == NAME)


def no_mask(tokens_BT: Tensor) -> Tensor:
    """What to give as a model's `attention_mask` beside `blocks`: four dimensions, which models take for ready-made."""
    return tokens_BT.new_zeros((1, 1, 1, 1), dtype=torch.bool)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    blocks: Sequence[Block] | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`transformers`' attention function: queries [1, H, N, D], keys and values [1, G, N, D] in, [1, N, H, D] out.

    Raises ValueError where the model wants something of its attention that only its own code knows.
    """
    if blocks is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return output, None
    for name, meaning in NOT_OURS.items():
        if options.get(name) is not None:
            raise ValueError(f"its attention has {meaning}")
    sizes = [size for block in blocks for size in _calls(block)]
    grouped = {"enable_gqa": True} if key.shape[1] != query.shape[1] else {}
    outputs: list[Tensor] = []
    parts = zip(*(states.split_with_sizes(sizes, 2) for states in (query, key, value)), strict=True)
    for block in blocks:
        first_query, first_key, first_value = next(parts)
        prompt_key, prompt_value = (part[:, :, : block.num_prompt] for part in (first_key, first_value))
        outputs.append(_causal(first_query, first_key, first_value, scaling, sliding_window, grouped))
        for _ in block.num_completion[1:]:
            own_query, own_key, own_value = next(parts)
            if own_query.shape[2] == 0:  # a completion of one token, which the prompt predicts
                continue
            keys, values = torch.cat((prompt_key, own_key), 2), torch.cat((prompt_value, own_value), 2)
            outputs.append(_causal(own_query, keys, values, scaling, sliding_window, grouped))
    return torch.cat([output.transpose(1, 2) for output in outputs], 1), None


def _calls(block: Block) -> tuple[int, ...]:
    """Numbers of tokens that are queried together."""
    return block.num_prompt + block.num_completion[0], *block.num_completion[1:]


def _causal(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, grouped: dict[str, bool]
) -> Tensor:
    """Attention of the last queries of a sequence to all its keys up to their own place."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    mask: Tensor = causal_lower_right(num_queries, num_keys)
    if window is not None and num_keys > window:
        place = num_keys - num_queries
        allowed = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = allowed.tril(place).triu(place - window + 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, **grouped)
