"""The pages about ensembles and their distillation: every command; the second page needs what the first one trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.session import follow, terminal, workplace


@pytest.mark.slow
def test_from_members_to_a_student(tmp_path: Path) -> None:
    folder = workplace(tmp_path / "checkout")
    for page in ("docs/ensembles.md", "docs/distillation.md"):
        with terminal(folder, tmp_path / page.replace("/", "-")) as shell:
            assert len(follow(page, shell)) >= 4
