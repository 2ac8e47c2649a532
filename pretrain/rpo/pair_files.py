"""Tokenised pairs on disk.

    <folder>/tokens.bin         int32, little endian: prompt, chosen and rejected of one pair after the other
    <folder>/train.npy          int64 [n, 4]: where a pair begins in tokens.bin, and the lengths of its three parts
    <folder>/evaluation.npy     the same for the pairs to evaluate on
    <folder>/tokenizer/         what the ids mean; loads with transformers.AutoTokenizer.from_pretrained
    <folder>/manifest.json      counts, fingerprints and what decided them; written last: the folder is complete

The folder can be moved and copied.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from mixwright.data_mixing.config_file import StrictModel
from mixwright.data_mixing.errors import DataError
from mixwright.data_mixing.plain_data import parse_json
from mixwright.data_mixing.row_files import probe
from mixwright.data_mixing.staging import atomic_file
from mixwright.pretrain.rpo.pair_counts import PairCounts
from mixwright.pretrain.rpo.truncation import FittedPair

FORMAT_VERSION = 1
TOKENS, TOKENIZER, MANIFEST = "tokens.bin", "tokenizer", "manifest.json"
Split = Literal["train", "evaluation"]
SPLITS: tuple[Split, ...] = ("train", "evaluation")


class PairManifest(StrictModel):
    """`fingerprint` is of `decided_by`: all that decides the pairs. `splits` are fingerprints of their tokens.

    `probes` are of a few blocks of each file.
    """

    format_version: Literal[1] = 1
    fingerprint: str
    num_tokens: int = Field(gt=0)
    probes: dict[str, str]
    splits: dict[Split, str]
    counts: PairCounts
    decided_by: dict[str, Any]


class PairWriter:
    """Appends pairs to a token file, and remembers 64 bytes of each: its place, hashes of its prompt and its tokens."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._index = array("q")
        self._prompts = bytearray()
        self._digests = bytearray()
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._index) // 4

    def add(self, pair: FittedPair, prompt_identity: bytes) -> None:
        """Append a pair; `prompt_identity` has 16 bytes."""
        lengths = [len(pair.prompt), len(pair.chosen), len(pair.rejected)]
        content = np.array([*pair.prompt, *pair.chosen, *pair.rejected], "<i4").tobytes()
        self._file.write(content)
        self._index.extend((self.num_tokens, *lengths))
        self._prompts += prompt_identity
        self._digests += hashlib.blake2b(np.array(lengths, "<i8").tobytes() + content, digest_size=16).digest()
        self.num_tokens += sum(lengths)

    @property
    def index_n4(self) -> NDArray[np.int64]:
        """Start and three lengths of each pair."""
        return np.array(self._index, np.int64).reshape(-1, 4)

    @property
    def prompt_n2(self) -> NDArray[np.uint64]:
        """Identity of each pair's prompt."""
        return np.frombuffer(bytes(self._prompts), "<u8").reshape(-1, 2)

    def fingerprint(self, pair_n: NDArray[np.int64]) -> str:
        """Identifies the tokens of these pairs, in this order."""
        digests_nB = np.frombuffer(bytes(self._digests), np.uint8).reshape(-1, 16)
        return hashlib.sha256(digests_nB[pair_n].tobytes()).hexdigest()


def finish(
    folder: Path,
    writer: PairWriter,
    splits: Mapping[Split, NDArray[np.int64]],
    *,
    tokenizer: Any,
    counts: PairCounts,
    key: str,
    decided_by: dict[str, Any],
) -> None:
    """Write what goes beside a complete token file; `splits` are places of pairs in the order they were added."""
    for split, pair_n in splits.items():
        with atomic_file(folder / _index(split), durable=True) as file:
            np.save(file, writer.index_n4[pair_n])
    tokenizer.save_pretrained(folder / TOKENIZER)
    manifest = PairManifest(
        fingerprint=key,
        num_tokens=writer.num_tokens,
        probes={name: probe(folder / name) for name in (TOKENS, *map(_index, splits))},
        splits={split: writer.fingerprint(pair_n) for split, pair_n in splits.items()},
        counts=counts,
        decided_by=decided_by,
    )
    with atomic_file(folder / MANIFEST, durable=True) as file:
        file.write(manifest.model_dump_json(indent=1).encode() + b"\n")


def read_manifest(folder: Path) -> PairManifest:
    """Raises DataError when the folder has none, or it is of another format version."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{folder}: holds no tokenised pairs (no {MANIFEST})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        return PairManifest.model_validate_json(content)
    except ValidationError as error:
        raise _damaged(folder, f"{MANIFEST}: {_problem(content, error)}") from None


def open_tokens(folder: Path, manifest: PairManifest) -> NDArray[np.int32]:
    """The token file, mapped; raises DataError when it is not the one that was written."""
    path = _checked(folder, TOKENS, manifest)
    if path.stat().st_size != 4 * manifest.num_tokens:
        raise _damaged(folder, f"{TOKENS} is not the file that was written")
    return np.memmap(path, "<i4", mode="r").view(np.ndarray)


def open_index(folder: Path, split: Split, manifest: PairManifest) -> NDArray[np.int64]:
    """Start and three lengths of each pair, [n, 4]; raises DataError when it is not the file that was written."""
    index_n4: NDArray[np.int64] = np.load(_checked(folder, _index(split), manifest))
    return index_n4


def _index(split: Split) -> str:
    return f"{split}.npy"


def _checked(folder: Path, name: str, manifest: PairManifest) -> Path:
    path = folder / name
    try:
        same = probe(path) == manifest.probes.get(name)
    except OSError as error:
        raise _damaged(folder, f"{name} cannot be read: {error.strerror or error}") from None
    if not same:
        raise _damaged(folder, f"{name} is not the file that was written")
    return path


def _problem(content: bytes, error: ValidationError) -> str:
    """What is wrong with a manifest: first of all its version, by which everything else may differ."""
    try:
        tree = parse_json(content)
    except ValueError as problem:
        return f"not JSON: {problem}"
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if version != FORMAT_VERSION:
        return f"format version {version!r}, this release reads {FORMAT_VERSION}"
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _damaged(folder: Path, problem: str) -> DataError:
    return DataError(f"{folder}: {problem}; remove the folder, and the same command makes it again")
