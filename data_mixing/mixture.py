"""Mixtures as users write them: names and globs with relative numbers, turned into proportions of a run's domains.

A number belongs to a domain name or to a glob (`*`, `?`, `[...]`). A glob stands for the domains that it matches and
that no key names, and its number is divided among them in proportion to their rows. Domains that no key covers get 0.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from mixwright.data_mixing.apportion import integer_proportions
from mixwright.data_mixing.domain import Domain
from mixwright.data_mixing.entries import Segment
from mixwright.data_mixing.errors import PolicyRejected, nearest

MAX_KEYS = 100_000
MAX_PROGRAM_NUMBERS = 1 << 20
"""Segments times domains of a program: the journal entry stays below about 10 MB."""


def _check_number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number >= 0")
    return value


def _check_mapping(value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a mapping of domain names to numbers, found {type(value).__name__}")
    if not value:
        raise ValueError("expected at least one domain, found an empty mapping")
    for key in value:
        if not isinstance(key, str):
            raise ValueError(f"a domain name must be text, found {key!r}; put it in quotes")
    return value


Number = Annotated[float, Field(ge=0), BeforeValidator(_check_number)]
Mixture = Annotated[dict[str, Number], Field(max_length=MAX_KEYS), BeforeValidator(_check_mapping)]


def shares(mixture: Mapping[str, float], domains: tuple[Domain, ...], key: str) -> NDArray[np.float64]:
    """The mixture as float64 [G] in catalogue order with sum 1.

    `key` is the mixture's place in the document. Raises PolicyRejected naming the key that matches nothing, that
    overlaps with another, or a mixture whose numbers are all zero.
    """
    if not any(mixture.values()):
        raise PolicyRejected(f"{key}: every number is 0; at least one must be positive")
    # Scaled by the largest, so that no sum overflows; a positive number stays positive.
    largest = max(mixture.values())
    share_G = np.zeros(len(domains))
    for pattern, members in assign(mixture, domains, key).items():
        rows = np.array([domains[index].num_rows for index in members], dtype=np.float64)
        scaled = mixture[pattern] / largest * (rows / rows.sum())
        share_G[members] = np.maximum(scaled, np.finfo(np.float64).tiny) if mixture[pattern] > 0 else 0.0
    total: np.float64 = share_G.sum()
    return share_G / total


def assign(patterns: Iterable[str], domains: tuple[Domain, ...], key: str) -> dict[str, list[int]]:
    """Indices into `domains` for each name or glob; a name wins over globs. Raises PolicyRejected."""
    index_of = {domain.name: index for index, domain in enumerate(domains)}
    members = {pattern: [index_of[pattern]] for pattern in patterns if pattern in index_of}
    owner = {indices[0]: pattern for pattern, indices in members.items()}
    named = set(owner)
    for pattern in patterns:
        if pattern in members:
            continue
        matching = _matching(pattern, index_of, key)
        members[pattern] = [index for index in matching if index not in named]
        if not members[pattern]:
            raise PolicyRejected(f"{key}.{pattern}: every domain that it matches is named by a key of its own")
        for index in members[pattern]:
            if index in owner:
                raise PolicyRejected(
                    f"{key}.{pattern}: domain {domains[index].name!r} is also matched by {owner[index]!r}"
                )
            owner[index] = pattern
    return members


def segments(steps: Iterable[tuple[int, NDArray[np.float64]]]) -> tuple[Segment, ...]:
    """A program from (start step, shares [G]) in order of step.

    Of several with the same start the last one counts; neighbours with equal proportions become one segment. Raises
    PolicyRejected when the program is too large.
    """
    share_at = dict(steps)
    num_numbers = sum(map(len, share_at.values()))
    if num_numbers > MAX_PROGRAM_NUMBERS:
        raise PolicyRejected(
            f"{len(share_at)} segments of {num_numbers // len(share_at)} domains are too much for one policy; "
            f"segments x domains may be at most {MAX_PROGRAM_NUMBERS:,}"
        )
    program: list[Segment] = []
    for start_step, share_G in share_at.items():
        proportions = tuple(integer_proportions(share_G).tolist())
        if not program or program[-1].proportions != proportions:
            program.append(Segment(start_step=start_step, proportions=proportions))
    return tuple(program)


def _matching(pattern: str, index_of: Mapping[str, int], key: str) -> list[int]:
    if not any(character in pattern for character in "*?["):
        raise PolicyRejected(f"{key}.{pattern}: no such domain{nearest(pattern, index_of)}")
    matching = [index for name, index in index_of.items() if fnmatch.fnmatchcase(name, pattern)]
    if not matching:
        raise PolicyRejected(f"{key}.{pattern}: matches no domain{nearest(pattern, index_of)}")
    return matching
