"""The soak's verdicts, on memory whose growth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.benchmarks import soak
from tests.benchmarks.soak import (
    MAX_KB_A_COMMIT,
    MAX_MIB_AN_HOUR,
    Growth,
    Sample,
    growth,
    median_interval,
    progress,
    show_rate,
)

MIB_IN_KB = 2**20 / 1e3


HOURS = 2.0


def samples(slope: float, kb_a_commit: float, noise: np.ndarray, hours: float = HOURS) -> list[Sample]:
    """Samples of a process that grows by `slope` MiB an hour and `kb_a_commit`; 60 commits in every other phase.

    `noise` [num_samples] in MiB.
    """
    seconds = np.linspace(0.0, hours * 3600, len(noise))
    phase = seconds * soak.NUM_PHASES / (hours * 3600)
    commits = (60 * np.where(phase % 2 < 1, phase // 2 + phase % 2, phase // 2 + 1)).astype(int)
    mib = 100 + slope * seconds / 3600 + kb_a_commit / MIB_IN_KB * commits + noise
    return [
        Sample(float(at), int(100 * at), int(count), {"trainer": float(own)}, 0.0, 1e-6 * at, 1e-6 * at, int(at))
        for at, count, own in zip(seconds, commits, mib, strict=True)
    ]


def grown(slope: float, kb_a_commit: float, noise: np.ndarray, hours: float = HOURS) -> Growth:
    return growth(samples(slope, kb_a_commit, noise, hours), "trainer", hours * 3600)


def white(count: int, mib: float) -> np.ndarray:
    return np.random.default_rng(5).normal(0.0, mib, count)


@pytest.mark.parametrize(
    ("slope", "kb_a_commit", "verdict"),
    [
        (0.0, 0.0, "flat"),
        (0.7 * MAX_MIB_AN_HOUR, 0.7 * MAX_KB_A_COMMIT, "flat"),
        (1.3 * MAX_MIB_AN_HOUR, 0.0, "GROWS"),
        (0.0, 1.3 * MAX_KB_A_COMMIT, "GROWS"),
    ],
)
def test_growth_by_time_and_by_commits_are_told_apart(slope: float, kb_a_commit: float, verdict: str) -> None:
    found = grown(slope, kb_a_commit, white(720, 0.01))
    assert found.slope[0] <= slope <= found.slope[2]
    assert found.commit_kb[0] <= kb_a_commit <= found.commit_kb[2]
    assert found.verdict == verdict


def test_a_step_of_the_heap_is_no_leak_and_a_leak_that_hides_in_the_active_phases_is_seen() -> None:
    step = np.where(np.arange(720) > 400, 4.0, 0.0)
    assert grown(0.0, 10.0, white(720, 0.01) + step).verdict == "flat"
    leak = np.cumsum(np.where(np.arange(720) * soak.NUM_PHASES / 720 % 2 < 1, 0.08, 0.0))
    assert grown(0.0, 0.0, leak).verdict == "GROWS"


def test_a_few_noisy_minutes_show_neither() -> None:
    assert grown(0.0, 0.0, white(72, 0.3), hours=0.2).verdict.startswith("NOT SHOWN")
    assert grown(2 * MAX_MIB_AN_HOUR, 0.0, white(30, 0.3), hours=0.1).verdict.startswith("NOT SHOWN")


@pytest.mark.parametrize(
    ("count", "low", "high"), [(5, -math.inf, math.inf), (6, 0, 5), (8, 0, 7), (9, 1, 7), (12, 2, 9)]
)
def test_order_statistics_around_a_median_hold_it_as_often_as_they_say(count: int, low: float, high: float) -> None:
    """The numbers of the ordered values, as tables of the sign test have them; and a trial."""
    found = median_interval([float(value) for value in reversed(range(count))])
    assert found == (low, (count - 1) / 2, high)
    drawn = np.random.default_rng(7).normal(size=(2000, count))
    held = [one <= 0 <= other for one, _, other in map(median_interval, drawn.tolist())]
    assert np.mean(held) > 0.94


def test_files_that_take_more_bytes_a_step_are_not_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    first, middle, last = samples(0.0, 0.0, np.zeros(3))
    assert show_rate("journal", first, middle, last)
    last.journal_mb *= 1.2
    assert not show_rate("journal", first, middle, last)
    assert "GROWS" in capsys.readouterr().out


def test_a_line_on_the_way_says_how_long_it_takes() -> None:
    sample = samples(0.0, 0.0, np.zeros(3))[1]
    assert progress(sample, 2400.0) == "360,000 steps, about 40 min left; MiB: trainer 100.0"
