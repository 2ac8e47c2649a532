"""Fixtures that several files of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.dashboard_runs import hostile_store, write_preference_run, write_run
from tests.launch.dashboards import Dashboard, dashboard


@pytest.fixture(scope="session")
def marked_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token store whose documents are full of markup."""
    return hostile_store(tmp_path_factory.mktemp("marked"))


@pytest.fixture(scope="session")
def shown_run(tmp_path_factory: pytest.TempPathFactory, marked_store: Path) -> Path:
    """A run with everything that the dashboard shows; not to be changed."""
    return write_run(tmp_path_factory.mktemp("runs"), marked_store)


@pytest.fixture(scope="session")
def site(shown_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """A dashboard of that run, with a preference run beside it, for tests that only ask."""
    preference = write_preference_run(tmp_path_factory.mktemp("rpo") / "aligned")
    with dashboard(shown_run, preference, "--allow-submit") as started:
        started.wait_until_read()
        yield started
