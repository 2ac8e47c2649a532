"""What several models predict together: scores whose softmax is the mean of logits, or of probabilities.

    logits       softmax(mean_k z_k): the normalised geometric mean, whose loss never exceeds the members' mean loss
    arithmetic   mean_k softmax(z_k)

Source: spec/methods.md 6.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mixwright.kernels.ensemble_kl import Pooling

POOLINGS: tuple[Pooling, ...] = ("logits", "arithmetic")


def pool(logits: Sequence[Tensor], pooling: Pooling) -> Tensor:
    """Scores of the pooled prediction from logits of each model, any [..., V]; the mean logits, or log probabilities.

    One accumulator beside what is given, however many models there are.
    """
    pooled = logits[0].clone() if pooling == "logits" else torch.log_softmax(logits[0], dim=-1)
    for one in logits[1:]:
        pooled = pooled.add_(one) if pooling == "logits" else torch.logaddexp(pooled, torch.log_softmax(one, dim=-1))
    return pooled.div_(len(logits)) if pooling == "logits" else pooled.sub_(math.log(len(logits)))
