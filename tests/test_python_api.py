"""The examples of docs/python_api.md, run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mixwright.data_mixing.plan import run_digest
from mixwright.pretrain.rundir import read_history

PAGE = Path(__file__).resolve().parent.parent / "docs" / "python_api.md"
EXAMPLES = re.findall(r"^## ([^\n]+)\n.*?```python\n(.*?)```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def test_the_page_has_an_example_for_each_way() -> None:
    assert [title for title, _ in EXAMPLES] == ["A plain PyTorch loop", "`transformers.Trainer`"]


@pytest.mark.parametrize("code", [code for _, code in EXAMPLES], ids=["loop", "trainer"])
def test_an_example_trains_the_whole_run(tiny_store: Path, tmp_path: Path, code: str) -> None:
    run_dir = tmp_path / "run"
    exec(compile(code, str(PAGE), "exec"), {"store_folder": tiny_store, "run_dir": run_dir})
    history = read_history(run_dir)
    assert history.end is not None
    assert int(history.end.digest, 16) == run_digest(history.plan(), 20)
    assert [(r.first_step, r.last_step) for r in history.reports] == [(0, 9), (10, 19)]
    first, last = (sum(loss.loss_sum for loss in r.domains.values()) for r in history.reports)
    assert last < first
