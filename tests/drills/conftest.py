from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.drills.drill_run import DrillRun, new_run
from tests.drills.undisturbed import References

PLANNED = (
    {"kind": "static", "mixture": {"letters": 1, "colours": 3}, "at_step": 41, "why": "drill"},
    {"kind": "static", "mixture": {"numbers": 2, "colours": 1}, "at_step": 85, "why": "drill"},
)
"""Two changes of the mixture in the middle of the run, between checkpoints."""


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(tmp_path_factory.mktemp("references"))


@pytest.fixture
def make_run(tiny_store: Path, tmp_path: Path) -> Iterator[Callable[..., DrillRun]]:
    """`make_run(name="run", policies=PLANNED, section__key=value, ...)`: a new run in this test's folder."""
    made: list[DrillRun] = []

    def make(name: str = "run", policies: Sequence[dict[str, Any]] = PLANNED, **changes: Any) -> DrillRun:
        made.append(new_run(tmp_path / name, tiny_store, policies, **changes))
        return made[-1]

    yield make
    for run in made:
        run.kill_all()
