"""One trainer at a time."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mixwright.pretrain import rundir
from mixwright.pretrain.errors import RunInUse
from mixwright.pretrain.rundir import LOCK, sole_trainer


def test_a_second_trainer_is_told_who_works_on_the_run(tmp_path: Path) -> None:
    with sole_trainer(tmp_path), pytest.raises(RunInUse, match=f"process {os.getpid()} on"), sole_trainer(tmp_path):
        pass
    with sole_trainer(tmp_path):  # given back
        assert (tmp_path / LOCK).read_text().startswith("process ")


@pytest.mark.usefixtures("no_file_locks")
def test_a_file_system_without_locks_is_told_of_and_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with sole_trainer(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith("process ")
    assert "no file locks here (Function not implemented)" in caplog.text


def test_a_trainer_that_is_stopping_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with sole_trainer(tmp_path) as lock:
        lock.say_stopping()
        assert (tmp_path / LOCK).read_text().endswith(", stopping\n")
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(enter_and_leave, tmp_path)
            with pytest.raises(TimeoutError):
                second.result(timeout=0.5)
            lock._file.close()  # as the end of the process does
            second.result(timeout=10)
    assert f"waiting up to 120 s for process {os.getpid()} on" in caplog.text


def test_a_trainer_that_never_stops_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rundir, "STOPPING_TIMEOUT_S", 0.3)
    with sole_trainer(tmp_path) as lock:
        lock.say_stopping()
        with pytest.raises(RunInUse, match=r"another trainer is working on this run .*, stopping"):
            enter_and_leave(tmp_path)


def enter_and_leave(run_dir: Path) -> None:
    with sole_trainer(run_dir):
        pass
