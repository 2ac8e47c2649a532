"""The pretraining job, slowed down or made to die at one exact moment; runs on every rank in place of the entry point.

    DRILL_STEP_S=0.02        each step takes that much longer, so that faults from outside find the run under way,
    DRILL_FULL_SPEED=PATH    until this file exists
    DRILL_DIE=commit-written the leader ends by SIGKILL when a COMMIT is in the journal and no rank has heard of it
    DRILL_DIE=commit-due     ... when it has decided on a COMMIT and not written it
    DRILL_DIE=checkpoint     ... when its second checkpoint is complete and not in the journal, on a slow thread
    DRILL_TIMES=PATH         the leader notes when each step began, and its thread's time with and without a processor

Only what is named here differs from `launch/pretrain.py`, which is then run as it is.
"""

from __future__ import annotations

import itertools
import os
import runpy
import signal
import time
from pathlib import Path

from mixwright.data_mixing import leader
from mixwright.data_mixing.entries import Checkpoint, Commit, EntryBody
from mixwright.data_mixing.journal import Entry, Journal
from mixwright.data_mixing.leader import Leader
from mixwright.pretrain.checkpoint import Checkpoints
from mixwright.pretrain.engine import Engine
from mixwright.pretrain.loop import Position

JOB = Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"


def slow_down(seconds: float, full_speed: Path) -> None:
    """Each step of the leader begins that much later; the other ranks wait for it in the step's first collective."""
    begin_step = Leader.begin_step

    def begin_later(self: Leader, step: int) -> None:
        if not full_speed.exists():
            time.sleep(seconds)
        begin_step(self, step)

    Leader.begin_step = begin_later  # type: ignore[method-assign]


def note_times(path: Path) -> None:
    """A line for the beginning of each step: step, and seconds on the clock, computing, and ready but not computing."""
    begin_step = Leader.begin_step
    file = path.open("a", buffering=1)

    def begin_noted(self: Leader, step: int) -> None:
        computing, ready, _ = Path("/proc/self/schedstat").read_text().split()  # ns, of the main thread, which trains
        file.write(f"{step} {time.monotonic():.6f} {int(computing) / 1e9:.6f} {int(ready) / 1e9:.6f}\n")
        begin_step(self, step)

    Leader.begin_step = begin_noted  # type: ignore[method-assign]


def die_at_commit(is_written: bool) -> None:
    """The first COMMIT of this process that is not the run's first policy is the last thing that it does."""
    append_after = Journal.append_after

    def append_and_die(self: Journal, lsn: int, body: EntryBody) -> Entry | None:
        if isinstance(body, Commit) and not is_written:
            os.kill(os.getpid(), signal.SIGKILL)
        entry = append_after(self, lsn, body)
        if isinstance(body, Commit) and entry is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return entry

    Journal.append_after = append_and_die  # type: ignore[method-assign]


def die_at_checkpoint() -> None:
    """The second checkpoint of this process; what the leader's thread has to write waits until somebody asks for it."""
    leader.POLL_INTERVAL_S = 60.0
    save, saved = Checkpoints.save, itertools.count(1)

    def save_and_die(self: Checkpoints, engine: Engine, position: Position) -> Checkpoint:
        checkpoint = save(self, engine, position)
        if next(saved) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return checkpoint

    Checkpoints.save = save_and_die  # type: ignore[method-assign]


def main() -> None:
    if seconds := float(os.environ.get("DRILL_STEP_S", "0")):
        slow_down(seconds, Path(os.environ["DRILL_FULL_SPEED"]))
    if path := os.environ.get("DRILL_TIMES"):
        note_times(Path(path))
    if moment := os.environ.get("DRILL_DIE"):
        arrange = {
            "commit-written": lambda: die_at_commit(is_written=True),
            "commit-due": lambda: die_at_commit(is_written=False),
            "checkpoint": die_at_checkpoint,
        }
        arrange[moment]()
    runpy.run_path(str(JOB), run_name="__main__")


if __name__ == "__main__":
    main()
