"""Small corpora, their configurations, and stores made of given rows."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mixwright.data_mixing.config_file import validate
from mixwright.data_mixing.corpora import CorporaConfig
from mixwright.data_mixing.domain import Cap
from mixwright.data_mixing.manifest import (
    SPLITS,
    DomainManifest,
    Dropped,
    Manifest,
    RowFile,
    SplitCounts,
    write_manifest,
)
from mixwright.data_mixing.row_files import probe, write_rows
from mixwright.data_mixing.selection import Scan, identity_of, rank_of
from mixwright.data_mixing.summary import domain_fingerprint, store_fingerprint
from mixwright.data_mixing.tokenizer import save_trained, tokenizer_hash, train_tokenizer

WORDS = tuple("the a tree river stone walks sings under over bright dark and never été 木 x1 {} -> 3.14".split())  # noqa: SIM905
Rows = Mapping[str, Mapping[str, np.ndarray]]


def sentences(seed: int, count: int, num_words: int = 40) -> list[str]:
    """`count` different documents of random words."""
    chance = random.Random(seed)
    return [f"{seed}-{i} " + " ".join(chance.choices(WORDS, k=num_words)) for i in range(count)]


def scan_of(texts: list[str], seed: int = 0) -> Scan:
    """What the first pass finds in `texts`, all in one unit."""
    identities = [identity_of(text.encode()) for text in texts]
    return Scan(
        identity_n2=np.frombuffer(b"".join(identities), "<u8").reshape(-1, 2),
        rank_n=np.array([rank_of(identity, seed) for identity in identities], np.uint64),
        num_bytes_n=np.array([len(text.encode()) for text in texts], np.int64),
        per_unit=np.array([len(texts)]),
        num_short=0,
        num_bad=0,
        bad=(),
    )


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def corpora_tree(output: Path, domains: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A configuration as YAML would hold it: rows of 16 + 1 tokens, a trained tokenizer, one process."""
    return {
        "output": str(output), "sequence_length": 16, "tokenizer": {"train": {"vocab_size": 300}},
        "split": {"validation": 0.15, "test": 0.15}, "num_workers": 1, "domains": dict(domains), **changes,
    }  # fmt: skip


def corpora_config(output: Path, domains: Mapping[str, Any], **changes: Any) -> CorporaConfig:
    return validate(CorporaConfig, corpora_tree(output, domains, **changes), "test")


def two_domains(folder: Path) -> dict[str, Any]:
    """Two JSONL domains of 60 and 30 documents, in `folder`."""
    write_jsonl(folder / "a.jsonl", sentences(1, 60))
    write_jsonl(folder / "b.jsonl", sentences(2, 30))
    return {"a": {"paths": [str(folder / "a.jsonl")]}, "b": {"paths": [str(folder / "b.jsonl")]}}


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its content."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def random_rows(seed: int, counts: Mapping[str, int], width: int = 9, dtype: str = "uint16") -> dict[str, Any]:
    """Different random rows [count, width] for the three splits of each domain."""
    chance = np.random.default_rng(seed)
    return {
        name: {split: chance.integers(0, 300, (count, width), dtype) for split in SPLITS}
        for name, count in counts.items()
    }


def write_store(folder: Path, rows: Rows, rows_per_batch: int = 4, rows_per_file: int = 8) -> Path:
    """A token store that holds the given rows [n, width] of each domain and split."""
    any_rows = next(iter(next(iter(rows.values())).values()))
    width, dtype = any_rows.shape[1], str(any_rows.dtype)
    save_trained(train_tokenizer(sentences(0, 20), 300), folder / "tokenizer")
    tokenizer = tokenizer_hash(folder / "tokenizer")
    domains = tuple(
        DomainManifest(
            name=name,
            fingerprint=domain_fingerprint(splits["train"].files),
            cap=Cap(),
            num_source_files=0,
            splits=splits,
            dropped=Dropped(duplicate=0, short=0, over_limit=0, bad=0),
        )
        for name, by_split in rows.items()
        for splits in [{s: _write_split(folder / name, s, by_split[s], rows_per_batch, rows_per_file) for s in SPLITS}]
    )
    manifest = Manifest(
        fingerprint=store_fingerprint(domains, width, dtype, tokenizer),
        sequence_length=width - 1,
        dtype=dtype,
        rows_per_file=rows_per_file,
        vocab_size=300,
        eos_id=0,
        tokenizer_hash=tokenizer,
        domains=domains,
        config={"split": {"validation": 0.1, "test": 0.1}},
        content_key="",
        source_signature="",
    )
    write_manifest(folder, manifest)
    return folder


def _write_split(folder: Path, split: str, rows_NW: np.ndarray, rows_per_batch: int, rows_per_file: int) -> SplitCounts:
    files = []
    for number, first in enumerate(range(0, len(rows_NW), rows_per_file)):
        part_NW = rows_NW[first : first + rows_per_file]
        path = folder / f"{split}-{number:05d}.arrow"
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = [part_NW[i : i + rows_per_batch] for i in range(0, len(part_NW), rows_per_batch)]
        with path.open("wb") as file:
            sha256 = write_rows(file, blocks, rows_NW.shape[1], str(rows_NW.dtype))
        files.append(
            RowFile(
                name=path.name, num_rows=len(part_NW), num_bytes=path.stat().st_size, sha256=sha256, probe=probe(path)
            )
        )
    return SplitCounts(
        num_documents=1, num_bytes=rows_NW.size, num_tokens=rows_NW.size, num_rows=len(rows_NW), num_tail_tokens=0,
        files=tuple(files),
    )  # fmt: skip
