"""What `metrics.jsonl` tells, as curves of fixed size: speed, instance weights, and the figures of preference runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixwright.launch.dashboard.series import Buckets
from mixwright.launch.dashboard.tails import LineTail, records

METRICS = "metrics.jsonl"
STEP_COLUMNS = ("step_seconds", "wait_seconds", "lr", "grad_norm")
MAX_FIGURES = 128
"""Curves of one run's figures; a file with more names than that is not one of ours."""


class MetricsView:
    """Feed it with `advance`. `with_figures`: also train and evaluation records, which no journal has."""

    def __init__(self, run_dir: Path, with_figures: bool) -> None:
        self._tail = LineTail(run_dir / METRICS)
        self._kinds = ("step", "weights", "test", "end", *(("train", "evaluation") if with_figures else ()))
        self._restarts = 0
        self._clear()

    def _clear(self) -> None:
        self.steps = Buckets(len(STEP_COLUMNS))
        self.weights = WeightFigures()
        self.figures: dict[str, Buckets] = {}
        self.tests: list[dict[str, Any]] = []
        self.end: dict[str, Any] | None = None
        self.num_steps_read = self.num_weights_read = self.num_figures_read = 0

    def advance(self) -> bool:
        """Take in the next part of the file; whether there was one."""
        lines = self._tail.read()
        if self._tail.restarts != self._restarts:
            self._restarts = self._tail.restarts
            self._clear()
        by_kind: dict[str, list[dict[str, Any]]] = {}
        for record in records(lines, self._kinds):
            by_kind.setdefault(str(record["kind"]), []).append(record)
        for kind, group in by_kind.items():
            self._take(kind, group)
        return bool(lines)

    def _take(self, kind: str, group: list[dict[str, Any]]) -> None:
        match kind:
            case "step":
                self._take_steps(group)
            case "weights":
                self.weights.add(group)
                self.num_weights_read += len(group)
            case "train" | "evaluation":
                for record in group:
                    self._take_figures(kind, record)
                self.num_figures_read += len(group)
            case "test":
                self.tests = [*self.tests[:1], group[-1]]
            case "end":
                self.end = group[-1]

    def _take_steps(self, group: list[dict[str, Any]]) -> None:
        self.num_steps_read += len(group)
        self.steps.add_many(_steps(group), _numbers([[record.get(name) for name in STEP_COLUMNS] for record in group]))

    def _take_figures(self, kind: str, record: Mapping[str, Any]) -> None:
        for name, value in _flat(record):
            key = f"{kind}/{name}"
            if key not in self.figures and len(self.figures) < MAX_FIGURES:
                self.figures[key] = Buckets(1)
            if key in self.figures:
                self.figures[key].add(record["step"], [value])

    def seconds_per_step(self, over: int = 32) -> float | None:
        """Mean of the newest points, None before the first step."""
        curve = self.steps.curve(1 << 20)
        newest = curve.mean_PC[-over:, 0]
        newest = newest[np.isfinite(newest) & (newest > 0)]
        return float(np.median(newest)) if len(newest) else None


class WeightFigures:
    """Instance weights over steps: effective sample size, histogram, shares by domain; empty while all count alike."""

    def __init__(self) -> None:
        self.scalars = Buckets(2)
        self.edges: tuple[float, ...] = ()
        self.counts = Buckets(1)
        self.names: tuple[str, ...] = ()
        self.weight_share, self.token_share = Buckets(1), Buckets(1)

    def add(self, group: list[dict[str, Any]]) -> None:
        """`weights` records of the metrics, in order."""
        scalars = [[record.get("effective_sample_size"), record.get("correlation")] for record in group]
        self.scalars.add_many(_steps(group), _numbers(scalars))
        # A run has one catalogue and one set of edges; a file in which they change is cut where they do.
        for names, part in itertools.groupby(group, key=lambda record: tuple(_mapping(record, "weight_share"))):
            self._add_shares(names, list(part))
        for edges, part in itertools.groupby(group, key=lambda record: tuple(_list(_histogram(record), "edges"))):
            self._add_counts(edges, list(part))

    def _add_shares(self, names: tuple[str, ...], group: list[dict[str, Any]]) -> None:
        if not names:
            return
        if names != self.names:
            self.names = names
            self.weight_share, self.token_share = Buckets(len(names)), Buckets(len(names))
        for key, buckets in (("weight_share", self.weight_share), ("token_share", self.token_share)):
            shares = [[_mapping(record, key).get(name) for name in names] for record in group]
            buckets.add_many(_steps(group), _numbers(shares))

    def _add_counts(self, edges: tuple[float, ...], group: list[dict[str, Any]]) -> None:
        counts = [_list(_histogram(record), "counts") for record in group]
        if not edges or any(len(one) != len(edges) + 1 for one in counts):
            return
        if edges != self.edges:
            self.edges, self.counts = edges, Buckets(len(edges) + 1)
        self.counts.add_many(_steps(group), _numbers(counts))


def _histogram(record: Mapping[str, Any]) -> Mapping[str, Any]:
    return _mapping(record, "histogram")


def _mapping(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """What is below `key`; nothing when it is no mapping."""
    value = record.get(key)
    return value if isinstance(value, Mapping) else {}


def _list(tree: Mapping[str, Any], key: str) -> list[Any]:
    value = tree.get(key)
    return value if isinstance(value, list) else []


def _steps(group: list[dict[str, Any]]) -> NDArray[np.int64]:
    return np.array([record["step"] for record in group], np.int64)


def _numbers(rows: Sequence[Sequence[Any]]) -> NDArray[np.float64]:
    """Rows of numbers; NaN for what is missing or no number."""
    try:
        return np.array(rows, np.float64)  # None becomes NaN
    except (TypeError, ValueError, OverflowError):
        return np.array([[_number(value) for value in row] for row in rows])


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, (int, float)) else np.nan
    except OverflowError:  # an integer of hundreds of digits
        return np.nan


def _flat(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Numbers of a record, also one level down, as `group/name`."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}/{name}", _number(n)) for name, n in value.items() if isinstance(n, (int, float)))
        elif key not in ("kind", "step") and isinstance(value, (int, float)):
            yield key, _number(value)
