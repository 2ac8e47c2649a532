"""The Head: hidden states and targets in, per-token losses out, without logits of all tokens in memory.

N tokens of the micro-batch, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixwright.kernels.distillation import DistillationLosses, TopK, linear_distillation
from mixwright.kernels.ensemble_kl import Pooling, Teacher
from mixwright.kernels.linear_nll import TokenLosses, linear_nll


@dataclass(frozen=True)
class Lesson:
    """What teachers say of a micro-batch: (1 - share) * CE + share * temperature**2 * KL is to be learned."""

    teachers: Sequence[Teacher] | TopK
    share: float
    pooling: Pooling
    temperature: float


class Head(nn.Module):
    """Takes the place of a model's output projection and shares its parameters (tied embeddings stay tied).

    The projection's weight is used inside this module's `forward`, so that ZeRO-3 gathers it there.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, projection: nn.Linear | Head, softcap: float | None, temperature: float) -> None:
        super().__init__()
        self.weight = projection.weight
        self.bias = projection.bias
        self.softcap = softcap
        self.temperature = temperature

    def forward(
        self,
        hidden_ND: Tensor,
        targets_N: Tensor,
        lesson: Lesson | None = None,
        *,
        precise: bool = False,
        entropy: bool = False,
    ) -> TokenLosses | DistillationLosses:
        """Cross-entropy and log-sum-exp of each token, float32 [N], in nats; with a lesson also what it adds.

        `precise` forms logits in float32 for 16-bit parameters, `entropy` asks for the predictions' entropy; neither is
        there for lessons.
        """
        features_ND, weight_VD = self.operands(hidden_ND)
        if lesson is not None:
            return linear_distillation(
                features_ND,
                weight_VD,
                targets_N,
                lesson.teachers,
                share=lesson.share,
                pooling=lesson.pooling,
                temperature=lesson.temperature,
            )
        return linear_nll(
            features_ND,
            weight_VD,
            targets_N,
            bias_V=self.bias,
            softcap=self.softcap,
            temperature=self.temperature,
            precise=precise,
            entropy=entropy,
        )

    def operands(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, D] and output embeddings [V, D] whose products are the logits."""
        return hidden_ND, self.weight

    def logits(self, hidden_nD: Tensor) -> Tensor:
        """Logits of a few tokens, float32 [n, V] (float64 for double inputs)."""
        logits_nV = F.linear(*self.operands(hidden_nD), self.bias)
        logits_nV = logits_nV if logits_nV.dtype == torch.float64 else logits_nV.float()
        if self.softcap is not None:
            logits_nV = self.softcap * torch.tanh(logits_nV / self.softcap)
        return logits_nV / self.temperature


class LanguageModel(nn.Module):
    """A `transformers` causal language model whose `forward` ends in a Head instead of logits."""

    head: Head
    causal_lm: Any

    document_end: int | None = None
    """The id that ends a document, when tokens of a row attend to their own document only."""

    def __init__(self, causal_lm: Any) -> None:
        """`causal_lm` is any `transformers` model with output embeddings; its parameters are shared, not copied."""
        super().__init__()
        config = causal_lm.config
        scaling = float(getattr(config, "logits_scaling", None) or 1.0)  # Granite divides logits by it
        scaling /= float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies
        softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
        self.head = Head(causal_lm.get_output_embeddings(), softcap, scaling)
        self.backbone: nn.Module = causal_lm.base_model
        # Kept out of the module tree: its parameters are the backbone's and the head's, counted once.
        object.__setattr__(self, "causal_lm", causal_lm)

    def forward(self, tokens_BS: Tensor, lesson: Lesson | None = None) -> TokenLosses | DistillationLosses:
        """Losses of predicting tokens 1.. from tokens ..S-2 of each row; int64 [B, S] in, float32 [B * (S-1)] out."""
        targets_N = tokens_BS[:, 1:].reshape(-1)
        losses: TokenLosses | DistillationLosses = self.head(self.hidden_states(tokens_BS), targets_N, lesson)
        return losses

    def hidden_states(self, tokens_BS: Tensor) -> Tensor:
        """What the head is given for each predicted token, [B * (S-1), D]."""
        inputs_BT = tokens_BS[:, :-1]
        # transformers masks documents from each other where positions begin again and no other mask is given.
        packed = {} if self.document_end is None else {"position_ids": document_positions(inputs_BT, self.document_end)}
        hidden_BTD = self.backbone(input_ids=inputs_BT, use_cache=False, **packed).last_hidden_state
        hidden_ND: Tensor = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        return hidden_ND


def document_positions(tokens_BT: Tensor, document_end: int) -> Tensor:
    """Place of each token in its document, int64 [B, T]; a document goes on up to and with `document_end`."""
    place_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    ended_BT = F.pad(tokens_BT[:, :-1] == document_end, (1, 0))
    begin_BT = torch.cummax(torch.where(ended_BT, place_T, 0), dim=1).values
    return place_T - begin_BT


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step, so that dropout is the same after any resume without a checkpointed state."""
    torch.manual_seed((seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank) % (1 << 63))
