"""What studies of preference optimisation ask of a small language model: predictions, samples and divergences.

B sequences of equal length: T prompt tokens, then R response tokens; V tokens in the vocabulary. At this size all
logits fit into memory many times over, so they are simply made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def predictions(causal_lm: Any, tokens_BS: Tensor, num_prompt: int) -> Tensor:
    """Log-probabilities of every token at every place of the response, float32 [B, R, V]."""
    logits_BSV = causal_lm(input_ids=tokens_BS[:, :-1], use_cache=False).logits
    logp_BRV: Tensor = logits_BSV[:, num_prompt - 1 :].log_softmax(dim=-1)
    return logp_BRV


def response_logp(logp_BRV: Tensor, response_BR: Tensor) -> Tensor:
    """Sums of log-probabilities of responses, [B]."""
    return logp_BRV.gather(2, response_BR[:, :, None]).squeeze(2).sum(dim=1)


def divergence(logp_BRV: Tensor, reference_BRV: Tensor) -> Tensor:
    """Of a sample each: the KL divergence of its predictions to the reference's, summed over its places, [B].

    Its mean over samples of the policy is an unbiased estimate of KL(policy || reference) of whole responses, with less
    variance than that of the log-ratio of the samples.
    """
    return (logp_BRV.exp() * (logp_BRV - reference_BRV)).sum(dim=(1, 2))


@torch.no_grad()
def sample(causal_lm: Any, prompt_BT: Tensor, num_tokens: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """Responses at temperature 1, int64 [B, R], and the predictions that they were drawn from, float32 [B, R, V]."""
    found, logp_BV, next_B1 = causal_lm(input_ids=prompt_BT, use_cache=True), [], []
    while True:
        logp_BV.append(found.logits[:, -1].log_softmax(dim=-1))
        next_B1.append(torch.multinomial(logp_BV[-1].exp(), 1, generator=chance))
        if len(next_B1) == num_tokens:
            return torch.cat(next_B1, dim=1), torch.stack(logp_BV, dim=1)
        found = causal_lm(input_ids=next_B1[-1], past_key_values=found.past_key_values, use_cache=True)
