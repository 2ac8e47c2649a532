"""Soups: one model whose parameters are the mean of several that were trained from the same beginning.

    uniform   the mean of all
    greedy    best first; another one is taken in when the mean with it is better on held-out rows, strictly

Source: Wortsman et al. 2022, spec/methods.md 11. Models of different seeds lie in different valleys: the mean of their
parameters predicts next to nothing, so members without a common origin are refused. Means are float32.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from mixwright.pretrain.ensemble.member import ORIGIN, Member, check_together, load_member
from mixwright.pretrain.errors import EnsembleError
from mixwright.pretrain.head import LanguageModel

Score = Callable[[LanguageModel], float]
"""Loss of a model on held-out rows, nats per token."""


@dataclass(frozen=True)
class Soup:
    """Names of the members in it, in the order in which they were taken, and its loss on the held-out rows.

    `singles` are losses of the members, best first.
    """

    taken: tuple[str, ...]
    loss: float
    singles: tuple[tuple[str, float], ...]
    parameters: dict[str, Tensor]


def check_soup(members: Sequence[Member], *, assume_one_origin: bool = False) -> None:
    """Raise EnsembleError, saying why, unless the members are branches of one checkpoint."""
    check_together(members)
    first = members[0]
    for other in members[1:]:
        if other.architecture != first.architecture:
            raise EnsembleError(
                f"members {first.folder} and {other.folder} have different architectures: their parameters have no mean"
            )
    if assume_one_origin:
        return
    unknown = [member.folder for member in members if member.origin is None]
    if unknown:
        raise EnsembleError(
            f"{unknown[0]} does not say which parameters its training began from (no {ORIGIN}); only branches of one "
            "checkpoint can be averaged. If they are, say --assume-one-origin"
        )
    for other in members[1:]:
        if other.origin != first.origin:
            raise EnsembleError(
                f"members {first.folder} and {other.folder} began from different parameters ({first.origin[:12]} and "  # type: ignore[index]
                f"{other.origin[:12]}): the mean of parameters of different seeds predicts next to nothing; average "  # type: ignore[index]
                "their predictions instead (`mixwright ensemble eval`), or branch from one checkpoint (model.path)"
            )


def uniform_soup(members: Sequence[Member], score: Score) -> Soup:
    """The mean of all members."""
    singles = _singles(members, score)
    mean = _Mean(members[0])
    for member in members:
        mean.add(_parameters(member))
    return Soup(tuple(member.name for member in members), score(mean.model()), singles, mean.parameters)


def greedy_soup(members: Sequence[Member], score: Score) -> Soup:
    """Members in the order of their own losses, each kept when the mean with it is better; ties keep the earlier."""
    singles = _singles(members, score)
    by_name = {member.name: member for member in members}
    mean, taken, best = _Mean(members[0]), [singles[0][0]], singles[0][1]
    mean.add(_parameters(by_name[taken[0]]))
    for name, _ in singles[1:]:
        candidate = mean.copy()
        candidate.add(_parameters(by_name[name]))
        loss = score(candidate.model())
        if loss < best:
            mean, best = candidate, loss
            taken.append(name)
    return Soup(tuple(taken), best, singles, mean.parameters)


def write_soup(soup: Soup, like: Member, folder: Path) -> None:
    """A Hugging Face folder of the soup, complete or absent, with configuration and tokenizer of a member."""
    if folder.exists():
        raise EnsembleError(f"{folder}: exists already; choose another folder")
    disable_progress_bar()
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(like.folder, dtype=torch.float32)  # nosec B615  # a local folder
    model.load_state_dict(soup.parameters)
    model.save_pretrained(part)
    AutoTokenizer.from_pretrained(like.folder).save_pretrained(part)  # nosec B615  # a local folder
    part.rename(folder)


class _Mean:
    """A running mean of parameters; what is no floating-point number is the first one's."""

    def __init__(self, like: Member) -> None:
        self._like, self._count = like, 0
        self.parameters: dict[str, Tensor] = {}

    def copy(self) -> _Mean:
        other = _Mean(self._like)
        other._count, other.parameters = self._count, {name: value.clone() for name, value in self.parameters.items()}
        return other

    def add(self, parameters: dict[str, Tensor]) -> None:
        self._count += 1
        if self._count == 1:
            self.parameters = {name: value.clone() for name, value in parameters.items()}
            return
        for name, value in parameters.items():
            if value.is_floating_point():
                self.parameters[name].lerp_(value.to(self.parameters[name]), 1 / self._count)

    def model(self) -> LanguageModel:
        """The mean as a model, for evaluation."""
        model = load_member(self._like)
        model.causal_lm.load_state_dict(self.parameters)
        return model


def _parameters(member: Member) -> dict[str, Tensor]:
    state: dict[str, Tensor] = load_member(member).causal_lm.state_dict()
    return state


def _singles(members: Sequence[Member], score: Score) -> tuple[tuple[str, float], ...]:
    """Names and losses, best first; of equal ones the earlier first."""
    if len({member.name for member in members}) < len(members):
        raise EnsembleError("members of a soup need different names (those of their folders)")
    losses = [(member.name, score(load_member(member))) for member in members]
    return tuple(sorted(losses, key=lambda pair: pair[1]))
