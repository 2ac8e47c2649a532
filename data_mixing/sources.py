"""The inputs of a store: which files its domains name, whether they are still the same, and the tasks they make."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mixwright.data_mixing.corpora import CorporaConfig, DomainSource, find_files, locate_dataset
from mixwright.data_mixing.hub import dataset_units, spool_stream
from mixwright.data_mixing.manifest import FORMAT_VERSION, fingerprint
from mixwright.data_mixing.scan import Task
from mixwright.data_mixing.staging import storage_error
from mixwright.data_mixing.units import Unit, file_units

_MIN_TASK_BYTES, _MAX_TASK_BYTES, _TASKS_WANTED = 1 << 18, 64 << 20, 256


@dataclass(frozen=True)
class DomainInput:
    """A domain and the files that its patterns match (none for a `datasets` path, which is absolute if it is local)."""

    name: str
    source: DomainSource
    files: tuple[Path, ...]


def find_inputs(config: CorporaConfig, base: Path) -> list[DomainInput]:
    """The inputs of every domain, in the order of the configuration; raises DataError when one is missing."""
    return [
        DomainInput(name, locate_dataset(source, base), tuple(find_files(name, source, base)))
        for name, source in config.domains.items()
    ]


def source_signature(config: CorporaConfig, inputs: Iterable[DomainInput]) -> str:
    """Fingerprint of the configuration and of path, size and time of every local file; no file is read.

    A hub dataset is known by its name only: pin a `revision` when it may change.
    """
    local = [Path(item.source.dataset.path) for item in inputs if item.source.dataset is not None]
    local += [Path(config.tokenizer.path)] if config.tokenizer.path is not None else []
    files = [file for item in inputs for file in item.files]
    files += [file for path in local for file in _files_of(path)]
    stats = [(str(file), *_size_and_time(file)) for file in files]
    return fingerprint({"format_version": FORMAT_VERSION, "config": config.determining(), "files": stats})


def _files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _size_and_time(file: Path) -> tuple[int, int]:
    try:
        stat = file.stat()
    except OSError as error:
        raise storage_error(f"{file}: cannot be read", error) from None
    return stat.st_size, stat.st_mtime_ns


def plan_tasks(config: CorporaConfig, inputs: Iterable[DomainInput], spool: Path) -> list[list[Task]]:
    """The tasks of every domain: consecutive units of about equal size, whatever the number of processes."""
    units = [_units(item, spool / item.name, config.seed) for item in inputs]
    total = sum(unit.num_bytes for domain_units in units for unit in domain_units)
    task_bytes = min(max(total // _TASKS_WANTED, _MIN_TASK_BYTES), _MAX_TASK_BYTES)
    tasks: list[list[Task]] = []
    index = 0
    for item, domain_units in zip(inputs, units, strict=True):
        bundles = list(_bundles(domain_units, task_bytes))
        tasks.append([Task(index + i, item.name, bundle, item.source.min_chars) for i, bundle in enumerate(bundles)])
        index += len(bundles)
    return tasks


def _units(item: DomainInput, spool: Path, seed: int) -> list[Unit]:
    dataset = item.source.dataset
    if dataset is None:
        return [unit for file in item.files for unit in file_units(file, item.source)]
    if dataset.streaming:
        return spool_stream(dataset, item.source, spool, seed)
    return dataset_units(dataset, item.source)


def _bundles(units: Iterable[Unit], task_bytes: int) -> Iterator[tuple[Unit, ...]]:
    bundle: list[Unit] = []
    num_bytes = 0
    for unit in units:
        if bundle and num_bytes + unit.num_bytes > task_bytes:
            yield tuple(bundle)
            bundle, num_bytes = [], 0
        bundle.append(unit)
        num_bytes += unit.num_bytes
    if bundle:
        yield tuple(bundle)
