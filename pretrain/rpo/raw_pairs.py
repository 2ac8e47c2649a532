"""From a row to a pair: a prompt and two completions, all as text or all as lists of messages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mixwright.data_mixing.errors import DataError, nearest
from mixwright.data_mixing.selection import identity_of
from mixwright.pretrain.rpo.config import ColumnsConfig
from mixwright.pretrain.rpo.pair_counts import BadPair
from mixwright.pretrain.rpo.reading import Row

Message = dict[str, Any]
"""`role`, `content`, and whatever else the chat template reads."""

NOT_THE_MODELS = ("system", "developer", "user", "tool")
"""Roles that no generation prompt opens."""


@dataclass(frozen=True)
class TextPair:
    """A pair of texts."""

    where: str
    prompt: str
    chosen: str
    rejected: str

    @property
    def num_characters(self) -> int:
        """Of all texts."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def prompt_identity(self) -> bytes:
        """128-bit hash of the prompt."""
        return identity_of(self.prompt.encode())


@dataclass(frozen=True)
class MessagePair:
    """A pair of lists of messages; `chosen` and `rejected` are what follows the prompt."""

    where: str
    prompt: Sequence[Message]
    chosen: Sequence[Message]
    rejected: Sequence[Message]

    @property
    def num_characters(self) -> int:
        """Of all messages."""
        return sum(map(len, strings_in([*self.prompt, *self.chosen, *self.rejected])))

    @property
    def prompt_identity(self) -> bytes:
        """128-bit hash of the prompt's messages, independent of the order of their keys."""
        return identity_of(json.dumps(self.prompt, sort_keys=True, default=str).encode())


def read_pair(row: Row, columns: ColumnsConfig) -> TextPair | MessagePair:
    """The pair of a row; for messages without a prompt, the ones that both begin with are it.

    Raises BadPair when the row gives none, DataError when text and messages are mixed in it: then columns are wrong.
    """
    chosen, rejected = _field(row, columns.chosen), _field(row, columns.rejected)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError(
            f"{row.where}: {columns.chosen!r} is {_kind(chosen)}, {columns.rejected!r} is {_kind(rejected)}"
        )
    if isinstance(chosen, str) and isinstance(rejected, str):
        pair: TextPair | MessagePair = TextPair(row.where, _text_prompt(row, columns), chosen, rejected)
    else:
        assert isinstance(chosen, list)
        assert isinstance(rejected, list)
        pair = _message_pair(row, columns, chosen, rejected)
    if pair.chosen == pair.rejected:
        raise BadPair(row.where, "identical", f"{columns.chosen!r} equals {columns.rejected!r}")
    for name, completion in ((columns.chosen, pair.chosen), (columns.rejected, pair.rejected)):
        if is_empty(completion):
            raise BadPair(row.where, "empty", f"the completion of {name!r} is empty")
    return pair


def is_empty(completion: str | Sequence[Message]) -> bool:
    """Whether there is nothing to learn: no text, or only messages of white space, which chat templates strip."""
    if isinstance(completion, str):
        return not completion
    return not any(message["content"].strip() for message in completion)


def strings_in(value: Any) -> Iterator[str]:
    """All strings in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings_in(key)
            yield from strings_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_in(item)


def _text_prompt(row: Row, columns: ColumnsConfig) -> str:
    if columns.prompt is None:
        raise DataError(f"{row.where}: `data.columns.prompt: null` wants messages, {columns.chosen!r} is text")
    prompt = _field(row, columns.prompt)
    if not isinstance(prompt, str):
        raise DataError(f"{row.where}: {columns.prompt!r} is a list of messages, {columns.chosen!r} is text")
    return prompt


def _message_pair(row: Row, columns: ColumnsConfig, chosen: list[Message], rejected: list[Message]) -> MessagePair:
    if columns.prompt is None or row.values.get(columns.prompt) is None:
        return _split_at_difference(row, chosen, rejected)
    prompt = _field(row, columns.prompt)
    if isinstance(prompt, str):
        raise DataError(
            f"{row.where}: {columns.prompt!r} is text, {columns.chosen!r} a list of messages; when these begin with "
            "those of the prompt, set `data.columns.prompt: null`"
        )
    if not prompt:
        raise BadPair(row.where, "no_prompt", f"{columns.prompt!r} has no messages")
    if all(completion[: len(prompt)] == prompt for completion in (chosen, rejected)):
        raise DataError(
            f"{row.where}: {columns.chosen!r} and {columns.rejected!r} repeat the messages of {columns.prompt!r}; "
            "set `data.columns.prompt: null`, then the messages that both begin with are the prompt"
        )
    return _continued(row.where, prompt, chosen, rejected)


def _split_at_difference(row: Row, chosen: list[Message], rejected: list[Message]) -> MessagePair:
    pairs = zip(chosen, rejected, strict=False)
    shared = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(chosen), len(rejected)))
    if not shared:
        raise BadPair(
            row.where, "no_prompt", "no prompt, and chosen and rejected have no messages in common to begin with"
        )
    return _continued(row.where, chosen[:shared], chosen[shared:], rejected[shared:])


def _continued(where: str, prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> MessagePair:
    """The pair; raises BadPair when what follows the prompt is not the model's to say."""
    for completion in (chosen, rejected):
        if completion and (role := completion[0]["role"]) in NOT_THE_MODELS:
            raise BadPair(where, "role", f"a completion begins with a message of role {role!r}")
    return MessagePair(where, prompt, chosen, rejected)


def _field(row: Row, column: str) -> str | list[Message]:
    """The text or the messages in a column; raises BadPair for anything else."""
    if column not in row.values:
        raise BadPair(row.where, "field", f"no field {column!r}{nearest(column, row.values)}")
    value = row.values[column]
    if not isinstance(value, (str, list)):
        found = "null" if value is None else type(value).__name__
        raise BadPair(row.where, "field", f"field {column!r} is {found}, expected text or a list of messages")
    for text in strings_in(value):
        _check_unicode(row.where, column, text)
    if isinstance(value, str):
        return value
    return [_message(row, f"{column}[{number}]", message) for number, message in enumerate(value)]


def _check_unicode(where: str, column: str, text: str) -> None:
    """An escape may stand for half a surrogate pair ("\\ud800"), which is no Unicode text and has no UTF-8 form."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadPair(where, "field", f"field {column!r}: unpaired surrogate at character {error.start}") from None


def _message(row: Row, name: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise BadPair(row.where, "field", f"{name} is {type(message).__name__}, expected a message (role, content)")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            found = "null" if message.get(key) is None else type(message[key]).__name__
            raise BadPair(row.where, "field", f"{name}.{key} is {found}, expected text")
    # Tables give every message every key that any message has.
    return {key: value for key, value in message.items() if value is not None}


def _kind(field: str | list[Message]) -> str:
    return "text" if isinstance(field, str) else "a list of messages"
