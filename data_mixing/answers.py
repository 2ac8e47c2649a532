"""Answers of the controller as they cross processes: plain data, `{"ok": ...}` or `{"error": ..., "message": ...}`."""

from __future__ import annotations

from typing import Any

from mixwright.data_mixing.errors import (
    AccessRefused,
    DataError,
    JournalConflict,
    JournalError,
    MixingError,
    PlanMismatch,
    PolicyRejected,
    ServiceUnavailable,
    StoreChanged,
)

Answer = dict[str, Any]

MAX_MESSAGE_CHARACTERS = 400

_ERRORS: dict[str, type[MixingError]] = {
    error.__name__: error
    for error in (
        AccessRefused,
        DataError,
        JournalConflict,
        JournalError,
        PlanMismatch,
        PolicyRejected,
        ServiceUnavailable,
        StoreChanged,
    )
}


def failure(error: MixingError) -> Answer:
    """The answer that stands for an error."""
    return {"error": type(error).__name__, "message": str(error)}


def unpack(answer: Answer) -> Answer:
    """The `ok` part of an answer; raises its error."""
    if "error" in answer:
        raise _ERRORS.get(str(answer["error"]), ServiceUnavailable)(str(answer["message"]))
    ok: Answer = answer["ok"]
    return ok


def printable(text: str) -> str:
    """`text` without control characters, which a terminal would obey: others wrote it."""
    return "".join(character if character.isprintable() else " " for character in text)


def one_line(error: BaseException) -> str:
    """An error of another library as one line of reasonable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_MESSAGE_CHARACTERS else text[:MAX_MESSAGE_CHARACTERS] + "..."
