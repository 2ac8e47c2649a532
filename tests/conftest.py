from __future__ import annotations

import errno
import fcntl
import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from mixwright.data_mixing.config_file import validate
from mixwright.data_mixing.corpora import CorporaConfig
from mixwright.data_mixing.prepare import prepare
from mixwright.data_mixing.store import TokenStore
from mixwright.pretrain.ensemble.member import Member
from tests.pretrain.members import write_member

WORDS = {
    "letters": "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu",
    "numbers": "one two three four five six seven eight nine ten eleven twelve",
    "colours": "red green blue black white yellow orange purple brown pink grey",
}
NUM_DOCUMENTS = {"letters": 160, "numbers": 80, "colours": 40}
SLOW_MARKS = ("slow", "drill", "ray")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests come first: one that begins late would leave the other process without work."""
    slow = Counter(item.path for item in items if any(item.get_closest_marker(name) for name in SLOW_MARKS))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture
def no_file_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks. None is here, so the call is replaced."""

    def flock(file: object, how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token store of three domains of unequal size, rows of 16 tokens, made by the real preparation."""
    folder = tmp_path_factory.mktemp("corpora")
    for name, words in WORDS.items():
        chance = random.Random(name)
        documents = [" ".join(chance.choices(words.split(), k=60)) for _ in range(NUM_DOCUMENTS[name])]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    tree = {
        "output": str(folder / "store"),
        "sequence_length": 16,
        "tokenizer": {"train": {"vocab_size": 300}},
        "split": {"validation": 0.1, "test": 0.1},
        "domains": {name: {"paths": [f"{name}.jsonl"]} for name in WORDS},
        "num_workers": 1,
    }
    prepare(validate(CorporaConfig, tree, "tiny corpora"), folder)
    return folder / "store"


@pytest.fixture(scope="session")
def members(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Member]:
    """Three members of different seeds, trained for a few steps on the tiny store."""
    folder, store = tmp_path_factory.mktemp("members"), TokenStore.open(tiny_store)
    return [write_member(folder / f"member-{seed}", store, seed) for seed in range(3)]
