"""docs/operations.md quotes messages that the source has; configs/monitoring/alerts.yaml names existing metrics."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixwright.data_mixing.run_figures import Refusals

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "operations.md"
ALERTS = ROOT / "configs" / "monitoring" / "alerts.yaml"
ROOMS = ("data_mixing", "pretrain", "launch")
HOLE = "\0"
"""Stands for what an f-string fills in, and for what `%` does in the message of a log line."""


def quoted_messages() -> list[str]:
    """What the page quotes: code with `...` in the first column of a table, and in running text."""
    text = re.sub(r"```.*?```", "", PAGE.read_text(), flags=re.DOTALL)
    first_cells = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    prose = " ".join(line.strip() for line in text.splitlines() if not line.startswith("|"))
    spans = [span for part in [*first_cells, prose] for span in re.findall(r"`([^`]+)`", part)]
    return sorted({span for span in spans if "..." in span and " " in span})


def messages_of_the_source() -> list[str]:
    return [
        re.sub(r"%(\.\d)?[sdg]", HOLE, text)
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        for text in _texts(node)
    ]


def _texts(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)


@pytest.fixture(scope="module")
def source() -> list[str]:
    return messages_of_the_source()


def stands_in(message: str, text: str) -> bool:
    """Whether `text` holds what `message` quotes, in its order; `...` is anything."""
    pattern = ".*".join(re.escape(part) for part in message.strip(". ").split("..."))
    return re.search(pattern, text, re.DOTALL) is not None


@pytest.mark.parametrize("message", quoted_messages())
def test_a_quoted_message_is_in_the_source(message: str, source: list[str]) -> None:
    words = max(re.split(r"\.\.\.", message), key=len).strip(" :;()")
    assert len(words) >= 6, f"{message!r} quotes too little to be found"
    assert any(stands_in(message, text) for text in source), f"no message of ours reads {message!r}"


def test_a_message_that_nobody_prints_is_found_out(source: list[str]) -> None:
    assert len(quoted_messages()) > 40
    assert not any(stands_in("the run ... was eaten by ...", text) for text in source)


# --- Alerts ----------------------------------------------------------------------------------------------------------


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return list(group["rules"])


@pytest.fixture(scope="module")
def endpoint() -> str:
    return (ROOT / "data_mixing" / "prometheus.py").read_text()


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_asks_for_metrics_and_labels_that_exist(rule: dict[str, Any], endpoint: str) -> None:
    expression = rule["expr"]
    metrics = set(re.findall(r'(?:Family|_gauge)\(\s*"(\w+)"', endpoint))
    asked = set(re.findall(r"\bmixwright_(\w+)", expression))
    assert asked <= metrics
    assert asked or expression.startswith("up{")
    for name, label in re.findall(r"mixwright_(\w+)\{(\w+)=", expression):
        family = endpoint[endpoint.index(f'"{name}"') :]
        assert f'"{label}":' in family[: family.index("yield", 1)], f"{name} has no label {label}"
    assert {"alert", "labels", "annotations"} <= set(rule)


def test_labels_have_values_that_occur() -> None:
    values = set(re.findall(r'(?:state|kind)=~?"([\w|]+)"', ALERTS.read_text()))
    kinds = {kind for value in values - {"running"} for kind in value.split("|")}
    assert kinds <= set(Refusals().by_kind())
    assert '"running"' in (ROOT / "data_mixing" / "run_status.py").read_text()


def test_the_page_explains_every_alert() -> None:
    section = PAGE.read_text().split("## Monitoring")[1].split("\n## ")[0]
    assert {rule["alert"] for rule in rules()} == set(re.findall(r"\b([A-Z][a-z]+[A-Z]\w+)\b", section)) - {
        "ServiceGone`"
    }
