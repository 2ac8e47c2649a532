"""How a rank ends: its exit code, and the line that says why."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mixwright.data_mixing.errors import DataError
from mixwright.launch import rank_command
from mixwright.launch.console import RunConsole
from mixwright.launch.rank_command import ended
from mixwright.pretrain.errors import NonFiniteLoss, RanksApart


def raising(error: Exception) -> Callable[[], Any]:
    def job() -> Any:
        raise error

    return job


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr(rank_command, "time", SimpleNamespace(sleep=waited.append))
    return waited


@pytest.mark.parametrize(
    ("rank", "error", "code", "waits", "line"),
    [
        ("0", DataError("no store here"), 2, False, "error: no store here"),
        ("3", DataError("no store here"), 2, True, "error: rank 3: no store here"),
        ("0", NonFiniteLoss("step 3: NaN"), 1, False, "error: step 3: NaN"),
        ("3", RanksApart("nobody is there"), 70, False, "error: rank 3: nobody is there"),
    ],
)
def test_every_rank_says_why_it_ends_and_gives_the_leader_time_for_what_all_meet(
    rank: str, error: Exception, code: int, waits: bool, line: str, pauses: list[float],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("RANK", rank)
    assert ended(RunConsole(quiet=True), raising(error)) == code
    assert bool(pauses) == waits
    assert capsys.readouterr().err == f"{line}\n"


def test_what_nobody_expected_is_a_traceback_and_no_diverged_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(RunConsole(quiet=True), raising(RuntimeError("CUDA out of memory"))) == 70
    assert "Traceback" in (error := capsys.readouterr().err)
    assert error.endswith("RuntimeError: CUDA out of memory\n")
