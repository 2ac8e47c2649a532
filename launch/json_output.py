"""What `--json` prints: one JSON value on standard output and nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel


def print_json(value: Any) -> None:
    """One line of JSON. Dataclasses and models become objects, paths strings; a number that is not finite is null."""
    text = json.dumps(plain(value), ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, in what somebody wrote: only an escape can hold it
        text = json.dumps(plain(value), allow_nan=False)
    print(text, flush=True)


def print_answer(value: Any, text: str, as_json: bool) -> None:
    """`value` for programs, or `text` for people."""
    if as_json:
        print_json(value)
    else:
        print(text, flush=True)


def plain(value: Any) -> Any:
    """`value` as JSON knows it, which knows no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, BaseModel):
        return plain(value.model_dump(mode="json"))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
