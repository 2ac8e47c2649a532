"""A token store with one domain more, whose rows are given: what was there stays where it is, linked, not copied.

The new domain has training rows only, so what losses are compared on does not change.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.domain import Cap, check_domain_name
from mixwright.data_mixing.errors import DataError
from mixwright.data_mixing.manifest import (
    SPLITS,
    DomainManifest,
    Dropped,
    Manifest,
    RowFile,
    SplitCounts,
    fingerprint,
    write_manifest,
)
from mixwright.data_mixing.row_files import probe, write_rows
from mixwright.data_mixing.shards import row_shape
from mixwright.data_mixing.staging import atomic_file, exclusive, write_error
from mixwright.data_mixing.store import TokenStore
from mixwright.data_mixing.summary import domain_fingerprint, store_fingerprint


def extend_store(
    source: TokenStore, output: Path, name: str, rows_nS: NDArray[Any], provenance: Mapping[str, Any]
) -> TokenStore:
    """The store `source` with the domain `name` of `rows_nS` (ids, [n, T + 1]) more, at `output`.

    Complete or absent; found again by the same call. `provenance` says where the rows come from (a JSON mapping, kept
    in the manifest's configuration). Raises DataError for rows that do not fit, a name that is taken, and another store
    at `output`.
    """
    _check(source, name, rows_nS)
    manifest = source.manifest
    identity = fingerprint({"source": manifest.fingerprint, "name": name, "provenance": dict(provenance)})
    if output.exists():
        return _found(output, identity)
    building = output.with_name(output.name + ".building")
    with exclusive(building):
        if output.exists():  # another process made it while this one waited
            return _found(output, identity)
        try:
            store = building / "store"
            shutil.rmtree(store, ignore_errors=True)
            _link(source.folder, store)
            domain = _write_domain(store, manifest, name, rows_nS)
            write_manifest(store, _manifest(manifest, domain, identity, provenance))
            store.rename(output)
        except OSError as error:
            raise write_error(building, error) from None
        shutil.rmtree(building)
    return TokenStore.open(output)


def _check(source: TokenStore, name: str, rows_nS: NDArray[Any]) -> None:
    manifest = source.manifest
    try:
        check_domain_name(name)
    except ValueError as error:
        raise DataError(str(error)) from None
    if any(domain.name == name for domain in manifest.domains):
        raise DataError(f"{source.folder}: has a domain {name!r} already")
    width = manifest.sequence_length + 1
    if rows_nS.ndim != 2 or rows_nS.shape[1] != width or not len(rows_nS):
        raise DataError(f"domain {name!r}: rows have shape {list(rows_nS.shape)}, expected [n, {width}] with n > 0")
    low, high = int(rows_nS.min()), int(rows_nS.max())
    if low < 0 or high >= manifest.vocab_size:
        raise DataError(f"domain {name!r}: ids from {low} to {high}, expected 0 to {manifest.vocab_size - 1}")


def _found(output: Path, identity: str) -> TokenStore:
    store = TokenStore.open(output)
    if store.manifest.content_key != identity:
        raise DataError(f"{output}: holds a store of other rows; choose another output, or remove it")
    return store


def _link(source: Path, target: Path) -> None:
    """All of a store but its manifest; files are hard links where the file system has them."""
    for path in sorted(source.rglob("*")):
        if path.is_dir() or path == source / "manifest.json":
            continue
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path.resolve(), place)
        except OSError:  # another file system, or one without links
            shutil.copyfile(path, place)


def _write_domain(store: Path, manifest: Manifest, name: str, rows_nS: NDArray[Any]) -> DomainManifest:
    """The rows in one file or several, in their order."""
    rows_per_batch = row_shape(manifest.sequence_length, manifest.dtype, 1 << 30).rows_per_batch
    files = []
    for number, first in enumerate(range(0, len(rows_nS), manifest.rows_per_file)):
        part_nS = rows_nS[first : first + manifest.rows_per_file].astype(manifest.dtype)
        path = store / name / f"train-{number:05d}.arrow"
        blocks = (part_nS[at : at + rows_per_batch] for at in range(0, len(part_nS), rows_per_batch))
        with atomic_file(path, durable=True) as file:
            sha256 = write_rows(file, blocks, part_nS.shape[1], manifest.dtype)
        size = path.stat().st_size
        files.append(RowFile(name=path.name, num_rows=len(part_nS), num_bytes=size, sha256=sha256, probe=probe(path)))
    num_documents = int(np.count_nonzero(rows_nS == manifest.eos_id))
    splits = {split: _counts(tuple(files) if split == "train" else (), rows_nS, num_documents) for split in SPLITS}
    return DomainManifest(
        name=name,
        fingerprint=domain_fingerprint(files),
        cap=Cap(),
        num_source_files=0,
        splits=splits,
        dropped=Dropped(duplicate=0, short=0, over_limit=0, bad=0),
    )


def _counts(files: tuple[RowFile, ...], rows_nS: NDArray[Any], num_documents: int) -> SplitCounts:
    """Counts of the training split, or, without files, of an empty one. Bytes of text are not known of ids."""
    num_rows = sum(file.num_rows for file in files)
    return SplitCounts(
        num_documents=num_documents if files else 0,
        num_bytes=0,
        num_tokens=num_rows * rows_nS.shape[1],
        num_rows=num_rows,
        num_tail_tokens=0,
        files=files,
    )


def _manifest(source: Manifest, domain: DomainManifest, identity: str, provenance: Mapping[str, Any]) -> Manifest:
    domains = (*source.domains, domain)
    width = source.sequence_length + 1
    return source.model_copy(
        update={
            "domains": domains,
            "fingerprint": store_fingerprint(domains, width, source.dtype, source.tokenizer_hash),
            "config": {"extends": source.fingerprint, "domain": domain.name, "provenance": dict(provenance)},
            "content_key": identity,
            "source_signature": identity,
        }
    )
