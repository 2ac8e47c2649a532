"""All that training reads: tokenised pairs, the reference's log-probabilities, samples of it where they are learned."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mixwright.pretrain.rpo.base_samples import BaseSamples
from mixwright.pretrain.rpo.groups import Group
from mixwright.pretrain.rpo.pairs import PairSet
from mixwright.pretrain.rpo.reference import ReferenceLogProbs


@dataclass(frozen=True)
class Preferences:
    """`base` holds one completion of the reference model per training prompt; None where the SFT term needs none."""

    train: PairSet
    evaluation: PairSet
    reference: ReferenceLogProbs
    base: BaseSamples | None

    def train_group(self, index: int) -> Group:
        """A training pair, with the reference's sample as third completion where there is one."""
        group = self.train.group(index)
        if self.base is None:
            return group
        return replace(group, completions=(*group.completions, self.base.completion(index)))

    def num_base_tokens(self, index_S: NDArray[np.int64], *, from_base: bool) -> int:
        """Predicted tokens of the completions that the SFT term learns from, in the pairs of a step."""
        if from_base:
            assert self.base is not None
            length_S = self.base.lengths[index_S]
        else:
            length_S = self.train.lengths[index_S, 1]
        without_prompt = int((self.train.lengths[index_S, 0] == 0).sum())  # their first token is given (layout.py)
        return int(length_S.sum()) - without_prompt

    def tokens_per_step(self, pairs_per_step: int) -> int:
        """Tokens of prompts and completions in a step, on average."""
        return round(float(self.train.lengths.sum(axis=1).mean()) * pairs_per_step)
