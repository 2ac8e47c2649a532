"""The arms of an online policy: domains one by one, or groups of them when there are too many to try each.

K arms, G domains. Inside an arm the domains are mixed in proportion to their rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mixwright.data_mixing.domain import Domain
from mixwright.data_mixing.errors import PolicyRejected
from mixwright.data_mixing.guard import normalised, with_floor
from mixwright.data_mixing.mixture import assign, shares
from mixwright.data_mixing.online import MAX_ARMS, Losses, OnlineDocument

_NO_ARM = -1


@dataclass(frozen=True, eq=False)
class Arms:
    """`members` are indices of domains; domains that are in no arm are not read.

    rows_K: training rows of each arm. initial_K, target_K, fallback_K: the document's mixtures as shares of arms.
    """

    names: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    rows_K: tuple[int, ...]
    initial_K: tuple[float, ...]
    target_K: tuple[float, ...] | None
    fallback_K: tuple[float, ...] | None
    arm_of_G: NDArray[np.int64]
    share_within_arm_G: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.names)

    def expand(self, share_K: ArrayLike) -> NDArray[np.float64]:
        """Shares of arms [K] as shares of domains [G], sum 1."""
        share_G = np.asarray(share_K, dtype=np.float64)[self.arm_of_G] * self.share_within_arm_G
        return np.asarray(share_G / share_G.sum(), dtype=np.float64)

    def sum(self, number_G: ArrayLike) -> tuple[int, ...]:
        """Sums of a whole number per domain [G] (rows, tokens) over each arm."""
        values = np.asarray(number_G, dtype=np.int64)
        return tuple(int(values[list(indices)].sum()) for indices in self.members)

    def pool_losses(self, loss_sum_G: ArrayLike, num_tokens_G: ArrayLike) -> Losses:
        """Mean loss of each arm's tokens; domains without tokens or with a sum that is not finite are left out."""
        loss_sum = np.asarray(loss_sum_G, dtype=np.float64)
        num_tokens = np.asarray(num_tokens_G, dtype=np.float64)
        usable = np.isfinite(loss_sum) & (num_tokens > 0)
        losses: list[float | None] = []
        for indices in self.members:
            kept = [index for index in indices if usable[index]]
            losses.append(float(loss_sum[kept].sum() / num_tokens[kept].sum()) if kept else None)
        return tuple(losses)


def arms_of(document: OnlineDocument, domains: Sequence[Domain]) -> Arms:
    """The arms that a document gets in a run with these domains; raises PolicyRejected."""
    catalogue = tuple(domains)
    members = _members(document, catalogue)
    _check_number(members, document)
    rows_G = np.array([domain.num_rows for domain in catalogue], dtype=np.float64)
    arm_of_G, within_G = np.full(len(catalogue), _NO_ARM), np.zeros(len(catalogue))
    for arm, indices in enumerate(members.values()):
        arm_of_G[list(indices)] = arm
        within_G[list(indices)] = rows_G[list(indices)] / rows_G[list(indices)].sum()
    groups = tuple(members.values())
    document.check_arms(tuple(members))
    initial = _arm_shares(document.initial, catalogue, groups, "initial") or document.start(tuple(members))
    initial_K = with_floor(normalised(initial or [1.0] * len(groups), len(groups)), document.guard.floor)
    return Arms(
        names=tuple(members),
        members=groups,
        rows_K=tuple(int(rows_G[list(indices)].sum()) for indices in groups),
        initial_K=tuple(initial_K.tolist()),
        target_K=_arm_shares(document.target, catalogue, groups, "target"),
        fallback_K=_arm_shares(document.guard.fallback, catalogue, groups, "guard.fallback"),
        arm_of_G=arm_of_G,
        share_within_arm_G=within_G,
    )


def _members(document: OnlineDocument, domains: tuple[Domain, ...]) -> dict[str, tuple[int, ...]]:
    if document.arms is not None:
        return _named_arms(document.arms, domains)
    if len(domains) <= MAX_ARMS:
        return {domain.name: (index,) for index, domain in enumerate(domains)}
    groups: dict[str, list[int]] = {}
    for index, domain in enumerate(domains):
        groups.setdefault(re.split("[-_.]", domain.name, maxsplit=1)[0], []).append(index)
    return {name: tuple(indices) for name, indices in groups.items()}


def _named_arms(arms: Mapping[str, Sequence[str]], domains: tuple[Domain, ...]) -> dict[str, tuple[int, ...]]:
    arm_of_pattern: dict[str, str] = {}
    for arm, patterns in arms.items():
        if not patterns:
            raise PolicyRejected(f"arms.{arm}: expected at least one domain name or glob, found an empty list")
        for pattern in patterns:
            if pattern in arm_of_pattern:
                raise PolicyRejected(f"arms.{arm}: {pattern!r} is also in arm {arm_of_pattern[pattern]!r}")
            arm_of_pattern[pattern] = arm
    members: dict[str, list[int]] = {arm: [] for arm in arms}
    for pattern, indices in assign(arm_of_pattern, domains, "arms").items():
        members[arm_of_pattern[pattern]] += indices
    return {arm: tuple(indices) for arm, indices in members.items()}


def _check_number(members: Mapping[str, tuple[int, ...]], document: OnlineDocument) -> None:
    if not members:
        raise PolicyRejected("arms: expected at least one arm, found an empty mapping")
    if len(members) > MAX_ARMS:
        found = "arms names" if document.arms is not None else "the names of the domains begin with"
        raise PolicyRejected(
            f"arms: {found} {len(members)} groups, at most {MAX_ARMS} are possible; group the domains, "
            'such as arms: {code: ["code-*", "python"], rest: ["*"]}'
        )
    if document.guard.floor * len(members) >= 1:
        raise PolicyRejected(
            f"guard.floor: {document.guard.floor:g} for each of {len(members)} arms leaves nothing to decide; "
            f"expected less than {1 / len(members):.4g}"
        )


def _arm_shares(
    mixture: Mapping[str, float] | None, domains: tuple[Domain, ...], members: Iterable[Sequence[int]], key: str
) -> tuple[float, ...] | None:
    """A mixture of domains as shares of arms; None for None. Raises PolicyRejected."""
    if mixture is None:
        return None
    share_G = shares(mixture, domains, key)
    share_K = np.array([share_G[list(indices)].sum() for indices in members])
    if share_K.sum() == 0:
        raise PolicyRejected(f"{key}: names only domains that are in no arm")
    return tuple((share_K / share_K.sum()).tolist())
