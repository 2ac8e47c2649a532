"""README and the tutorial: every command, beginning with no run and no store."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.session import follow, terminal, workplace


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_a_newcomer_gets_through(page: str, tmp_path: Path) -> None:
    with terminal(workplace(tmp_path / "checkout"), tmp_path / "home") as shell:
        assert len(follow(page, shell)) >= 5
