"""JSON that others wrote: a value, or a ValueError; never another error, and in `strict` nothing that JSON has not."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixwright.data_mixing.errors import DataError
from mixwright.data_mixing.plain_data import parse_json, read_json_object
from mixwright.data_mixing.tokenizer import load_tokenizer, tokenizer_hash

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("text", "said"),
    [('{"a": NaN}', "NaN is no JSON"), ("[-Infinity]", "-Infinity is no JSON"),
     ('{"a": {"kind": 1, "kind": 2}}', "key 'kind' occurs twice"), (DEEP, "nested too deeply"), ("{", "Expecting")],
)  # fmt: skip
def test_strict_json_is_refused_for_what_would_be_lost_or_spread(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_json(text, strict=True)


def test_strict_json_is_otherwise_the_same_value() -> None:
    text = '{"a": [1, 2.5, null, "x"], "b": {"a": true}}'
    assert parse_json(text, strict=True) == parse_json(text) == {"a": [1, 2.5, None, "x"], "b": {"a": True}}


@pytest.mark.parametrize("content", [b"[]", b"null", b"7", b"", b"\xff\xfe", DEEP.encode()])
def test_a_file_without_an_object_is_a_value_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_bytes(content)
    with pytest.raises(ValueError):
        read_json_object(tmp_path / "record.json")


@pytest.mark.parametrize("content", ["[]", "{}", "7", DEEP, '{"eos_token": {}}', '{"eos_token": []}'])
def test_a_damaged_tokenizer_folder_is_one_clear_error(content: str, tmp_path: Path) -> None:
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (tmp_path / name).write_text(content)
    for read in (load_tokenizer, tokenizer_hash):
        with pytest.raises(DataError) as told:
            read(tmp_path)
        assert str(told.value).startswith(str(tmp_path))
        assert "\n" not in str(told.value)
