"""A run's folder: one trainer at a time, the resolved configuration beside what it led to."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import yaml

from mixwright.data_mixing.config_file import StrictModel
from mixwright.data_mixing.entry_file import entry_path
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.snapshot import resume
from mixwright.pretrain.errors import RunInUse, TrainingError

logger = logging.getLogger(__name__)

LOCK = "trainer.lock"
DIVERGED = "diverged.txt"
"""Says why training failed, until the run is started again."""
STOPPING = ", stopping"
STOPPING_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class TrainerLock:
    """The lock of a run, held; its file tells others who holds it."""

    _file: TextIO

    def say_stopping(self) -> None:
        """Whoever starts the run again waits for this process, which writes its last checkpoint."""
        with contextlib.suppress(OSError):  # a full disk is no reason to stop otherwise than in order
            self._write(STOPPING)

    def _write(self, note: str = "") -> None:
        self._file.seek(0)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}{note}\n")
        self._file.flush()


@contextlib.contextmanager
def sole_trainer(run_dir: Path) -> Iterator[TrainerLock]:
    """Hold the run's lock; the kernel releases it when this process dies, however it dies.

    Waits for a trainer that says that it is stopping. Raises RunInUse for any other.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / LOCK).open("a+")
    except OSError as error:
        raise TrainingError(f"{run_dir}: the run folder cannot be written: {error.strerror}") from None
    with file:
        _take(run_dir, file)
        lock = TrainerLock(file)
        lock._write()
        yield lock


def _take(run_dir: Path, file: TextIO) -> None:
    deadline, told = time.monotonic() + STOPPING_TIMEOUT_S, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
        except OSError as error:  # Lustre without -o flock, some FUSE: the journal's lease is what is left
            logger.warning("%s: no file locks here (%s): a second trainer is stopped late", run_dir, error.strerror)
            return
        if not holder.endswith(STOPPING) or time.monotonic() > deadline:
            raise RunInUse(f"{run_dir}: another trainer is working on this run ({holder})")
        if not told:
            told = True
            logger.warning("%s: waiting up to %g s for %s", run_dir, STOPPING_TIMEOUT_S, holder)
        time.sleep(0.2)


def journal_folder(run_dir: Path) -> Path:
    return run_dir / "journal"


def began_ns(run_dir: Path) -> int | None:
    """When the run's first entry was written, by the clock of its file system; None before that."""
    try:
        return entry_path(journal_folder(run_dir), 0).stat().st_mtime_ns
    except OSError:
        return None


def read_history(run_dir: Path) -> RunHistory:
    """The run as its journal tells it; an empty history when there is none yet."""
    if not journal_folder(run_dir).is_dir():
        return RunHistory()
    _, history = resume(journal_folder(run_dir), "reader")
    return history


def write_resolved_config(run_dir: Path, config: StrictModel) -> None:
    """Every setting as it is in force, defaults included."""
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
