"""The security command: bandit finds nothing, and a report of pip-audit is judged as documented."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.security.audit import bandit, judge

FOUND = {"name": "jinja2", "version": "2.4", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.4.1"]}]}
SOUND = {"name": "numpy", "version": "2.0", "vulns": []}
UNKNOWN = {"name": "ours", "skip_reason": "not found"}


def test_bandit_finds_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert bandit() == 0, capfd.readouterr().out


@pytest.mark.parametrize(
    ("packages", "strict", "code", "says"),
    [
        ([SOUND], True, 0, "no known vulnerability in 1 versions"),
        ([SOUND, FOUND], False, 1, "jinja2 2.4: PYSEC-1; fixed in: 2.4.1"),
        ([SOUND, UNKNOWN], False, 0, "1 of 2 versions could not be looked up"),
        ([SOUND, UNKNOWN], True, 1, "1 of 2 versions could not be looked up"),
        ([UNKNOWN, FOUND], False, 1, "PYSEC-1"),
        (None, False, 0, "nothing was looked up: no route to host"),
        (None, True, 1, "nothing was looked up"),
    ],
)
def test_a_report_is_judged_as_documented(
    packages: list[dict[str, Any]] | None, strict: bool, code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = "" if packages is None else json.dumps({"dependencies": packages})
    assert judge(report, "no route to host", strict) == code
    assert says in capsys.readouterr().out
