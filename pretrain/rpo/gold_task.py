"""A language with a programmatic gold reward, and preferences that never leave its valid part.

A prompt is one token, its number the key; a response is four pairs (a, b) of digits, each valid if and only if
b = (a + key) mod 8. Gold reward: the mean over pairs of a / 7 where the pair is valid, -1 where it is not. So a policy
gains by larger a, and loses far more by forgetting what a response is. Preferences are between fully valid samples of
the reference: they say nothing of the invalid part (spec/posttraining.md 2.4b).

B responses of R = 8 tokens, P pairs, C completions. Digits are tokens 0 to 7, prompts the tokens after them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixwright.pretrain.rpo.bandit import bradley_terry
from mixwright.pretrain.rpo.small_lm import sample

NUM_DIGITS = 8
NUM_PAIRS = 4
RESPONSE_TOKENS = 2 * NUM_PAIRS
MAX_ROUNDS = 1000
"""Of sampling until there are enough valid pairs; a reference that needs more has not learnt the language."""


def vocabulary(num_prompts: int) -> int:
    """Tokens of the language with so many prompts."""
    return NUM_DIGITS + num_prompts


def is_valid(prompt_B: Tensor, response_BR: Tensor) -> Tensor:
    """Which pairs of each response are valid, bool [B, 4]. Tokens that are no digits never are."""
    key_B1 = (prompt_B - NUM_DIGITS)[:, None] % NUM_DIGITS
    a_B4, b_B4 = response_BR[:, 0::2], response_BR[:, 1::2]
    return (a_B4 < NUM_DIGITS) & (b_B4 == (a_B4 + key_B1) % NUM_DIGITS)


def gold_reward(prompt_B: Tensor, response_BR: Tensor) -> Tensor:
    """Gold rewards, float32 [B], in -1 to 1."""
    worth_B4 = response_BR[:, 0::2] / (NUM_DIGITS - 1)
    return torch.where(is_valid(prompt_B, response_BR), worth_B4, -1.0).mean(dim=1)


def behave(num: int, num_prompts: int, validity: float, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """Prompts [B] and responses [B, R] of the behaviour distribution, which the reference learns.

    a is uniform; b is right with probability `validity`, else one of the other digits.
    """
    prompt_B = draw_prompts(num, num_prompts, chance)
    a_B4 = torch.randint(NUM_DIGITS, (num, NUM_PAIRS), generator=chance)
    is_wrong_B4 = torch.rand((num, NUM_PAIRS), generator=chance) >= validity
    error_B4 = torch.randint(1, NUM_DIGITS, (num, NUM_PAIRS), generator=chance) * is_wrong_B4
    b_B4 = (a_B4 + prompt_B[:, None] - NUM_DIGITS + error_B4) % NUM_DIGITS
    return prompt_B, torch.stack([a_B4, b_B4], dim=2).flatten(1)


def draw_prompts(num: int, num_prompts: int, chance: torch.Generator) -> Tensor:
    """Prompts, uniformly, int64 [B]."""
    return torch.randint(NUM_DIGITS, vocabulary(num_prompts), (num,), generator=chance)


@dataclass(frozen=True)
class Preferences:
    """Pairs of responses: prompts int64 [P], chosen and rejected and one more sample of the reference [P, 3, R]."""

    prompt_P: Tensor
    response_P3R: Tensor

    def sequences(self, num_completions: int) -> Tensor:
        """Prompts with the first completions of each pair, one group after the other, int64 [P * C, 1 + R]."""
        response_PCR = self.response_P3R[:, :num_completions]
        prompt_PC1 = self.prompt_P[:, None, None].expand(-1, num_completions, 1)
        return torch.cat([prompt_PC1, response_PCR], dim=2).flatten(0, 1)


def draw_preferences(
    reference: Any, num_pairs: int, num_prompts: int, scale: float, chance: torch.Generator
) -> Preferences:
    """Bradley-Terry preferences between fully valid samples of the reference; the third sample may be invalid.

    Raises ValueError when the reference hardly ever is valid.
    """
    kept: list[Preferences] = []
    for _ in range(MAX_ROUNDS):
        prompt_B = draw_prompts(num_pairs, num_prompts, chance)
        three = [sample(reference, prompt_B[:, None], RESPONSE_TOKENS, chance)[0] for _ in range(3)]
        reward_B2 = torch.stack([gold_reward(prompt_B, response_BR) for response_BR in three[:2]], dim=1)
        is_first_B1 = bradley_terry(reward_B2.double(), scale, chance)[:, None]
        chosen_BR, rejected_BR = (
            torch.where(is_first_B1, three[0], three[1]),
            torch.where(is_first_B1, three[1], three[0]),
        )
        whole_B = torch.stack([is_valid(prompt_B, response_BR).all(dim=1) for response_BR in three[:2]]).all(dim=0)
        kept.append(Preferences(prompt_B[whole_B], torch.stack([chosen_BR, rejected_BR, three[2]], dim=1)[whole_B]))
        if sum(len(one.prompt_P) for one in kept) >= num_pairs:
            return Preferences(
                torch.cat([one.prompt_P for one in kept])[:num_pairs],
                torch.cat([one.response_P3R for one in kept])[:num_pairs],
            )
    raise ValueError(f"the reference gave fewer than {num_pairs} pairs of valid responses in {MAX_ROUNDS} rounds")
