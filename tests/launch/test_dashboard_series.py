"""Curves of fixed size: sums stay exact when buckets merge, and a rewind forgets what was done again."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from mixwright.launch.dashboard.run_view import shown
from mixwright.launch.dashboard.series import Buckets, plain


@pytest.mark.parametrize("points", [7, 64, 10_000])
def test_merged_buckets_are_exact_sums_over_their_steps(points: int) -> None:
    chance = np.random.default_rng(0)
    buckets, step_n = Buckets(2, max_buckets=64), np.arange(1, 1000)
    value_nC, weight_nC = chance.normal(size=(999, 2)), chance.integers(0, 3, (999, 2)).astype(float)
    for part in np.array_split(np.arange(999), 37):
        buckets.add_many(
            step_n[part], value_nC[part] * weight_nC[part], weight_nC[part], value_nC[part] ** 2 * weight_nC[part]
        )
    curve = buckets.curve(points)
    starts = np.concatenate([[0], np.searchsorted(step_n, curve.step_P, side="right")])
    for point, (first, last) in enumerate(itertools.pairwise(starts)):
        values, weights = value_nC[first:last], weight_nC[first:last]
        assert np.allclose(curve.mean_PC[point], (values * weights).sum(axis=0) / weights.sum(axis=0))
        seen = np.where(weights > 0, values, np.nan)
        assert np.allclose(curve.low_PC[point], np.nanmin(seen, axis=0))
        assert np.allclose(curve.high_PC[point], np.nanmax(seen, axis=0))
    assert len(curve.step_P) <= min(points, 64)
    assert curve.weight_PC.sum() == weight_nC.sum()


def test_a_rewind_forgets_everything_from_its_step_on() -> None:
    buckets = Buckets(1, max_buckets=64)
    for step in range(60):
        buckets.add(step, [1.0])
    buckets.add(30, [5.0])
    curve = buckets.curve(100)
    assert curve.step_P.tolist() == list(range(31))
    assert curve.mean_PC[:, 0].tolist() == [1.0] * 30 + [5.0]


def test_numbers_are_json_with_significant_digits_and_no_nan() -> None:
    assert plain([1234567.0, 0.000123456, np.nan, -np.inf, 0.0], 3) == [1230000.0, 0.000123, None, None, 0.0]
    json.dumps(plain(np.full((2, 2), np.nan)), allow_nan=False)


def test_texts_are_spelt_out_but_for_line_breaks_and_tabs() -> None:
    assert shown({"a\x00": ["x\u202ey\n\tz", 3, [1.5]]}) == {"a\\x00": ["x\\u202ey\n\tz", 3, [1.5]]}
