"""Counts of domains: exact, monotone, near to what was promised, through any changes of the mixture."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixwright.data_mixing.apportion import MAX_ROWS, Apportionment, integer_proportions, without
from mixwright.data_mixing.entries import PROPORTION_TOTAL

BOUND = 16


def start(weights: list[float] | np.ndarray) -> Apportionment:
    proportions = integer_proportions(weights)
    return Apportionment(proportions, np.zeros_like(proportions))


def after(apportionment: Apportionment, num_rows: int) -> np.ndarray:
    return apportionment.carried(num_rows, apportionment.counts(num_rows))


def worst_error_rows(apportionment: Apportionment, num_rows: int) -> float:
    """Largest |promised - got| over the domains that are being drawn."""
    credit_G = after(apportionment, num_rows)
    return float(np.abs(credit_G[apportionment.proportions > 0]).max() / PROPORTION_TOTAL)


def zipf(size: int) -> np.ndarray:
    return 1 / np.arange(1, size + 1)


mixtures = st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1e3)), min_size=1, max_size=40).filter(any)


@given(mixtures, st.integers(0, MAX_ROWS))
@settings(max_examples=150, deadline=None)
def test_counts_sum_to_the_rows_and_are_never_negative(weights: list[float], num_rows: int) -> None:
    count_G = start(weights).counts(num_rows)
    assert count_G.sum() == num_rows
    assert count_G.min() >= 0


@given(mixtures, st.data())
@settings(max_examples=100, deadline=None)
def test_one_row_more_is_one_row_more_for_exactly_one_domain(weights: list[float], data: st.DataObject) -> None:
    apportionment = Apportionment(integer_proportions(weights), _credits(data, len(weights)))
    first = data.draw(st.integers(0, MAX_ROWS - 5))
    gained = np.diff([apportionment.counts(n) for n in range(first, first + 5)], axis=0)
    assert np.array_equal(np.sort(gained, axis=1)[:, -1], np.ones(4))
    assert gained.sum() == 4
    assert gained.min() >= 0


def _credits(data: st.DataObject, size: int) -> np.ndarray:
    """Credits with sum 0, as segments leave them: a few rows each."""
    wide = st.integers(-6 * PROPORTION_TOTAL, 6 * PROPORTION_TOTAL)
    credit_G = np.array(data.draw(st.lists(wide, min_size=size, max_size=size)), np.int64)
    credit_G[-1] -= credit_G.sum()
    return credit_G


@given(mixtures, st.data())
@settings(max_examples=100, deadline=None)
def test_a_domain_with_proportion_zero_is_never_drawn_whatever_it_is_owed(
    weights: list[float], data: st.DataObject
) -> None:
    apportionment = Apportionment(integer_proportions(weights), _credits(data, len(weights)))
    for num_rows in (1, 17, 1000, MAX_ROWS):
        assert not apportionment.counts(num_rows)[apportionment.proportions == 0].any()


@given(mixtures, st.data())
@settings(max_examples=100, deadline=None)
def test_cutting_a_segment_anywhere_changes_nothing(weights: list[float], data: st.DataObject) -> None:
    """What makes the restart of counting every 2**30 rows, and a commit of the same mixture, invisible."""
    whole = Apportionment(integer_proportions(weights), _credits(data, len(weights)))
    cut, more = data.draw(st.integers(0, 5000)), data.draw(st.integers(0, 5000))
    rest = Apportionment(whole.proportions, after(whole, cut))
    assert np.array_equal(whole.counts(cut) + rest.counts(more), whole.counts(cut + more))
    assert np.array_equal(after(rest, more), after(whole, cut + more))


@given(st.lists(mixtures, min_size=1, max_size=20), st.data())
@settings(max_examples=80, deadline=None)
def test_credit_stays_small_through_any_sequence_of_mixtures(sequence: list[list[float]], data: st.DataObject) -> None:
    """Up to 20 changes of 40 domains. Resting domains keep at most a few rows, which the others share."""
    size = min(len(weights) for weights in sequence)
    credit_G = np.zeros(size, np.int64)
    for weights in sequence:
        proportions = integer_proportions(weights[:size] if any(weights[:size]) else np.ones(size))
        apportionment = Apportionment(proportions, credit_G)
        num_rows = data.draw(st.integers(1, 400))
        assert worst_error_rows(apportionment, num_rows // 2 + 1) <= BOUND
        credit_G = after(apportionment, num_rows)
        assert credit_G.sum() == 0
        assert np.abs(credit_G).max() <= BOUND * PROPORTION_TOTAL


def test_two_domains_follow_websters_rule_exactly() -> None:
    apportionment = start([3, 1])
    assert [apportionment.counts(n).tolist() for n in range(9)] == [
        [0, 0], [1, 0], [2, 0], [2, 1], [3, 1], [4, 1], [5, 1], [5, 2], [6, 2],
    ]  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3, 24, 1000])
def test_in_one_mixture_the_error_is_at_most_half_the_depth_of_the_tree(size: int) -> None:
    depth = (size - 1).bit_length()
    rng = np.random.default_rng(size)
    for weights in (zipf(size), rng.pareto(0.5, size) + 1e-6, np.eye(size)[0] * size + 1e-3):
        apportionment = start(weights)
        for num_rows in range(0, 4000, 7):
            assert worst_error_rows(apportionment, num_rows) <= depth / 2 + 1e-9


@pytest.mark.parametrize("heaviest", [0.1, 0.5, 0.9])
def test_ten_thousand_domains_stay_within_the_contract_at_every_step(heaviest: float) -> None:
    weights = np.random.default_rng(1).random(10_000)
    weights[123] = weights.sum() * heaviest / (1 - heaviest)
    apportionment = start(weights)
    worst = max(worst_error_rows(apportionment, step * 4096) for step in range(1, 400))
    assert worst <= 7


@pytest.mark.parametrize(("size", "rows_per_step", "num_steps"), [(7, 8, 10), (24, 64, 10), (1000, 256, 5)])
def test_a_hundred_changes_of_the_mixture_add_no_error_up(size: int, rows_per_step: int, num_steps: int) -> None:
    """Heavy domains rise and fall between 10 % and 90 %; a flat divisor method drifts away by tens of rows."""
    rng = np.random.default_rng(size)
    credit_G, got_G, promised_G, worst = np.zeros(size, np.int64), np.zeros(size, np.int64), np.zeros(size), 0.0
    for change in range(100):
        weights = rng.random(size) + 0.01
        weights[0] = weights[1:].sum() * (9 if change % 2 else 1 / 9)
        apportionment = Apportionment(integer_proportions(weights), credit_G)
        for step in range(1, num_steps + 1):
            error_G = promised_G + step * rows_per_step * apportionment.proportions / PROPORTION_TOTAL
            error_G = error_G - got_G - apportionment.counts(step * rows_per_step)
            worst = max(worst, float(np.abs(error_G).max()))
        num_rows = num_steps * rows_per_step
        credit_G, got_G = after(apportionment, num_rows), got_G + apportionment.counts(num_rows)
        promised_G = promised_G + num_rows * apportionment.proportions / PROPORTION_TOTAL
    assert worst <= 5
    assert not np.any((promised_G >= 2) & (got_G == 0)), "a domain was starved"


def test_ten_thousand_domains_through_forty_changes_with_domains_that_rest() -> None:
    size, rng = 10_000, np.random.default_rng(3)
    credit_G, worst = np.zeros(size, np.int64), 0.0
    for _change in range(40):
        weights = zipf(size) * np.exp(0.3 * rng.normal(size=size)) * (rng.random(size) > 0.1)
        apportionment = Apportionment(integer_proportions(weights), credit_G)
        worst = max(worst, *(worst_error_rows(apportionment, step * 4096) for step in (1, 4, 9)))
        credit_G = after(apportionment, 10 * 4096)
    assert worst <= BOUND


def test_a_heavy_domain_set_to_zero_is_owed_nothing_by_the_others() -> None:
    """Credit in real instead of promised rows would make the others wait for, or race, the domain that left."""
    heavy = start([0.9, *zipf(99)])
    credit_G = after(heavy, 777)
    others = Apportionment(integer_proportions([0, *zipf(99)]), credit_G)
    for num_rows in range(1, 600):
        assert others.counts(num_rows)[0] == 0
        assert worst_error_rows(others, num_rows) <= 5
    back = Apportionment(integer_proportions([0.9, *zipf(99)]), after(others, 600))
    assert max(worst_error_rows(back, n) for n in range(1, 600)) <= 5
    assert after(others, 600)[0] == credit_G[0], "resting credit is kept for the day it is asked for"


def test_a_domain_of_a_fraction_of_a_row_per_segment_is_not_starved() -> None:
    """Aioli-like: segments of 80 rows, in each of which the domain is promised 0.08 rows."""
    credit_G, got = np.zeros(3, np.int64), 0
    for segment in range(500):
        apportionment = Apportionment(integer_proportions([0.5 + segment % 2, 0.499, 0.001]), credit_G)
        got += int(apportionment.counts(80)[2])
        credit_G = after(apportionment, 80)
    promised = sum(80 * 0.001 / (0.999 + segment % 2 + 0.001) for segment in range(500))
    assert abs(got - promised) <= 1.5


def test_the_first_rows_of_equal_domains_go_round() -> None:
    gained = np.diff([start(np.ones(8)).counts(n) for n in range(17)], axis=0)
    assert np.array_equal(gained[:8].sum(axis=0), np.ones(8))
    assert np.array_equal(gained[8:].sum(axis=0), np.ones(8))


@pytest.mark.parametrize("num_rows", [-1, MAX_ROWS + 1])
def test_rows_outside_the_exact_range_are_refused(num_rows: int) -> None:
    with pytest.raises(ValueError, match="must be between 0 and"):
        start([1, 2]).counts(num_rows)


@given(mixtures)
@settings(max_examples=150, deadline=None)
def test_integer_proportions_sum_to_the_total_and_lose_no_domain(weights: list[float]) -> None:
    share_G = integer_proportions(weights)
    assert share_G.sum() == PROPORTION_TOTAL
    assert np.array_equal(share_G > 0, np.array(weights) > 0)
    total = sum(Fraction(w) for w in weights)
    for share, weight in zip(share_G.tolist(), weights, strict=True):
        assert abs(share - Fraction(weight) * PROPORTION_TOTAL / total) <= len(weights)


def test_integer_proportions_take_integers_floats_of_any_size_and_break_ties_by_order() -> None:
    assert integer_proportions([1, 1, 1]).tolist() == [715827883, 715827883, 715827882]
    assert integer_proportions([1e-300, 1e300]).tolist() == [1, PROPORTION_TOTAL - 1]
    assert integer_proportions([0.25, 0.75]).tolist() == [1 << 29, 3 << 29]
    assert integer_proportions(np.array([2, 0], np.int64)).tolist() == [PROPORTION_TOTAL, 0]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, -2], "weight 1 is -2; expected a finite number >= 0"),
        ([float("nan"), 1], "weight 0 is nan"),
        ([1, float("inf")], "weight 1 is inf"),
        ([0, 0.0], "all 2 weights are zero"),
        ([], "all 0 weights are zero"),
        (np.ones(2**15 + 1), "at most 32768 domains"),
    ],
)
def test_integer_proportions_refuse_what_is_no_mixture(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        integer_proportions(weights)


@given(mixtures, st.data())
@settings(max_examples=100, deadline=None)
def test_without_gives_the_share_of_the_excluded_to_the_others_in_proportion(
    weights: list[float], data: st.DataObject
) -> None:
    proportions = integer_proportions(weights)
    excluded = np.array(data.draw(st.lists(st.booleans(), min_size=len(weights), max_size=len(weights))))
    share_G = without(proportions, excluded)
    kept = [int(p) for p, out in zip(proportions, excluded, strict=True) if not out]
    if sum(kept) == 0:
        assert share_G is None
        return
    assert share_G is not None
    assert share_G.sum() == PROPORTION_TOTAL
    assert not share_G[excluded].any()
    for share, weight in zip(share_G[~excluded].tolist(), kept, strict=True):
        assert abs(share - Fraction(weight * PROPORTION_TOTAL, sum(kept))) < 1
