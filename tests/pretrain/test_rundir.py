"""One trainer at a time."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from mixwright.pretrain.errors import RunInUse
from mixwright.pretrain.rundir import LOCK, sole_trainer


def test_a_second_trainer_is_told_who_works_on_the_run(tmp_path: Path) -> None:
    with sole_trainer(tmp_path), pytest.raises(RunInUse, match=f"process {os.getpid()} on"), sole_trainer(tmp_path):
        pass
    with sole_trainer(tmp_path):  # given back
        assert (tmp_path / LOCK).read_text().startswith("process ")


def test_a_file_system_without_locks_is_told_of_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No such file system is here, so the call is replaced."""

    def no_locks(file: object, how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with sole_trainer(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith("process ")
    assert "no file locks here (Function not implemented)" in caplog.text
