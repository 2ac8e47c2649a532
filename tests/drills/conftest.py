from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.drills.drill_run import DrillRun, Job, new_run
from tests.drills.drill_service import Service
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


@pytest.fixture
def serve() -> Iterator[Callable[..., Service]]:
    """`serve(run, job, address="local", **environment)`: the service of a run that has begun, by `mix up`.

    It ends with the test.
    """
    services = []

    def start(run: DrillRun, job: Job, address: str = "local", **environment: str) -> Service:
        run.wait_until_begun(job)
        services.append(service := Service(run.run_dir))
        service.up(address, **environment)
        return service

    yield start
    for service in services:
        service.down()
