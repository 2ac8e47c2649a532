"""Hugging Face `datasets` as a source of documents: tables by ranges of rows, streams through a spool on disk."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixwright.data_mixing.corpora import DatasetSource, DomainSource
from mixwright.data_mixing.errors import DataError, nearest
from mixwright.data_mixing.staging import Resumable, atomic_file, storage_error
from mixwright.data_mixing.units import UNIT_BYTES, Unit

_SHUFFLE_BUFFER = 10_000


def open_dataset(source: DatasetSource) -> Any:
    """The table (or stream) of a source; raises DataError when it cannot be loaded (Resumable: for now)."""
    import datasets  # two seconds, needed only by those who use it

    try:
        if (Path(source.path) / "state.json").is_file():
            return datasets.load_from_disk(source.path)
        if (Path(source.path) / "dataset_dict.json").is_file():
            return datasets.load_from_disk(source.path)[source.split]
        return datasets.load_dataset(
            source.path, source.name, split=source.split, revision=source.revision, streaming=source.streaming
        )
    except OSError as error:
        raise storage_error(f"{describe(source)}: cannot be loaded", error) from None
    except Exception as error:  # the network stack below has no common exception
        raise DataError(f"{describe(source)}: cannot be loaded: {' '.join(str(error).split())}") from None


def describe(source: DatasetSource) -> str:
    """How errors name a dataset."""
    return f"dataset {source.path!r} split {source.split!r}"


def dataset_units(dataset: DatasetSource, source: DomainSource, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """A table cut into ranges of rows."""
    table = open_dataset(dataset)
    _check_columns(dataset, table.column_names, source.text_field)
    num_rows, num_bytes = len(table), max(int(table.data.nbytes), 1)
    step = max(1, unit_bytes * num_rows // num_bytes)
    ranges = [(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]
    return [
        Unit(Path(dataset.path), "dataset", source.text_field, num_bytes * (stop - start) // num_rows,
             start, stop, dataset, describe(dataset))
        for start, stop in ranges
    ]  # fmt: skip


def _check_columns(dataset: DatasetSource, columns: list[str] | None, text_field: str) -> None:
    if columns is not None and text_field not in columns:
        raise DataError(f"{describe(dataset)}: no column {text_field!r}{nearest(text_field, columns)}")


def read_dataset_rows(unit: Unit) -> Iterator[Any]:
    """The values of the text column in a unit's rows."""
    assert unit.dataset is not None
    table = open_dataset(unit.dataset)
    for batch in table.select(range(unit.start, unit.stop)).select_columns([unit.text_field]).iter(1000):
        yield from batch[unit.text_field]


def spool_stream(
    dataset: DatasetSource, source: DomainSource, folder: Path, seed: int, unit_bytes: int = UNIT_BYTES
) -> list[Unit]:
    """Documents of a stream, up to the domain's `max_bytes`, written as JSONL to `folder`; its units.

    The stream is read once: a `folder` that exists is complete.
    """
    if not folder.exists():
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        _write_spool(dataset, source, part, seed, unit_bytes)
        part.rename(folder)
    units, first_line = [], 1
    for path in sorted(folder.iterdir()):
        size = path.stat().st_size
        units.append(Unit(path, "jsonl", source.text_field, size, 0, size, None, describe(dataset), first_line))
        first_line += int(path.stem.partition("-")[2])
    return units


def _write_spool(dataset: DatasetSource, source: DomainSource, folder: Path, seed: int, unit_bytes: int) -> None:
    stream = open_dataset(dataset)
    _check_columns(dataset, stream.column_names, source.text_field)
    lines = _take(dataset, _lines(stream.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER), source), source.max_bytes)
    for number in itertools.count():
        block = list(_take(dataset, lines, unit_bytes))
        if not block:
            return
        # The name carries the number of documents, so that positions of later files are known without reading it.
        with atomic_file(folder / f"{number:06d}-{len(block)}.jsonl") as file:
            file.writelines(block)


def _lines(stream: Any, source: DomainSource) -> Iterator[bytes]:
    for row in stream:
        kept = {source.text_field: row[source.text_field]} if source.text_field in row else {}
        line = json.dumps(kept, ensure_ascii=False, default=lambda value: [type(value).__name__])
        yield line.encode("utf-8", "surrogatepass") + b"\n"


def _take(dataset: DatasetSource, lines: Iterator[bytes], max_bytes: int | None) -> Iterator[bytes]:
    """Lines until they have `max_bytes` bytes together; raises Resumable when the stream fails."""
    taken = 0
    while max_bytes is None or taken < max_bytes:
        try:
            line = next(lines)
        except StopIteration:
            return
        except Exception as error:  # the network stack below has no common exception
            raise Resumable(f"{describe(dataset)}: stream broke off: {' '.join(str(error).split())}") from None
        taken += len(line)
        yield line
