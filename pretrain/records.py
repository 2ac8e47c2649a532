"""Records of finished runs: one JSON file each, complete or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixwright.data_mixing.errors import ConfigError
from mixwright.data_mixing.plain_data import parse_json


def read_record(path: Path, what: str) -> dict[str, Any] | None:
    """The record in a file, None without one; raises ConfigError for a file that is not the record of `what`."""
    try:
        return dict(parse_json(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: not the record of {what} ({error}); remove it to run again") from None
