"""One run as the dashboard knows it: what its files tell so far, and the version of each panel."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixwright.data_mixing.errors import MixingError
from mixwright.data_mixing.service import service_status
from mixwright.launch.dashboard.journal_view import JournalView
from mixwright.launch.dashboard.metrics_view import METRICS, MetricsView
from mixwright.launch.hard_samples import spelt_out

ENTRIES_AT_ONCE = 50
WINDOWS_AT_ONCE = 50
"""How much is read while the lock is held: about 10 ms of work, so that requests get in between."""

SERVICE_INTERVAL_S = 5.0

Version = tuple[Any, ...]


class RunView:
    """Safe for threads: one follows the files (`advance`), others ask for panels."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.name = run_dir.resolve().name
        self.has_journal = (run_dir / "journal").is_dir()
        self.lock = threading.RLock()
        self.journal = JournalView(run_dir)
        self.metrics = MetricsView(run_dir, with_figures=not self.has_journal)
        self.is_reading, self.has_given_up = True, False
        self.num_left = 0
        self.service = ("", "")
        self._service_asked = -SERVICE_INTERVAL_S
        self._cache: dict[str, tuple[str, bytes]] = {}

    def advance(self) -> bool:
        """Read some of what is new; whether there may be more."""
        with self.lock:
            found = self.journal.advance(ENTRIES_AT_ONCE) if self.has_journal else False
        with self.lock:
            found = self.metrics.advance() or found
        if not found and self.journal.history.has_genesis:
            with self.lock:
                found = self.journal.derive(WINDOWS_AT_ONCE)
        with self.lock:
            self.is_reading = found
        self._ask_service()
        return found

    def give_up(self, why: str) -> None:
        """Read no further, and show why; what was read stays."""
        self.has_given_up, self.is_reading = True, False
        self.journal.problem = why

    def count_left(self) -> None:
        """How many entries are still to be read; for the progress that people see."""
        self.num_left = self.journal.num_left() if self.is_reading else 0

    def versions(self) -> dict[str, Version]:
        """What each panel depends on; a panel whose version is the same is the same."""
        journal, metrics, lsn = self.journal, self.metrics, self.journal.history.last_lsn
        commits, derived = journal.history.num_commits, journal.requested.last_step
        reading = (self.is_reading, journal.problem)
        return {
            "summary": (
                lsn,
                metrics.num_steps_read,
                metrics.num_figures_read,
                commits,
                derived,
                self.service,
                *reading,
            ),
            "mixture": (journal.num_reports, commits, derived),
            "losses": (journal.num_reports,),
            "timeline": (journal.num_events, journal.history.last_step),
            "policy": (journal.num_decisions,),
            "weighting": (metrics.num_weights_read,),
            "throughput": (metrics.num_steps_read, metrics.end is not None),
            "figures": (metrics.num_figures_read,),
        }

    def panel(self, name: str, build: Callable[[RunView], Any]) -> tuple[str, bytes]:
        """Entity tag and JSON of a panel; built again only when its version changed."""
        with self.lock:
            tag = tag_of(self.versions()[name])
            known = self._cache.get(name)
            if known is None or known[0] != tag:
                known = tag, encode(build(self))
                self._cache[name] = known
            return known

    def _ask_service(self) -> None:
        """The state of the mixing service, from its files, now and then."""
        now = time.monotonic()
        if not self.has_journal or now - self._service_asked < SERVICE_INTERVAL_S:
            return
        self._service_asked = now
        try:
            status = service_status(self.run_dir)
            self.service = (status.state, status.message)
        except (MixingError, OSError) as error:
            self.service = ("unknown", str(error))


def is_run(folder: Path) -> bool:
    """Whether there is anything to show: a journal, or the metrics of a job that keeps none."""
    return (folder / "journal").is_dir() or (folder / METRICS).is_file()


def tag_of(version: Version) -> str:
    """An entity tag for HTTP."""
    return f'"{abs(hash(version)):x}"'


def encode(tree: Any) -> bytes:
    """JSON in which no text holds a character that a page would obey or not show; null for numbers that JSON lacks."""
    tree = shown(tree)
    try:
        text = json.dumps(tree, separators=(",", ":"), allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(tree), separators=(",", ":"), allow_nan=False)
    return text.encode()


def shown(tree: Any) -> Any:
    r"""The tree with texts spelt out (`\x1b`, `\u202e`), line breaks and tabs kept. Lists of numbers are left alone."""
    if isinstance(tree, str):
        return tree if tree.isprintable() else "\n".join(map(_line, tree.split("\n")))
    if isinstance(tree, dict):
        return {shown(str(key)): shown(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [shown(value) for value in tree] if any(map(_has_text, tree)) else tree
    return tree


def _finite(tree: Any) -> Any:
    """The tree with None for NaN and infinity, which figures that others wrote may hold."""
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    return [_finite(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


def _line(text: str) -> str:
    return "\t".join(map(spelt_out, text.split("\t")))


def _has_text(value: Any) -> bool:
    return isinstance(value, (str, dict, list, tuple))
