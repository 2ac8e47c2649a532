"""Where every token of a group goes: each layout against what a reader of the row would see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixwright.pretrain.errors import TrainingError
from mixwright.pretrain.rpo.config import Layout
from mixwright.pretrain.rpo.groups import Group
from mixwright.pretrain.rpo.layout import PackedGroups, lay_out, num_scored

LAYOUTS: list[Layout] = ["shared_prompt", "packed", "padded"]


def group(index: int, prompt: list[int], *completions: list[int]) -> Group:
    return Group(index, np.array(prompt, np.int32), tuple(np.array(tokens, np.int32) for tokens in completions))


@st.composite
def micro_batches(draw: st.DrawFn) -> list[Group]:
    """One to four groups of two or three completions; without a prompt, completions have two tokens or more."""
    num_completions = draw(st.integers(2, 3))
    groups = []
    for index in range(draw(st.integers(1, 4))):
        prompt = draw(st.lists(st.integers(1, 9), max_size=5))
        tokens = st.lists(st.integers(1, 9), min_size=1 if prompt else 2, max_size=5)
        groups.append(group(index, prompt, *(draw(tokens) for _ in range(num_completions))))
    return groups


def seen_by(packed: PackedGroups) -> list[list[tuple[int, int]]]:
    """For each token of the flattened rows: (token, position) of those that it attends to, itself at the end."""
    rows = torch.stack([packed.tokens_BT, packed.positions_BT], dim=2).tolist()
    rows = [[tuple(token) for token in row] for row in rows]
    if packed.blocks is None:
        return [row[: place + 1] for row in rows for place in range(len(row))]
    [row] = rows
    seen, begin = [], 0
    for block in packed.blocks:
        prompt = row[begin : begin + block.num_prompt]
        seen += [prompt[: place + 1] for place in range(len(prompt))]
        begin += block.num_prompt
        for size in block.num_completion:
            own = row[begin : begin + size]
            seen += [prompt + own[: place + 1] for place in range(size)]
            begin += size
    assert begin == len(row)
    return seen


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=30)
@given(groups=micro_batches())
def test_every_completion_token_is_predicted_from_its_prompt_and_its_own_past(
    layout: Layout, groups: list[Group]
) -> None:
    packed = lay_out(groups, layout)
    seen = seen_by(packed)
    found = [(seen[source], target) for source, target in torch.stack([packed.source_M, packed.target_M], 1).tolist()]
    expected = []
    for one in groups:
        for completion in one.completions:
            whole = [*one.prompt.tolist(), *completion.tolist()]
            for place in range(max(len(one.prompt), 1), len(whole)):
                expected.append(([(token, at) for at, token in enumerate(whole[:place])], whole[place]))
    assert found == expected
    assert packed.length_PC.tolist() == [list(num_scored(one)) for one in groups]


@settings(max_examples=30)
@given(groups=micro_batches())
def test_packed_rows_hold_what_is_needed_and_nothing_else(groups: list[Group]) -> None:
    inputs = [[len(completion) - 1 for completion in one.completions] for one in groups]
    shared = sum(len(one.prompt) + sum(own) for one, own in zip(groups, inputs, strict=True))
    repeated = sum(len(one.prompt) * len(own) + sum(own) for one, own in zip(groups, inputs, strict=True))
    assert lay_out(groups, "shared_prompt").tokens_BT.shape == (1, shared)
    assert lay_out(groups, "packed").tokens_BT.shape == (1, repeated)


def test_padded_rows_are_sequences_filled_up_at_their_end() -> None:
    packed = lay_out([group(0, [5, 6], [7, 8, 9], [4]), group(1, [3], [2, 1], [8, 9])], "padded")
    assert packed.tokens_BT.tolist() == [[5, 6, 7, 8], [5, 6, 0, 0], [3, 2, 0, 0], [3, 8, 0, 0]]
    assert (packed.num_groups, packed.num_completions, packed.blocks) == (2, 2, None)


def test_a_shared_prompt_lies_once_before_its_completions() -> None:
    packed = lay_out([group(0, [5, 6], [7, 8, 9], [4]), group(1, [3], [2, 1], [8, 9])], "shared_prompt")
    assert packed.tokens_BT.tolist() == [[5, 6, 7, 8, 3, 2, 8]]
    assert packed.positions_BT.tolist() == [[0, 1, 2, 3, 0, 1, 1]]
    assert packed.source_M.tolist() == [1, 2, 3, 1, 4, 5, 4, 6]
    assert packed.target_M.tolist() == [7, 8, 9, 4, 2, 1, 8, 9]


def test_all_tensors_move_to_a_device() -> None:
    moved = lay_out([group(0, [1], [2, 3], [4])], "packed").to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert len(tensors) == 5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pair_that_leaves_nothing_to_predict_is_refused(layout: Layout) -> None:
    with pytest.raises(TrainingError, match="pair 17: completion 1 has no token to predict"):
        lay_out([group(17, [], [2, 3], [4])], layout)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([], "at least one group"),
        ([group(0, [1], [2], [3]), group(6, [1], [2], [3], [4])], "group 6 has 3 completions, the first one 2"),
    ],
)
def test_groups_that_are_not_alike_are_refused(groups: list[Group], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        lay_out(groups, "packed")
