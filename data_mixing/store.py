"""TokenStore: tokenised rows of all domains, read by (domain, row) from memory-mapped Arrow files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.domain import Cap, Domain
from mixwright.data_mixing.errors import DataError, StoreChanged, nearest
from mixwright.data_mixing.manifest import DomainManifest, Manifest, RowFile, Split, SplitCounts, read_manifest
from mixwright.data_mixing.row_files import RowFileView, open_rows, probe


class TokenStore:
    """Rows of `sequence_length + 1` tokens of every domain, addressed by (domain index, row number).

    Domain indices follow `manifest.domains`. Opening reads the manifest and compares file sizes; a file is
    mapped, and compared more closely, when a row of it is first asked for.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.row_width = manifest.sequence_length + 1
        self.dtype = np.dtype(manifest.dtype)
        self._index = {domain.name: i for i, domain in enumerate(manifest.domains)}
        self._views: dict[tuple[int, Split, int], RowFileView] = {}

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """Raises DataError when `folder` is no store, StoreChanged when a file is missing or has another size."""
        manifest = read_manifest(folder)
        for domain in manifest.domains:
            for split in domain.splits.values():
                for file in split.files:
                    _check_size(folder / domain.name / file.name, file)
        return cls(folder, manifest)

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def names(self) -> tuple[str, ...]:
        """Domain names; the position of a name is its domain index."""
        return tuple(self._index)

    def index(self, name: str) -> int:
        """The domain index of a name; raises DataError with the nearest valid name."""
        if name not in self._index:
            raise DataError(f"{self.folder}: no domain {name!r}{nearest(name, self._index)}")
        return self._index[name]

    def domains(self, caps: Mapping[str, Cap] | None = None) -> tuple[Domain, ...]:
        """The catalogue for a run's GENESIS, in store order; `caps` overrides the store's caps by name."""
        caps = caps or {}
        for name in caps:
            self.index(name)
        return tuple(
            Domain(
                name=domain.name,
                num_rows=domain.splits["train"].num_rows,
                fingerprint=domain.fingerprint,
                cap=caps.get(domain.name, domain.cap),
            )
            for domain in self.manifest.domains
        )

    def num_rows(self, domain: str | int, split: Split = "train") -> int:
        """Rows of one split of a domain, given by name or index."""
        return self._counts(self.index(domain) if isinstance(domain, str) else domain, split).num_rows

    def rows(self, domain: str | int, split: Split, first: int, count: int) -> NDArray[Any]:
        """Rows first .. first + count - 1 of a split; [count, sequence_length + 1] of the store's dtype."""
        index = self.index(domain) if isinstance(domain, str) else domain
        return self.gather(np.full(count, index), np.arange(first, first + count), split)

    def gather(self, domain_n: NDArray[Any], row_n: NDArray[Any], split: Split = "train") -> NDArray[Any]:
        """The rows (domain_n[i], row_n[i]) in order: [n, sequence_length + 1] of the store's dtype, a copy.

        Raises DataError naming the first row that does not exist, StoreChanged when a file is not as recorded.
        """
        domain_n, row_n = np.asarray(domain_n, np.int64), np.asarray(row_n, np.int64)
        result_NW = np.empty((len(row_n), self.row_width), self.dtype)
        for index, position_m in _groups(domain_n):
            counts = self._counts(index, split)
            rows_m = row_n[position_m]
            self._check_rows(index, split, rows_m, counts.num_rows)
            for file_index, within_m in _groups(rows_m // self.manifest.rows_per_file):
                target_m = position_m[within_m]
                view = self._view(index, split, file_index)
                result_NW[target_m] = view.take(row_n[target_m] - file_index * self.manifest.rows_per_file)
        return result_NW

    def _counts(self, index: int, split: Split) -> SplitCounts:
        domains = self.manifest.domains
        if not 0 <= index < len(domains):
            raise DataError(f"{self.folder}: no domain with index {index}; there are {len(domains)}")
        return domains[index].splits[split]

    def _check_rows(self, index: int, split: Split, rows_m: NDArray[np.int64], num_rows: int) -> None:
        outside = (rows_m < 0) | (rows_m >= num_rows)
        if outside.any():
            row, name = int(rows_m[outside.argmax()]), self.manifest.domains[index].name
            raise DataError(f"{self.folder}: domain {name!r} has {num_rows} {split} rows; there is no row {row}")

    def _view(self, index: int, split: Split, file_index: int) -> RowFileView:
        key = (index, split, file_index)
        if key not in self._views:
            self._views[key] = self._open_file(self.manifest.domains[index], split, file_index)
        return self._views[key]

    def _open_file(self, domain: DomainManifest, split: Split, file_index: int) -> RowFileView:
        file = domain.splits[split].files[file_index]
        path = self.folder / domain.name / file.name
        _check_size(path, file)
        if probe(path) != file.probe:
            raise StoreChanged(f"{path}: its content is not what the manifest recorded; prepare the store again")
        return open_rows(path, self.row_width, self.manifest.dtype, file.num_rows)


def _check_size(path: Path, file: RowFile) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise StoreChanged(f"{path}: {error.strerror}, but the manifest lists it; prepare the store again") from None
    if size != file.num_bytes:
        raise StoreChanged(f"{path}: {size} bytes, the manifest recorded {file.num_bytes}; prepare the store again")


def _groups(key_n: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64]]]:
    """The distinct keys with the positions that hold them, in ascending order of key."""
    if len(key_n) == 0:
        return []
    if (key_n == key_n[0]).all():
        return [(int(key_n[0]), np.arange(len(key_n)))]
    order = np.argsort(key_n, kind="stable")
    keys, starts = np.unique(key_n[order], return_index=True)
    return list(zip(keys.tolist(), np.split(order, starts[1:]), strict=True))
