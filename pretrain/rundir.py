"""A run's folder: one trainer at a time, the resolved configuration beside what it led to."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import yaml

from mixwright.data_mixing.config_file import StrictModel
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.snapshot import resume
from mixwright.pretrain.errors import RunInUse, TrainingError

logger = logging.getLogger(__name__)

LOCK = "trainer.lock"


@contextlib.contextmanager
def sole_trainer(run_dir: Path) -> Iterator[None]:
    """Hold the run's lock; the kernel releases it when this process dies, however it dies. Raises RunInUse."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / LOCK).open("a+")
    except OSError as error:
        raise TrainingError(f"{run_dir}: the run folder cannot be written: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunInUse(f"{run_dir}: another trainer is working on this run ({file.read().strip()})") from None
        except OSError as error:  # Lustre without -o flock, some FUSE: the journal's lease is what is left
            logger.warning("%s: no file locks here (%s): a second trainer is stopped late", run_dir, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def journal_folder(run_dir: Path) -> Path:
    return run_dir / "journal"


def read_history(run_dir: Path) -> RunHistory:
    """The run as its journal tells it; an empty history when there is none yet."""
    if not journal_folder(run_dir).is_dir():
        return RunHistory()
    _, history = resume(journal_folder(run_dir), "reader")
    return history


def write_resolved_config(run_dir: Path, config: StrictModel) -> None:
    """Every setting as it is in force, defaults included."""
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
