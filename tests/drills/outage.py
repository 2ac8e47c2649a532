"""How fast a run trains while its controller is away: the time of each step before and during the outage."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WARM_UP_STEPS = 20


@dataclass(frozen=True)
class Step:
    """One step with what came after it until the next one began, by the training thread.

    `clock_s` is made of `computing_s`, of `delayed_s`, ready to compute while the kernel gave the processors to others,
    and of waiting for something: a lock, a disk, another thread or process.
    """

    number: int
    began: float
    clock_s: float
    computing_s: float
    delayed_s: float

    @property
    def waited_s(self) -> float:
        """Neither computing nor ready to."""
        return max(0.0, self.clock_s - self.computing_s - self.delayed_s)


@dataclass(frozen=True)
class Pace:
    """The steps of a stretch of time: seconds of the median, and the slowest as a multiple of it.

    `slowest_by_waiting`: as if every step had computed for the median time and no other program had been running.
    """

    num_steps: int
    median_s: float
    slowest: float
    computing_s: float
    longest_wait_s: float

    @property
    def slowest_by_waiting(self) -> float:
        return 1 + self.longest_wait_s / self.computing_s

    def __str__(self) -> str:
        return (
            f"{self.num_steps} steps; clock: median {self.median_s:.3f} s, slowest {self.slowest:.2f} x; without other "
            f"programs: computing {self.computing_s:.3f} s (median), longest wait {self.longest_wait_s:.3f} s, "
            f"slowest {self.slowest_by_waiting:.2f} x"
        )


def read_steps(path: Path) -> list[Step]:
    """All steps that are over, from the file of DRILL_TIMES (altered_job.py)."""
    lines = [line.split() for line in path.read_text().splitlines()]
    times = [(int(line[0]), [float(word) for word in line[1:]]) for line in lines if len(line) == 4]
    steps = [
        Step(number, at[0], *(after - before for before, after in zip(at, later, strict=True)))
        for (number, at), (_, later) in itertools.pairwise(times)
    ]
    return [step for step in steps if step.number >= WARM_UP_STEPS]


def pace(steps: Sequence[Step], first: float, last: float) -> Pace:
    """Of the steps that began and ended between two times of the monotonic clock."""
    within = [step for step in steps if first <= step.began and step.began + step.clock_s <= last]
    median_s = statistics.median(step.clock_s for step in within)
    return Pace(
        num_steps=len(within),
        median_s=median_s,
        slowest=max(step.clock_s for step in within) / median_s,
        computing_s=statistics.median(step.computing_s for step in within),
        longest_wait_s=max(step.waited_s for step in within),
    )
