"""What a check of `mixwright doctor` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """`found` is what there is, `remedy` what to do about it; a finding that is `ok` needs none.

    fail: something of mixwright will not work here; warn: it works with less, or may not later.
    """

    name: str
    state: State
    found: str
    remedy: str = ""


def worst(findings: list[Finding]) -> State:
    """The state of them all together."""
    states = {finding.state for finding in findings}
    return "fail" if "fail" in states else "warn" if "warn" in states else "ok"
