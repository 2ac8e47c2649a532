"""A group: one prompt and the completions that are compared after it. What data, layout, model and objective share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

CHOSEN, REJECTED, BASE = 0, 1, 2
"""Places of the completions in a group; BASE is there where the SFT term learns from samples of the reference."""


@dataclass(frozen=True)
class Group:
    """Token ids, int32 [n]. No completion is empty; the prompt may be. `index` is the pair's place in its file set."""

    index: int
    prompt: NDArray[np.int32]
    completions: tuple[NDArray[np.int32], ...]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.completions))


class CompletionLogProbs(NamedTuple):
    """Of P groups with C completions each.

    `logp_PC` is the sum of the log-probabilities of a completion's tokens (nats, float32), `length_PC` their number,
    `entropy_PC` the sum of the entropies of the predictions (None unless asked for).
    """

    logp_PC: Tensor
    length_PC: Tensor
    entropy_PC: Tensor | None = None
