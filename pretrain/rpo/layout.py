"""How groups of completions lie in the tensors that a model is given.

    shared_prompt   one row [prompt | completion | completion | ...] [prompt | ...]: every prompt is computed once
    packed          one row [prompt | completion] [prompt | completion] ...: once for each completion
    padded          one row each, filled up to the longest

Nothing is predicted from the last token of a completion, so it is a target and not an input. Letters in names: P
groups, C completions of each, M predicted tokens; tokens have the shape [B, T], with B = 1 but for `padded`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixwright.pretrain.errors import TrainingError
from mixwright.pretrain.rpo.config import Layout
from mixwright.pretrain.rpo.groups import Group


@dataclass(frozen=True)
class Block:
    """Consecutive tokens of a row that see no others: a prompt, and after it each completion for itself.

    Numbers of tokens. A completion sees the prompt and its own past; its positions go on where the prompt's end.
    """

    num_prompt: int
    num_completion: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return self.num_prompt + sum(self.num_completion)


@dataclass(frozen=True)
class PackedGroups:
    """A micro-batch of P groups with C completions each, as a model takes it; int64 tensors.

    `source_M` is the place in the flattened tokens whose hidden state predicts `target_M`; targets are ordered by
    group, completion and place, `length_PC` says how many each completion has. `blocks` are what `attention.py` keeps
    apart in the row; None means that rows are sequences, which causal attention alone keeps apart from their padding.
    """

    tokens_BT: Tensor
    positions_BT: Tensor
    source_M: Tensor
    target_M: Tensor
    length_PC: Tensor
    blocks: tuple[Block, ...] | None

    @property
    def num_groups(self) -> int:
        return self.length_PC.shape[0]

    @property
    def num_completions(self) -> int:
        return self.length_PC.shape[1]

    def to(self, device: torch.device | str) -> Self:
        """The same on a device; the copy does not wait."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "blocks"}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def num_scored(group: Group) -> tuple[int, ...]:
    """How many tokens of each completion are predicted: all, but the first one where there is no prompt before it."""
    return tuple(len(completion) - (len(group.prompt) == 0) for completion in group.completions)


def lay_out(groups: Sequence[Group], layout: Layout) -> PackedGroups:
    """Groups as one micro-batch, in their order. All have the same number of completions.

    The first token of a completion without a prompt is given, not predicted. Raises TrainingError for a pair that
    leaves nothing to predict, ValueError for groups that are not alike.
    """
    length_PC = _lengths(groups)
    if layout != "shared_prompt":
        groups = [replace(group, completions=(one,)) for group in groups for one in group.completions]
    pieces = [_piece(group) for group in groups]
    width = max(len(piece.tokens_n) for piece in pieces)
    if layout == "padded":
        starts = [index * width for index in range(len(pieces))]
    else:
        starts = [0, *np.cumsum([len(piece.tokens_n) for piece in pieces])[:-1].tolist()]

    def row(parts: Sequence[NDArray[np.int64]]) -> Tensor:
        if layout == "padded":
            return torch.from_numpy(np.stack([np.pad(part, (0, width - len(part))) for part in parts]))
        return torch.from_numpy(np.concatenate(parts))[None]

    return PackedGroups(
        tokens_BT=row([piece.tokens_n for piece in pieces]),
        positions_BT=row([piece.positions_n for piece in pieces]),
        source_M=torch.from_numpy(
            np.concatenate([start + piece.source_m for start, piece in zip(starts, pieces, strict=True)])
        ),
        target_M=torch.from_numpy(np.concatenate([piece.target_m for piece in pieces])),
        length_PC=torch.tensor(length_PC),
        blocks=None if layout == "padded" else tuple(piece.block for piece in pieces),
    )


@dataclass(frozen=True)
class _Piece:
    """A prompt and its completions as [prompt | completion | ...]; sources count from the piece's beginning."""

    tokens_n: NDArray[np.int64]
    positions_n: NDArray[np.int64]
    source_m: NDArray[np.int64]
    target_m: NDArray[np.int64]
    block: Block


def _piece(group: Group) -> _Piece:
    num_prompt, given = len(group.prompt), int(len(group.prompt) == 0)
    tokens, positions = [group.prompt], [np.arange(num_prompt)]
    sources: list[NDArray[np.int64]] = []
    end = num_prompt
    for completion in group.completions:
        num_inputs = len(completion) - 1
        own = np.arange(end, end + num_inputs)
        tokens.append(completion[:-1])
        positions.append(num_prompt + np.arange(num_inputs))
        sources.append(own if given else np.concatenate([[num_prompt - 1], own]))
        end += num_inputs
    return _Piece(
        np.concatenate(tokens).astype(np.int64),
        np.concatenate(positions),
        np.concatenate(sources),
        np.concatenate([completion[given:] for completion in group.completions]).astype(np.int64),
        Block(num_prompt, tuple(len(completion) - 1 for completion in group.completions)),
    )


def _lengths(groups: Sequence[Group]) -> list[tuple[int, ...]]:
    if not groups:
        raise ValueError("a micro-batch needs at least one group")
    lengths = [num_scored(group) for group in groups]
    for group, length in zip(groups, lengths, strict=True):
        if len(length) != len(lengths[0]):
            raise ValueError(f"group {group.index} has {len(length)} completions, the first one {len(lengths[0])}")
        if min(length) < 1:
            raise TrainingError(
                f"pair {group.index}: completion {length.index(min(length))} has no token to predict "
                f"({len(group.prompt)} tokens of prompt): a pair without a prompt needs completions of 2 tokens or more"
            )
    return lengths
