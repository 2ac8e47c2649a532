"""What `make bench-all` makes of what the benchmarks print."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.benchmarks import run
from tests.benchmarks.run import BENCHMARKS, PAGE, Benchmark, as_text, main, measure
from tests.figures import comments

SAYS_HELLO, ENDS_WITH_1 = Benchmark("hello", "this", 1), Benchmark("fails", "tests.benchmarks.no_such_module", 1)


def page_for(folder: Path, *names: str) -> Path:
    page = folder / "page.md"
    page.write_text(
        "".join(f"# {name}\n\n{begin}\nold {name}\n{end}\n" for name in names for begin, end in [comments(name)])
    )
    return page


def test_every_benchmark_has_its_place_on_the_page_and_every_place_its_benchmark() -> None:
    places = re.findall(r"<!-- (\w+): figures begin -->", PAGE.read_text())
    assert sorted(places) == sorted(["machine", *(benchmark.name for benchmark in BENCHMARKS)])
    assert all(comments(name)[1] in PAGE.read_text() for name in places)


def test_figures_are_what_was_printed_and_on_what(capsys: pytest.CaptureFixture[str]) -> None:
    figures = measure(SAYS_HELLO, "abc1234")
    assert figures is not None
    assert figures.startswith("`python -m this` (commit abc1234, 20")
    assert figures.endswith("let's do more of those!\n```")
    assert "The Zen of Python" in capsys.readouterr().out


def test_a_benchmark_that_fails_keeps_its_old_figures_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = page_for(tmp_path, "machine", "fails", "hello")
    monkeypatch.setattr(run, "BENCHMARKS", (ENDS_WITH_1, SAYS_HELLO))
    monkeypatch.setattr(sys, "argv", ["run", "--page", str(page)])
    assert main() == 1
    assert "old fails" in page.read_text()
    assert "old hello" not in page.read_text()
    assert f"error: fails failed; their old figures stay in {page}" in capsys.readouterr().err


def test_colours_and_what_was_overwritten_are_left_out() -> None:
    assert as_text("\x1b[1mbold\x1b[0m  \n10 %\r20 %\rdone\n") == "bold\ndone"
