"""A Domain: a named source of text and the unit of mixing."""

from __future__ import annotations

import hashlib
import re
from typing import Literal

from pydantic import Field, field_validator

from mixwright.data_mixing.config_file import StrictModel

OnExhaust = Literal["renormalise", "stop", "allow"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+\-]{0,63}")


class Cap(StrictModel):
    """How often a domain may be repeated, and what happens when it has been.

    `renormalise` gives its share to the other domains, `stop` ends the run, `allow` goes on repeating.
    """

    max_epochs: float | None = Field(default=None, gt=0)
    on_exhaust: OnExhaust = "renormalise"


class Domain(StrictModel):
    """One domain as a run knows it: its training rows, the fingerprint of their tokens, its default cap."""

    name: str
    num_rows: int = Field(gt=0)
    fingerprint: str
    cap: Cap = Cap()

    @field_validator("name")
    @classmethod
    def _valid_name(cls, name: str) -> str:
        return check_domain_name(name)

    @property
    def id(self) -> int:
        """Stable 64-bit id from the name: keys of the plan survive a re-ordered or extended catalogue."""
        return domain_id(self.name)


def check_domain_name(name: str) -> str:
    """`name`, or ValueError: names are part of file names and tables, so they are short and plain."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"domain name {name!r} must be 1-64 letters, digits, '_', '.', '+' or '-', starting with a letter or digit"
        )
    return name


def domain_id(name: str) -> int:
    """First 8 bytes (big endian) of SHA-256 of the UTF-8 name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
