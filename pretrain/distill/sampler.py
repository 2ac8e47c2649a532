"""Sampling token by token from models, or from what several of them predict together. B rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from mixwright.kernels.ensemble_kl import Pooling
from mixwright.pretrain.ensemble.pooling import pool
from mixwright.pretrain.head import LanguageModel


@torch.no_grad()
def continue_rows(
    models: Sequence[LanguageModel],
    prompt_BP: Tensor,
    num_tokens: int,
    generator: torch.Generator,
    *,
    pooling: Pooling = "logits",
    temperature: float = 1.0,
) -> Tensor:
    """`prompt_BP` (int64, P >= 1) and `num_tokens` sampled tokens after it, [B, P + num_tokens].

    Every token is drawn from the pooled prediction of all models, each of which keeps a cache of its own. Temperature 0
    takes the likeliest token.
    """
    caches = [DynamicCache() for _ in models]
    rows_BS, last_Bn = prompt_BP, prompt_BP
    for _ in range(num_tokens):
        scores_BV = pool(
            [_next_logits(model, last_Bn, cache) for model, cache in zip(models, caches, strict=True)], pooling
        )
        last_Bn = _draw(scores_BV, temperature, generator)
        rows_BS = torch.cat([rows_BS, last_Bn], dim=1)
    return rows_BS


def _next_logits(model: LanguageModel, tokens_Bn: Tensor, cache: DynamicCache) -> Tensor:
    """Logits of the token after `tokens_Bn`, which come after what is in the cache; float32 [B, V]."""
    hidden_BnD = model.backbone(input_ids=tokens_Bn, past_key_values=cache, use_cache=True).last_hidden_state
    return model.head.logits(hidden_BnD[:, -1])


def _draw(scores_BV: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One token per row, [B, 1]."""
    if temperature == 0:
        return scores_BV.argmax(dim=1, keepdim=True)
    return torch.multinomial(torch.softmax(scores_BV / temperature, dim=1), 1, generator=generator)
