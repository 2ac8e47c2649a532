"""The one temperature that makes predictions lose least on calibration rows, found for many subsets of members at once.

With b = 1 / T the loss of a token is lse(b s) - b s_y, convex in b, so Newton's method finds the minimum:

    dL/db = E_q[s] - s_y,   d2L/db2 = Var_q[s],   q = softmax(b s)

S subsets, N tokens, m tokens of a block, V vocabulary. Sums are float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixwright.kernels.ensemble_kl import Pooling
from mixwright.pretrain.ensemble.pooling import pool
from mixwright.pretrain.ensemble.spool import SpooledMember, spans

MAX_PASSES = 12
TOLERANCE = 1e-4

Subset = tuple[int, ...]


def fit_inverse_temperatures(
    spooled: Sequence[SpooledMember], labels_N: Tensor, subsets: Sequence[Subset], pooling: Pooling
) -> NDArray[np.float64]:
    """1 / T of every subset, [S], at the minimum of its mean loss over the tokens `labels_N` (int64)."""
    inverse_S = np.ones(len(subsets))
    for _ in range(MAX_PASSES):
        slope_S, curvature_S = _derivatives(spooled, labels_N, subsets, pooling, inverse_S)
        wanted_S = inverse_S - slope_S / np.maximum(curvature_S, 1e-12)
        # Far from the minimum a Newton step may overshoot: at most a factor of 2 at a time.
        wanted_S = np.clip(wanted_S, inverse_S / 2, inverse_S * 2)
        moved_S, inverse_S = np.abs(wanted_S - inverse_S), wanted_S
        if float(moved_S.max()) < TOLERANCE:
            break
    return inverse_S


def subset_scores(
    spooled: Sequence[SpooledMember], num_tokens: int, subsets: Sequence[Subset], pooling: Pooling
) -> Iterator[tuple[int, slice, Tensor]]:
    """(subset's number, tokens, scores [m, V]) block by block; members' logits of a block are formed once."""
    vocab_size = spooled[0].member.vocab_size
    for span in spans(num_tokens, vocab_size, len(spooled)):
        logits = [one.logits(span) for one in spooled]
        for number, subset in enumerate(subsets):
            yield number, span, pool([logits[member] for member in subset], pooling)


def _derivatives(
    spooled: Sequence[SpooledMember],
    labels_N: Tensor,
    subsets: Sequence[Subset],
    pooling: Pooling,
    inverse_S: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """dL/db and d2L/db2, summed over tokens, [S]."""
    slope_S, curvature_S = np.zeros(len(subsets)), np.zeros(len(subsets))
    for number, span, scores_mV in subset_scores(spooled, len(labels_N), subsets, pooling):
        own_m = scores_mV.gather(1, labels_N[span, None])[:, 0]
        q_mV = torch.softmax(scores_mV * float(inverse_S[number]), dim=1)
        mean_m = torch.linalg.vecdot(q_mV, scores_mV)
        variance_m = torch.linalg.vecdot(q_mV, (scores_mV - mean_m[:, None]).square_())
        slope_S[number] += float((mean_m - own_m).double().sum())
        curvature_S[number] += float(variance_m.double().sum())
    return slope_S, curvature_S
