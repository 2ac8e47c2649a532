"""YAML and JSON that others wrote, as plain data: what is wrong is a ValueError, found in bounded time and memory.

The parsers themselves leave three doors open. Nesting without end is a RecursionError. A few lines of YAML whose
aliases (or `<<` merges) name each other stand for billions of values. And escapes make text that no file and no
terminal can hold: half a surrogate pair, NUL.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

MAX_FILE_BYTES = 8 << 20
MAX_VALUES = 1 << 20
"""Of a YAML document, with every alias counted as often as it occurs."""

_SECRET_KEY = re.compile(r"(.*[_-])?(api_?key|password|passwd|secret|(access|auth|hf)_token)", re.IGNORECASE)
_SECRET_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^/@\s:]*:[^/@\s]+@", re.IGNORECASE)


def parse_json(text: str | bytes, *, strict: bool = False) -> Any:
    """The JSON value; raises ValueError. `strict` refuses NaN and infinities too, and a key that occurs twice."""
    try:
        if strict:
            return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_distinct)
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json_object(path: Path, *, strict: bool = False) -> dict[str, Any]:
    """The JSON object in a file; raises OSError, or ValueError for anything else."""
    tree = parse_json(path.read_bytes(), strict=strict)
    if not isinstance(tree, dict):
        raise ValueError(f"expected a JSON object, found {type(tree).__name__}")
    return tree


def parse_yaml(text: str) -> Any:
    """The value of one YAML document, of safe tags only; raises ValueError with one line."""
    try:
        loader = yaml.SafeLoader(text)
        try:
            return _construct(loader)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def read_text(path: Path) -> str:
    """The text of a file; raises OSError, or ValueError when it is not UTF-8 or larger than MAX_FILE_BYTES."""
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
    return content.decode("utf-8-sig")


def is_text(value: str) -> bool:
    """Whether UTF-8 can write it and a path can hold it."""
    if value.isascii():
        return "\0" not in value
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def secret_in(tree: Any) -> str | None:
    """Where a tree of plain data seems to hold a secret: the key of a password, or `(URL)` for one in an address."""
    waiting = [tree]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            for key, item in value.items():
                if item and isinstance(key, str) and _SECRET_KEY.fullmatch(key):
                    return key
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif isinstance(value, str) and _SECRET_URL.match(value):
            return "(URL)"
    return None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of these members; of a key that occurs twice one value would be lost without a word."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:80]!r} occurs twice")
    return tree


def _construct(loader: yaml.SafeLoader) -> Any:
    node = loader.get_single_node()
    if node is None:
        return None
    if _num_values(node, {}) > MAX_VALUES:
        raise ValueError(f"stands for more than {MAX_VALUES:,} values: aliases that expand without end")
    return loader.construct_document(node)


def _num_values(node: yaml.Node, known: dict[int, float]) -> float:
    """Values that a node stands for, itself included; infinite for one that contains itself."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = float("inf")  # until it is counted: an alias to it from within is endless
    total = 1.0
    match node:
        case yaml.MappingNode():
            _check_keys(node)
            total += sum(_num_values(part, known) for pair in node.value for part in pair)
        case yaml.SequenceNode():
            total += sum(_num_values(part, known) for part in node.value)
        case yaml.ScalarNode() if not is_text(node.value):
            raise ValueError(f"line {node.start_mark.line + 1}: half a surrogate pair or NUL is no text")
    known[id(node)] = total
    return total


def _check_keys(node: yaml.MappingNode) -> None:
    """Raise ValueError for a key that occurs twice: of its two values one would be lost without a word."""
    seen: dict[Hashable, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            line = key.start_mark.line + 1
            if (key.tag, key.value) in seen:
                first = seen[key.tag, key.value]
                raise ValueError(f"line {line}: key {key.value[:80]!r} occurs twice (first in line {first})")
            seen[key.tag, key.value] = line
