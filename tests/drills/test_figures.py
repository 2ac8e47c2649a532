"""What `make drills` makes of pytest's results."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.drills.run import PAGE, figures_block, read_results
from tests.figures import comments, write_figures

BEGIN, END = comments("drills")

JUNIT = """<testsuites><testsuite>
<testcase name="test_one_rank[a]" time="12.4"><properties>
<property name="recovery_s" value="3.21"/><property name="cycles" value="100"/></properties></testcase>
<testcase name="test_two" time="1"><failure message="no">text</failure></testcase>
<testcase name="test_three" time="1"><skipped/></testcase>
</testsuite></testsuites>"""


def test_each_drill_has_a_line_and_only_what_stands_between_the_comments_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "junit.xml").write_text(JUNIT)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold figures\n{END}\nafter\n")
    write_figures(page, "drills", figures_block(read_results(tmp_path / "junit.xml"), 7, "abc"))
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1], "old figures" in lines) == ("before", "after", False)
    assert "| one rank (a) | held | 12 | 3.21 |  |" in lines
    assert "| two | FAILED | 1 |  |  |" in lines
    assert "- *one rank (a)*: cycles 100" in lines
    assert not any("three" in line for line in lines)


def test_a_page_without_its_comments_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text")
    with pytest.raises(ValueError, match="expected the lines"):
        write_figures(page, "drills", "block")
    assert page.read_text() == "text"
    assert BEGIN in PAGE.read_text()
