"""The guard: floors, the longest step, and numbers that are no mixture."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixwright.data_mixing.guard import guarded, normalised, with_floor, within_reach
from mixwright.data_mixing.online import Guard

NUMBERS = st.lists(st.floats(0, 1e6), min_size=2, max_size=16).filter(lambda values: sum(values) > 0)


@settings(max_examples=200, deadline=None)
@given(NUMBERS, st.floats(0, 0.99))
def test_every_share_reaches_the_floor_and_the_sum_stays_one(values: list[float], part: float) -> None:
    floor = part / len(values)
    raised = with_floor(normalised(values, len(values)), floor)
    assert raised.min() >= floor - 1e-12
    assert raised.sum() == pytest.approx(1)


def test_a_mixture_above_the_floor_is_left_as_it_is() -> None:
    share_K = np.array([0.9, 0.06, 0.04])
    assert with_floor(share_K, 0.04) is share_K


def test_the_floor_is_reached_by_mixing_with_uniform() -> None:
    assert with_floor(np.array([1.0, 0.0]), 0.1).tolist() == pytest.approx([0.9, 0.1])
    raised_K = with_floor(np.array([0.7, 0.3, 0.0, 0.0]), 0.05)
    assert raised_K.tolist() == pytest.approx([0.61, 0.29, 0.05, 0.05])


def test_a_step_ends_on_the_line_at_the_longest_change() -> None:
    reached_K = within_reach(np.array([0.5, 0.5, 0.0]), np.array([0.0, 0.5, 0.5]), 0.4)
    assert reached_K.tolist() == pytest.approx([0.3, 0.5, 0.2])


@settings(max_examples=200, deadline=None)
@given(NUMBERS, st.floats(0.01, 2), st.data())
def test_no_decision_changes_shares_by_more_than_allowed_or_leaves_the_floor(
    values: list[float], longest: float, data: st.DataObject
) -> None:
    num_arms = len(values)
    guard = Guard(floor=0.5 / num_arms, max_l1_change=longest)
    others = data.draw(st.lists(st.floats(0, 1), min_size=num_arms, max_size=num_arms).filter(any))
    current_K = with_floor(normalised(values, num_arms), guard.floor)
    share_K = guarded(current_K, normalised(others, num_arms), guard)
    assert np.abs(share_K - current_K).sum() <= longest + 1e-9
    assert share_K.min() >= guard.floor - 1e-9
    assert share_K.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5, float("nan")], "share of arm 1 is not finite"),
        ([float("inf"), 1], "share of arm 0 is not finite"),
        ([1, -0.1], "share of arm 1 is -0.1"),
        ([0, 0], "all shares are zero"),
        ([1, 1, 1], "expected 2 shares, found an array of shape"),
    ],
)
def test_numbers_that_are_no_mixture_are_named(values: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalised(values, 2)


def test_huge_numbers_are_a_mixture() -> None:
    assert normalised([1e308, 1e308], 2).tolist() == [0.5, 0.5]
