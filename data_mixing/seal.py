"""How far a run's order is settled, for readers that the leader cannot tell step by step (worker processes of loaders).

The leader replaces `sealed.json` in the run folder at every step: no commit will come any more that changes a step
before `before_step`, and those there are, are known to whoever has read the journal up to `lsn` (spec/mixing.md 4.4).
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from mixwright.data_mixing.errors import JournalError
from mixwright.data_mixing.plain_data import parse_json
from mixwright.data_mixing.plan import Plan
from mixwright.data_mixing.snapshot import resume

NAME = "sealed.json"
RETRY_S = 0.005


@dataclass(frozen=True)
class Seal:
    """Steps before `before_step` follow from the journal up to entry `lsn` for good."""

    before_step: int
    lsn: int

    def write(self, run_dir: Path) -> None:
        """Readers see the old seal or this one, whole. Raises JournalError."""
        temporary = run_dir / f".{NAME}.{os.getpid()}"
        try:
            temporary.write_text(json.dumps([self.before_step, self.lsn]))
            temporary.replace(run_dir / NAME)
        except OSError as error:
            raise JournalError(f"{run_dir / NAME}: cannot be written: {error.strerror}") from None

    @classmethod
    def read(cls, run_dir: Path) -> Seal:
        """The newest seal; one that seals nothing when there is none."""
        try:
            before_step, lsn = map(int, parse_json((run_dir / NAME).read_text()))
        except FileNotFoundError:
            return cls(0, -1)
        except (OSError, ValueError, TypeError, OverflowError) as error:
            raise JournalError(f"{run_dir / NAME}: cannot be read: {error}") from None
        return cls(before_step, lsn)


def remove(run_dir: Path) -> None:
    """Forget what an earlier attempt has sealed: it may have been further than this one is."""
    (run_dir / NAME).unlink(missing_ok=True)


class SealedPlan:
    """The plan of a run for one reader: a step's rows once they are settled."""

    def __init__(self, run_dir: Path, timeout_s: float) -> None:
        self._run_dir, self._timeout_s = run_dir, timeout_s
        self._journal, self._history = resume(run_dir / "journal", "reader")
        self._seal = Seal(0, -1)
        self._plan = self._history.plan()

    def at(self, step: int) -> Plan:
        """The plan, good for `step`. Waits for the leader; raises JournalError after the time limit."""
        deadline = time.monotonic() + self._timeout_s
        while not self._is_settled(step):
            self._read()
            if self._is_settled(step):
                break
            time.sleep(RETRY_S)
            if time.monotonic() > deadline:
                raise JournalError(
                    f"{self._run_dir / NAME}: step {step} is not settled after {self._timeout_s:g} s (settled: steps "
                    f"before {self._seal.before_step}): does rank 0 train, on a file system that all nodes share?"
                )
        return self._plan

    def _is_settled(self, step: int) -> bool:
        return step < self._seal.before_step and self._history.last_lsn >= self._seal.lsn

    def _read(self) -> None:
        self._seal = Seal.read(self._run_dir)
        known = self._history.num_commits
        for entry in self._journal.poll():
            self._history.apply(entry)
        if self._history.num_commits > known:
            self._plan = self._history.plan()
