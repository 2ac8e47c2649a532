"""Which apportionment keeps contract 1: `python -m tests.benchmarks.bench_apportion` (about a minute).

Compares the nested divisor method of `apportion.py` with the flat divisor method of spec/mixing.md, appendix A, under
its three choices of phases. `error` is the largest |realised - requested| in rows of any domain that is being drawn, at
any step looked at; `L1` is the mean distance between a step's realised and requested mixture.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.apportion import Apportionment, integer_proportions
from mixwright.data_mixing.entries import PROPORTION_TOTAL as TOTAL
from mixwright.data_mixing.permutation import fold_key

Int64s = NDArray[np.int64]
Weights = NDArray[np.float64]


class Method(Protocol):
    def counts(self, num_rows: int) -> Int64s: ...
    def next_state(self, num_rows: int) -> Int64s: ...


class Flat:
    """One divisor for all domains: the first rows are those due earliest. The state is a phase per domain."""

    def __init__(self, share_G: Int64s, phase_G: Int64s) -> None:
        self.share_G, self.phase_G = share_G, phase_G

    def due(self, virtual_time: int) -> Int64s:
        return np.maximum((virtual_time * self.share_G + self.phase_G) // TOTAL, 0)

    def counts(self, num_rows: int) -> Int64s:
        reach = 2 * len(self.share_G) + 64
        low, high = num_rows - reach, num_rows + reach + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.due(middle).sum() <= num_rows else (low, middle)
        self.virtual_time, count_G = low, self.due(low)
        next_G = np.flatnonzero(self.due(low + 1) > count_G)
        wait = (count_G[next_G] + 1) * TOTAL - self.phase_G[next_G] - low * self.share_G[next_G]
        order = np.lexsort((next_G, (wait << 31) // self.share_G[next_G]))
        count_G[next_G[order[: num_rows - int(count_G.sum())]]] += 1
        return count_G

    def next_state(self, num_rows: int) -> Int64s:
        count_G = self.counts(num_rows)
        return self.virtual_time * self.share_G + self.phase_G - count_G * TOTAL


class Nested(Apportionment):
    def next_state(self, num_rows: int) -> Int64s:
        return self.carried(num_rows, self.counts(num_rows))


def hashed(size: int) -> Int64s:
    return (fold_key(np.array([1], np.uint64), np.arange(size, dtype=np.uint64)) >> np.uint64(33)).astype(np.int64)


METHODS: dict[str, tuple[Callable[[Int64s, Int64s], Method], Callable[[int], Int64s]]] = {
    "flat, phase 1/2": (Flat, lambda size: np.full(size, TOTAL // 2)),
    "flat, golden ratio": (Flat, lambda size: (np.arange(size) * 1327217885) % TOTAL),
    "flat, hashed": (Flat, hashed),
    "nested": (Nested, lambda size: np.zeros(size, np.int64)),
}


def zipf(size: int) -> Weights:
    return np.asarray(1 / np.arange(1, size + 1))


def jittered(size: int, changes: int) -> Iterator[Weights]:
    """Zipf weights that wander by factors of about 1.35 at each change."""
    rng = np.random.default_rng(0)
    for _ in range(changes):
        yield zipf(size) * np.exp(0.3 * rng.normal(size=size))


def one_heavy(size: int, share: float) -> Iterator[Weights]:
    weights = np.random.default_rng(3).random(size)
    weights[0] = weights[1:].sum() * share / (1 - share)
    yield weights


def swinging(size: int, changes: int) -> Iterator[Weights]:
    """One domain goes from 10 % to 90 % and back, the others are drawn anew each time."""
    rng = np.random.default_rng(0)
    for change in range(changes):
        weights = rng.random(size) + 0.01
        weights[0] = weights[1:].sum() * (9 if change % 2 else 1 / 9)
        yield weights


def resting(size: int, changes: int) -> Iterator[Weights]:
    """A tenth of the domains, and every third time the heaviest, rest."""
    rng = np.random.default_rng(0)
    for change in range(changes):
        weights = zipf(size) * np.exp(0.3 * rng.normal(size=size)) * (rng.random(size) > 0.1)
        weights[0] *= change % 3 != 1
        yield weights


CASES: list[tuple[str, int, int, int, Iterator[Weights]]] = [
    ("Zipf, one mixture", 10_000, 4096, 400, iter([zipf(10_000)])),
    ("one domain has 90 %", 10_000, 4096, 400, one_heavy(10_000, 0.9)),
    ("100 jitters", 10_000, 4096, 10, jittered(10_000, 100)),
    ("100 swings", 10_000, 4096, 10, swinging(10_000, 100)),
    ("100 changes with rests", 10_000, 4096, 10, resting(10_000, 100)),
    ("100 swings", 1000, 1024, 20, swinging(1000, 100)),
    ("400 jitters (Aioli-like)", 7, 8, 10, jittered(7, 400)),
    ("100 swings", 24, 64, 10, swinging(24, 100)),
]


def run(name: str, rows_per_step: int, num_steps: int, mixtures: list[Weights]) -> tuple[float, float, int, float]:
    """Worst error in rows, mean L1 of a step, starved domains, milliseconds for the counts of a step."""
    build, start = METHODS[name]
    size = len(mixtures[0])
    state_G, got_G, wanted_G = start(size), np.zeros(size, np.int64), np.zeros(size)
    worst, distances, seconds, looked = 0.0, [], 0.0, 0
    for weights in mixtures:
        share_G = integer_proportions(weights)
        method, drawn, mixture = build(share_G, state_G), share_G > 0, share_G / TOTAL
        for step in sorted({1, 2, num_steps // 3, num_steps // 2, num_steps - 1, num_steps}):
            started = time.perf_counter()
            before, after = method.counts((step - 1) * rows_per_step), method.counts(step * rows_per_step)
            seconds, looked = seconds + time.perf_counter() - started, looked + 2
            error_G = got_G + after - wanted_G - step * rows_per_step * mixture
            worst = max(worst, float(np.abs(error_G[drawn]).max()))
            distances.append(float(np.abs((after - before) / rows_per_step - mixture).sum()))
        num_rows = num_steps * rows_per_step
        got_G, wanted_G = got_G + method.counts(num_rows), wanted_G + num_rows * mixture
        state_G = method.next_state(num_rows)
    starved = int(((wanted_G >= 2) & (got_G == 0)).sum())
    return worst, float(np.mean(distances)), starved, seconds / looked * 1e3


def main() -> None:
    print(f"{'case':<26} {'domains':>7} | {'method':<20} {'error':>7} {'L1':>7} {'starved':>7} {'ms':>6}")
    for title, size, rows_per_step, num_steps, source in CASES:
        mixtures = list(source)
        for name in METHODS:
            worst, distance, starved, ms = run(name, rows_per_step, num_steps, mixtures)
            print(f"{title:<26} {size:>7} | {name:<20} {worst:>7.1f} {distance:>7.4f} {starved:>7} {ms:>6.2f}")


if __name__ == "__main__":
    main()
