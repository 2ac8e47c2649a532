"""manifest.json: what a token store holds. It is written last, so a folder that has one is complete."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from mixwright.data_mixing.config_file import StrictModel
from mixwright.data_mixing.domain import Cap
from mixwright.data_mixing.entries import MAX_COUNT
from mixwright.data_mixing.errors import DataError, StoreChanged
from mixwright.data_mixing.plain_data import parse_json
from mixwright.data_mixing.staging import atomic_file

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class RowFile(StrictModel):
    """One Arrow file: `sha256` of its tokens in row order (little endian), `probe` of a few blocks of the file."""

    name: str
    num_rows: int = Field(gt=0)
    num_bytes: int = Field(gt=0)
    sha256: str
    probe: str


class SplitCounts(StrictModel):
    """One split of a domain. `num_tokens` counts the end-of-document tokens, and the tail that fills no row.

    `num_bytes` is UTF-8 text. All files but the last have `rows_per_file` rows.
    """

    num_documents: int = Field(ge=0)
    num_bytes: int = Field(ge=0)
    num_tokens: int = Field(ge=0)
    num_rows: int = Field(ge=0, lt=MAX_COUNT)
    num_tail_tokens: int = Field(ge=0)
    files: tuple[RowFile, ...] = ()


class Dropped(StrictModel):
    """Documents of a domain that are not in the store, by reason; `bad_examples` are the first few."""

    duplicate: int = Field(ge=0)
    short: int = Field(ge=0)
    over_limit: int = Field(ge=0)
    bad: int = Field(ge=0)
    bad_examples: tuple[str, ...] = ()


class DomainManifest(StrictModel):
    """One domain. `fingerprint` identifies its training tokens."""

    name: str
    fingerprint: str
    cap: Cap
    num_source_files: int = Field(ge=0)
    splits: dict[Split, SplitCounts]
    dropped: Dropped

    @field_validator("splits")
    @classmethod
    def _has_all(cls, splits: dict[Split, SplitCounts]) -> dict[Split, SplitCounts]:
        missing = [name for name in SPLITS if name not in splits]
        if missing:
            raise ValueError(f"split {missing[0]!r} is missing")
        return splits


class Manifest(StrictModel):
    """A token store. `fingerprint` covers everything that determines the rows of every split.

    `content_key` identifies documents, tokenizer and shape, `source_signature` configuration and source files
    (path, size, time): what `data prepare` needs to recognise a finished store.
    """

    format_version: Literal[1] = 1
    fingerprint: str
    sequence_length: int = Field(gt=0)
    dtype: Literal["uint16", "uint32"]
    rows_per_file: int = Field(gt=0, lt=MAX_COUNT)
    vocab_size: int = Field(gt=0)
    eos_id: int = Field(ge=0)
    tokenizer_hash: str
    domains: tuple[DomainManifest, ...] = Field(min_length=1)
    config: dict[str, Any]
    content_key: str
    source_signature: str


def fingerprint(tree: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, complete or not at all."""
    with atomic_file(folder / MANIFEST, durable=True) as file:
        file.write(manifest.model_dump_json(indent=1).encode() + b"\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store; raises DataError when there is none, or it is of another format version."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{folder}: not a token store (no {MANIFEST}); make one with `mixwright data prepare`"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise _not_a_manifest(path, content, error) from None


def _not_a_manifest(path: Path, content: bytes, error: ValidationError) -> DataError:
    """What is wrong with a manifest: first of all its version, by which everything else may differ."""
    try:
        tree = parse_json(content)
    except ValueError as problem:
        return DataError(f"{path}: not JSON: {problem}")
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if version != FORMAT_VERSION:
        return DataError(f"{path}: format version {version!r}, this release reads {FORMAT_VERSION}; prepare it again")
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    return StoreChanged(f"{path}: {key}: {first['msg']}")
