"""Preference files, messages and chat templates that are almost right: every row is a pair, a bad pair, or an error."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixwright.data_mixing.errors import DataError
from mixwright.pretrain.rpo.config import ColumnsConfig
from mixwright.pretrain.rpo.pair_counts import BadPair
from mixwright.pretrain.rpo.raw_pairs import read_pair
from mixwright.pretrain.rpo.reading import open_source
from mixwright.pretrain.rpo.templates import PairEncoder, load_tokenizer
from tests.pretrain.preferences import CHAT, said, write_tokenizer
from tests.properties.effort import effort
from tests.properties.mutations import DEEP, mutated

TEXT = {"prompt": "the river", "chosen": " sings", "rejected": " sleeps"}
CHATS = {"prompt": [said("user", "hello")], "chosen": [said("assistant", "yes")], "rejected": [said("assistant", "no")]}
WHOLE = {
    "chosen": [said("user", "hello"), said("assistant", "yes")],
    "rejected": [said("user", "hello"), said("assistant", "no")],
}
TEMPLATES = [
    CHAT, "", "{{", "{% for %}", "{{ 1/0 }}", "{{ messages.nothing.at.all }}", "{{ raise_exception('no') }}",
    "{% for m in messages %}{{ m.content }}{% endfor %}", "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch x') }}", "{% for i in range(10**9) %}x{% endfor %}",
    "{% for m in messages|reverse %}{{ m.role }}{% endfor %}", "\x00\x1b[2J", "{{ messages|tojson(indent=2) }}",
    "{% include '/etc/passwd' %}", "{% set x = messages.append(1) %}x",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(str(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), CHAT)), None)


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """One line of a preference file."""
    chance = random.Random(draw(st.integers(0, 2**32)))
    row: Any = json.loads(json.dumps(chance.choice([TEXT, CHATS, WHOLE])))
    if chance.random() < 0.15:
        return chance.choice([b"[" * DEEP, b"\xff\xfe", b'{"a":1,', b"null", b"3", b'"x"', b"{}", b"\xef\xbb\xbf{}"])
    for _ in range(chance.choice((1, 1, 2))):
        row = mutated(row, chance)
    return json.dumps(row).encode()


@given(st.lists(lines(), min_size=1, max_size=4), st.sampled_from(["prompt", None]), st.booleans(), st.data())
@effort(200)
def test_every_row_is_a_pair_or_a_bad_pair_or_the_files_error(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: Any,
    rows: list[bytes],
    prompt: str | None,
    packed: bool,
    data: st.DataObject,
) -> None:
    content = b"\n".join(rows)
    if packed:
        content = gzip.compress(content)
        content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    path = tmp_path_factory.mktemp("pairs") / ("p.jsonl.gz" if packed else "p.jsonl")
    path.write_bytes(content)
    columns, encoder = ColumnsConfig(prompt=prompt), PairEncoder(tokenizer, end=True)
    try:
        for row in open_source(str(path), "train", columns).rows():
            if isinstance(row, BadPair):
                assert str(path) in row.where
                continue
            try:
                pair = read_pair(row, columns)
            except BadPair:
                continue
            assert len(pair.prompt_identity) == 16
            encoder.encode([pair])
    except DataError:
        pass
    assert path.read_bytes() == content


@given(st.sampled_from(TEMPLATES), st.integers(0, 2**32))
@effort(60)
def test_a_chat_template_gives_ids_or_an_error_and_reaches_nothing(tokenizer: Any, template: str, seed: int) -> None:
    chance = random.Random(seed)
    if chance.random() < 0.5:
        cut = chance.randrange(len(CHAT))
        template = CHAT[:cut] + chance.choice(["", "{", "%}", "{{", "\n"]) + CHAT[cut + chance.randrange(3) :]
    from mixwright.pretrain.rpo.raw_pairs import MessagePair

    before, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        (found,) = PairEncoder(tokenizer, end=True).encode(
            [MessagePair("f:1", [said("user", "hello")], [said("assistant", "yes")], [said("assistant", "no")])]
        )
        assert found.where == "f:1"
    except DataError:
        pass
    finally:
        tokenizer.chat_template = before
    assert not Path("x").exists()
