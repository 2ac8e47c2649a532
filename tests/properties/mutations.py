"""Documents that are almost right: a valid tree or text to which a few things were done, as users and disks do."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

DEEP = 3000
"""Levels of nesting: more than Python's parsers take."""
SENTINEL = "mixwright-fuzz-was-executed"
"""The file that a document would make if anything in it were obeyed."""

ODD_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 0.5, -0.0, 1e308, -1e308, float("nan"), float("inf"), -float("inf"), 10**30, -(10**30),
    10**400, 2**63, 2**53 + 1, "", " ", "x", "x" * 5000, "\x1b[31mred\x07", "\x00", "\ud800", "\u202e", "\ufeff",
    "../../../etc/passwd", "/dev/null", "~", "a/" * 3000, "%s%n{0}{{x}}", "2001-99-99", "1e400", ".nan", "!!binary x",
    "*", "[", "[z-a]", "**/**", "http://127.0.0.1:1/", [], {}, [[]], [None], {"": None}, {"a": {"b": {"c": 1}}},
    ["x"] * 300, {f"k{i}": i for i in range(300)},
]  # fmt: skip

TEXTS: list[Callable[[str], str | bytes]] = [
    lambda text: "",
    lambda text: text[: len(text) // 2],
    lambda text: "\ufeff" + text,
    lambda text: text.encode() + b"\xff\xfe\x00",
    lambda text: text.encode("utf-16"),
    lambda text: text.replace("\n", "\r\n"),
    lambda text: "[" * DEEP,
    lambda text: '{"a":' * DEEP,
    lambda text: "- " * DEEP,
    lambda text: f"{text}\n{text}",
    lambda text: f"{text}\n---\n{text}",
    lambda text: "&a [*a]",
    lambda text: "&a {kind: *a}",
    lambda text: f"!!python/object/apply:os.system ['touch {SENTINEL}']",
    lambda text: f"x: !!python/object/new:os.system ['touch {SENTINEL}']\n{text}",
    lambda text: "!!set {a, b}\n",
    lambda text: "? [complex, key]\n: 1\n",
    lambda text: "2001-99-99: 2001-99-99\n",
    lambda text: "a: " + "9" * 6000,
    lambda text: alias_bomb(),
    lambda text: merge_bomb(),
    lambda text: "null",
    lambda text: "3",
    lambda text: "\t\tx: 1",
    lambda text: "\x07\x1b]0;title\x07: 1",
]


def alias_bomb(levels: int = 12) -> str:
    """A kilobyte of YAML that stands for 9**12 values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


def merge_bomb(levels: int = 12) -> str:
    """The same by merge keys, which PyYAML expands while it reads."""
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, levels)]
    return "\n".join(lines)


@st.composite
def mutated_trees(draw: st.DrawFn, seeds: list[Any]) -> Any:
    """One of the trees with one to three things changed in it."""
    # One draw decides all: shrinking a document would be slow, and the change is seen in the failure anyway.
    chance = random.Random(draw(st.integers(0, 2**32)))
    tree = copy.deepcopy(chance.choice(seeds))
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        tree = mutated(tree, chance)
    return tree


@st.composite
def mutated_texts(draw: st.DrawFn, seeds: list[Any]) -> bytes:
    """A document as bytes: mostly a mutated tree as JSON (which is YAML, too), sometimes a text that is none."""
    chance = random.Random(draw(st.integers(0, 2**32)))
    tree = copy.deepcopy(chance.choice(seeds))
    if chance.random() < 0.3:
        found = chance.choice(TEXTS)(as_yaml(tree))
        return found if isinstance(found, bytes) else found.encode("utf-8", "surrogatepass")
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        tree = mutated(tree, chance)
    content = as_yaml(tree).encode("utf-8", "surrogatepass")
    if chance.random() < 0.15:
        place = chance.randrange(len(content) + 1)
        content = content[:place] + bytes([chance.randrange(256)]) + content[place + chance.randrange(2) :]
    return content


def as_yaml(tree: Any) -> str:
    """The tree as JSON with numbers that are not finite as YAML spells them."""
    text = json.dumps(tree, ensure_ascii=True)
    return text.replace("-Infinity", "-.inf").replace("Infinity", ".inf").replace("NaN", ".nan")


def mutated(tree: Any, chance: random.Random) -> Any:
    """The tree with one thing changed, in place where that is possible."""
    places = list(_places(tree))
    if not places:
        return copy.deepcopy(chance.choice(ODD_VALUES))
    parent, key = chance.choice(places)
    change = chance.randrange(7)
    if change == 0:
        del parent[key]
    elif change == 1 and isinstance(parent, dict):
        parent[_misspelt(str(key), chance)] = parent.pop(key)
    elif change == 2 and isinstance(parent, dict):
        parent[chance.choice(["extra", "\x1b[2J", "", "a.b", "__class__", "\ud800"])] = copy.deepcopy(
            chance.choice(ODD_VALUES)
        )
    elif change == 3:
        parent[key] = [parent[key]]
    elif change == 4:
        parent[key] = copy.deepcopy(chance.choice(places)[0])
    else:
        parent[key] = copy.deepcopy(chance.choice(ODD_VALUES))
    return tree


def _misspelt(key: str, chance: random.Random) -> str:
    place = chance.randrange(len(key) + 1)
    return key[:place] + chance.choice(["", "x", "_", " "]) + key[place + 1 :]


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """All (container, key) pairs below a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key
        yield from _places(value)
