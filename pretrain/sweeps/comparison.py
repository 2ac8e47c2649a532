"""Policies side by side: test perplexity by domain and in the mean, differences to a baseline paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mixwright.pretrain.proxy import ProxyRecord


@dataclass(frozen=True)
class Comparison:
    """One policy in one setting, over the seeds that it and the baseline have in common.

    `perplexity` by domain and `mean` of them are averages over seeds. `difference` of the mean to the baseline's
    (negative is better) and `standard_error` of it are paired by seed; the latter is NaN with one seed. `relative` and
    `relative_error` are the same as parts of the baseline's mean. `loss_difference` is that of the mean loss, in
    nats. `shares` are of the rows really read.
    """

    num_seeds: int
    perplexity: dict[str, float]
    mean: float
    difference: float
    standard_error: float
    relative: float
    relative_error: float
    loss_difference: float
    shares: dict[str, float]


def mean_perplexity(record: ProxyRecord, counted: Sequence[str]) -> float:
    """Mean over the domains `counted` of exp(test loss)."""
    return float(np.mean([math.exp(record.test[name]) for name in counted]))


def compare(
    records: Mapping[int, ProxyRecord], baseline: Mapping[int, ProxyRecord], counted: Sequence[str]
) -> Comparison | None:
    """Records by seed against the baseline's; None when they share no seed. `counted` domains make the mean."""
    seeds = [seed for seed in records if seed in baseline]
    if not seeds:
        return None
    own_S, base_S = (np.array([mean_perplexity(of[s], counted) for s in seeds]) for of in (records, baseline))
    losses = [[np.mean([of[s].test[name] for name in counted]) for s in seeds] for of in (records, baseline)]
    difference_S = own_S - base_S
    error = difference_S.std(ddof=1) / math.sqrt(len(seeds)) if len(seeds) > 1 else math.nan
    domains = records[seeds[0]].run.domains
    return Comparison(
        num_seeds=len(seeds),
        perplexity={name: float(np.mean([math.exp(records[s].test[name]) for s in seeds])) for name in domains},
        mean=float(own_S.mean()),
        difference=float(difference_S.mean()),
        standard_error=float(error),
        relative=float(difference_S.mean() / base_S.mean()),
        relative_error=float(error / base_S.mean()),
        loss_difference=float(np.mean(losses[0]) - np.mean(losses[1])),
        shares={name: float(np.mean([records[s].shares[name] for s in seeds])) for name in domains},
    )
