"""The soak's verdicts, on memory whose growth is known."""

from __future__ import annotations

import numpy as np
import pytest

from tests.benchmarks import soak
from tests.benchmarks.soak import MAX_KB_A_COMMIT, MAX_MIB_AN_HOUR, Sample, growth, progress, show_rate

MIB_IN_KB = 2**20 / 1e3


def samples(hours: float, slope: float, kb_a_commit: float, noise: np.ndarray, every_s: float = 10.0) -> list[Sample]:
    """Samples of a process that grows by `slope` MiB an hour and `kb_a_commit`; 800 commits in every other phase.

    `noise` [num_samples] in MiB.
    """
    seconds = np.arange(0.0, hours * 3600, every_s)
    phase = seconds * soak.NUM_PHASES / (hours * 3600)
    commits = (100 * np.where(phase % 2 < 1, phase // 2 + phase % 2, phase // 2 + 1)).astype(int)
    mib = 100 + slope * seconds / 3600 + kb_a_commit / MIB_IN_KB * commits + noise
    return [
        Sample(float(at), int(100 * at), int(count), {"trainer": float(own)}, 0.0, 1e-6 * at, 1e-6 * at, int(at))
        for at, count, own in zip(seconds, commits, mib, strict=True)
    ]


def white(count: int, mib: float = 0.3) -> np.ndarray:
    return np.random.default_rng(5).normal(0.0, mib, count)


def walk(count: int, mib: float = 0.3) -> np.ndarray:
    """Noise that remembers: a heap that grows and shrinks by itself over minutes."""
    steps, level = white(count, mib), np.zeros(count)
    for at in range(1, count):
        level[at] = 0.95 * level[at - 1] + steps[at]
    return level


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
    found = growth(samples(2.0, slope, kb_a_commit, white(720)), "trainer")
    assert abs(found.slope - slope) <= found.slope_error < 0.2 * MAX_MIB_AN_HOUR
    assert abs(found.commit_kb - kb_a_commit) <= found.commit_kb_error < 0.1 * MAX_KB_A_COMMIT
    assert found.verdict == verdict


@pytest.mark.parametrize("slope", [0.0, MAX_MIB_AN_HOUR, 2 * MAX_MIB_AN_HOUR])
def test_a_few_noisy_minutes_show_neither(slope: float) -> None:
    found = growth(samples(0.2, slope, 0.0, walk(72)), "trainer")
    assert found.verdict.startswith("NOT SHOWN")


def test_noise_that_remembers_widens_the_confidence() -> None:
    remembers = walk(720)
    forgets = np.random.default_rng(6).permutation(remembers)
    wide, narrow = (growth(samples(2.0, 0.0, 0.0, noise), "trainer") for noise in (remembers, forgets))
    assert wide.slope_error > 3 * narrow.slope_error
    assert abs(wide.slope) <= wide.slope_error


def test_files_that_take_more_bytes_a_step_are_not_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    first, middle, last = samples(1.0, 0.0, 0.0, np.zeros(3), every_s=1200.0)
    assert show_rate("journal", first, middle, last)
    last.journal_mb *= 1.2
    assert not show_rate("journal", first, middle, last)
    assert "GROWS" in capsys.readouterr().out


def test_a_line_on_the_way_says_how_long_it_takes() -> None:
    sample = samples(1.0, 0.0, 0.0, np.zeros(3), every_s=1200.0)[1]
    assert progress(sample, 2400.0) == "120,000 steps, about 40 min left; MiB: trainer 100.0"
