"""Arms: which domains an online policy treats as one, and what of them goes in and out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mixwright.data_mixing.arms import Arms, arms_of
from mixwright.data_mixing.errors import PolicyRejected
from tests.data_mixing.online_cases import domains, online


def arms(names: list[str], rows: list[int] | None = None, **keys: Any) -> Arms:
    return arms_of(online({"kind": "odm", **keys})[1], domains(*names, rows=rows))


def test_up_to_sixteen_domains_are_an_arm_each_in_catalogue_order() -> None:
    names = [f"{letter}-x" for letter in "qwertyuiopasdfgh"]
    assert arms(names).names == tuple(names)


def test_above_sixteen_domains_the_first_part_of_the_name_is_the_arm() -> None:
    found = arms([f"web-{i}" for i in range(10)] + [f"code.{i}" for i in range(6)] + ["wiki", "web_x"])
    assert found.names == ("web", "code", "wiki")
    assert found.members == ((*range(10), 17), tuple(range(10, 16)), (16,))


def test_more_than_sixteen_prefixes_are_refused_with_the_remedy() -> None:
    with pytest.raises(
        PolicyRejected, match=r"begin with 17 groups, at most 16 are possible; group the domains, such as"
    ):
        arms([f"d{i}" for i in range(17)])


def test_named_arms_take_globs_and_leave_out_what_none_covers() -> None:
    found = arms(["a-1", "b", "a-2", "c"], arms={"first": ["a-*"], "rest": ["b"]})
    assert (found.names, found.members) == (("first", "rest"), ((0, 2), (1,)))
    assert found.expand([0.5, 0.5]).tolist() == [0.25, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"arms": {"x": ["aa"]}}, "arms.aa: no such domain"),
        ({"arms": {"x": ["a"], "y": ["a"]}}, "arms.y: 'a' is also in arm 'x'"),
        ({"arms": {"x": ["*"], "y": ["b*"]}}, "is also matched by"),
        ({"arms": {"x": []}}, "arms.x: expected at least one domain name or glob"),
        ({"arms": {}}, "arms: expected at least one arm"),
        ({"guard": {"floor": 0.5}}, "guard.floor: 0.5 for each of 3 arms leaves nothing to decide; expected less than"),
        ({"arms": {"x": ["a"]}, "target": {"b": 1}}, "target: names only domains that are in no arm"),
        ({"initial": {"q": 1}}, "initial.q: no such domain"),
    ],
)
def test_arms_that_cannot_be_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyRejected) as caught:
        arms(["a", "b", "c"], **keys)
    assert message in str(caught.value)


def test_an_arm_is_divided_among_its_domains_by_rows() -> None:
    found = arms(["a", "b", "c"], [100, 300, 50], arms={"ab": ["a", "b"], "c": ["c"]})
    assert found.expand([0.8, 0.2]).tolist() == pytest.approx([0.2, 0.6, 0.2])
    assert found.rows_K == (400, 50)


def test_whole_numbers_are_summed_and_losses_are_means_over_tokens() -> None:
    found = arms(["a", "b", "c", "d"], arms={"ab": ["a", "b"], "c": ["c"], "d": ["d"]})
    assert found.sum([1, 2, 3, 4]) == (3, 3, 4)
    assert found.pool_losses([10.0, 90.0, 7.0, 1.0], [10, 30, 0, 2]) == (2.5, None, 0.5)
    assert found.pool_losses([np.nan, 90.0, np.inf, 1.0], [10, 30, 5, 2]) == (3.0, None, 0.5)


def test_a_zero_share_at_the_start_is_raised_to_the_floor_and_stays_without_one() -> None:
    keys: dict[str, Any] = {"initial": {"a": 1, "b": 1}}
    assert min(arms(["a", "b", "c"], **keys, guard={"floor": 0.02}).initial_K) == pytest.approx(0.02)
    assert arms(["a", "b", "c"], **keys, guard={"floor": 0}).initial_K == (0.5, 0.5, 0.0)
