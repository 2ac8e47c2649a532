"""TokenStore: tokenised rows of all domains, read by (domain, row) from memory-mapped Arrow files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.domain import Cap, Domain
from mixwright.data_mixing.errors import DataError, StoreChanged, nearest
from mixwright.data_mixing.manifest import MANIFEST, SPLITS, Manifest, RowFile, Split, read_manifest
from mixwright.data_mixing.row_files import RowFileView, open_rows, probe, rows_sha256


class TokenStore:
    """Rows of `sequence_length + 1` tokens of every domain, addressed by (domain index, row number).

    Domain indices follow `manifest.domains`. Opening reads the manifest and compares file sizes; a file is
    mapped, and compared more closely, when a row of it is first asked for. From then on each `gather` looks at its size
    and time: what is written into a mapped file would be read as rows, and a file that is cut would end the process.
    """

    ask_ahead = 0
    """How many `ask`s pay when they are made before their answers are needed."""

    def __init__(self, folder: Path, manifest: Manifest, compare_since_ns: int | None = None) -> None:
        self.folder = folder
        self.manifest = manifest
        self.row_width = manifest.sequence_length + 1
        self.dtype = np.dtype(manifest.dtype)
        self._index = {domain.name: i for i, domain in enumerate(manifest.domains)}
        self._layouts: dict[str, _Layout] = {}
        self._compare_since_ns = compare_since_ns

    @classmethod
    def open(cls, folder: Path, *, compare_since_ns: int | None = None) -> TokenStore:
        """Raises DataError when `folder` is no store, StoreChanged when a file is missing or has another size.

        Files that were changed after `compare_since_ns` (of a run that is continued: when it began) are compared with
        the manifest in full when they are mapped, others by a few blocks.
        """
        manifest = read_manifest(folder)
        for domain in manifest.domains:
            for split in domain.splits.values():
                for file in split.files:
                    _check_size(folder / domain.name / file.name, file)
        return cls(folder, manifest, compare_since_ns)

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

    def num_rows(self, domain: str, split: str = "train") -> int:
        """Rows of one split of a domain."""
        return int(self._layout(split).num_rows_G[self.index(domain)])

    def rows(self, domain: str, split: str, first: int, count: int) -> NDArray[Any]:
        """Rows first .. first + count - 1 of a split; [count, sequence_length + 1] of the store's dtype."""
        return self.gather(np.full(count, self.index(domain)), np.arange(first, first + count), split)

    def gather(self, domain_n: NDArray[Any], row_n: NDArray[Any], split: str = "train") -> NDArray[Any]:
        """The rows (domain_n[i], row_n[i]) in order: [n, sequence_length + 1] of the store's dtype, a copy.

        Raises DataError naming the first row that does not exist, StoreChanged when a file is not as recorded.
        """
        domain_n, row_n = np.asarray(domain_n, np.int64), np.asarray(row_n, np.int64)
        layout = self._layout(split)
        self._check_rows(layout, domain_n, row_n)
        file_n = layout.first_file_G[domain_n] + row_n // self.manifest.rows_per_file
        within_n = row_n % self.manifest.rows_per_file
        groups = _groups(file_n)
        if len(groups) == 1:  # no second copy
            return self._view(layout, groups[0][0]).take(within_n)
        result_NW = np.empty((len(row_n), self.row_width), self.dtype)
        for file, position_m in groups:
            result_NW[position_m] = self._view(layout, file).take(within_n[position_m])
        return result_NW

    def ask(self, domain_n: NDArray[Any], row_n: NDArray[Any]) -> Callable[[], NDArray[Any]]:
        """Ask for training rows that are taken later, in order of asking; `gather` when they are."""
        return lambda: self.gather(domain_n, row_n)

    def _layout(self, split: str) -> _Layout:
        if split not in self._layouts:
            if split not in SPLITS:
                raise DataError(f"{self.folder}: no split {split!r}{nearest(split, SPLITS)}")
            self._layouts[split] = _lay_out(self.folder, self.manifest, split)
        return self._layouts[split]

    def _check_rows(self, layout: _Layout, domain_n: NDArray[np.int64], row_n: NDArray[np.int64]) -> None:
        unknown_n = (domain_n < 0) | (domain_n >= len(layout.num_rows_G))
        if unknown_n.any():
            index = domain_n[unknown_n.argmax()]
            raise DataError(f"{self.folder}: no domain with index {index}; there are {len(layout.num_rows_G)}")
        outside_n = (row_n < 0) | (row_n >= layout.num_rows_G[domain_n])
        if outside_n.any():
            at = outside_n.argmax()
            name, num_rows = self.manifest.domains[domain_n[at]].name, layout.num_rows_G[domain_n[at]]
            raise DataError(
                f"{self.folder}: domain {name!r} has {num_rows} {layout.split} rows; there is no row {row_n[at]}"
            )

    def _view(self, layout: _Layout, file: int) -> RowFileView:
        mapped = layout.mapped.get(file)
        if mapped is None:
            mapped = layout.mapped[file] = self._map(layout, file)
        elif (found := _stamp(mapped.path)) != mapped.stamp:
            mapped.stamp = self._still_the_same(mapped, found, layout.files[file])
        return mapped.view

    def _map(self, layout: _Layout, file: int) -> _Mapped:
        path, row_file = self.folder / layout.paths[file], layout.files[file]
        _check_size(path, row_file)
        stamp = _stamp(str(path))
        if probe(path) != row_file.probe:
            raise _changed(path)
        mapped = _Mapped(open_rows(path, self.row_width, self.manifest.dtype, row_file.num_rows), str(path), stamp)
        if self._compare_since_ns is not None and (stamp is None or stamp[1] > self._compare_since_ns):
            _compare(mapped, row_file)
        return mapped

    def _still_the_same(self, mapped: _Mapped, found: _Stamp, recorded: RowFile) -> _Stamp:
        """What to expect of a file whose stamp is another one; raises StoreChanged when it holds other rows now."""
        if found is None or mapped.stamp is None or found[0] != mapped.stamp[0]:
            return mapped.stamp  # removed or replaced: what is mapped is the old file, which nobody can reach
        _check_size(Path(mapped.path), recorded)
        _compare(mapped, recorded)
        return found


_Stamp = tuple[int, int, int] | None
"""Of a file: its inode, the time of the last change (ns), its size; None when there is none."""


@dataclass
class _Mapped:
    """A file that is open, and its stamp at the time when its content was looked at."""

    view: RowFileView
    path: str
    stamp: _Stamp


@dataclass(frozen=True)
class _Layout:
    """The files of one split over all domains: domain g has num_rows_G[g] rows, from file first_file_G[g] on."""

    split: Split
    num_rows_G: NDArray[np.int64]
    first_file_G: NDArray[np.int64]
    paths: list[str]
    files: list[RowFile]
    mapped: dict[int, _Mapped]


def _lay_out(folder: Path, manifest: Manifest, split: Split) -> _Layout:
    """Raises StoreChanged when numbers of rows contradict each other: gather trusts them for its addresses."""
    counts = [domain.splits[split] for domain in manifest.domains]
    for domain, count in zip(manifest.domains, counts, strict=True):
        full, found = manifest.rows_per_file, [file.num_rows for file in count.files]
        if sum(found) != count.num_rows or any(rows != full for rows in found[:-1]) or max(found, default=0) > full:
            raise StoreChanged(
                f"{folder / MANIFEST}: domain {domain.name!r} has {count.num_rows} {split} rows in files of "
                f"{found[:8]}, expected files of {full} rows and a last one of the rest"
            )
    return _Layout(
        split=split,
        num_rows_G=np.array([count.num_rows for count in counts], np.int64),
        first_file_G=np.cumsum([0, *(len(count.files) for count in counts)])[:-1],
        paths=[f"{domain.name}/{file.name}" for domain in manifest.domains for file in domain.splits[split].files],
        files=[file for count in counts for file in count.files],
        mapped={},
    )


def _stamp(path: str) -> _Stamp:
    try:
        found = os.stat(path)  # noqa: PTH116 (for each file of each gather)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _compare(mapped: _Mapped, recorded: RowFile) -> None:
    """Read a file from its first row to its last; raises StoreChanged when one is not as recorded."""
    if rows_sha256(mapped.view, recorded.num_rows) != recorded.sha256:
        raise _changed(Path(mapped.path))


def _changed(path: Path) -> StoreChanged:
    return StoreChanged(f"{path}: its content is not what the manifest recorded; prepare the store again")


def _check_size(path: Path, file: RowFile) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise StoreChanged(f"{path}: {error.strerror}, but the manifest lists it; prepare the store again") from None
    if size != file.num_bytes:
        raise StoreChanged(f"{path}: {size} bytes, the manifest recorded {file.num_bytes}; prepare the store again")


def _groups(key_n: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64]]]:
    """The distinct keys in ascending order, each with the positions that hold it."""
    if len(key_n) and (key_n == key_n[0]).all():
        return [(int(key_n[0]), np.arange(len(key_n)))]
    order = np.argsort(key_n, kind="stable")
    keys, starts = np.unique(key_n[order], return_index=True)
    return list(zip(keys.tolist(), np.split(order, starts[1:]), strict=False))
