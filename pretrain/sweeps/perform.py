"""A proxy run is performed once: its record is a file named by its key, complete or absent, and is read ever after."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mixwright.data_mixing.config_file import validate
from mixwright.data_mixing.errors import DataError
from mixwright.data_mixing.store import TokenStore
from mixwright.pretrain.proxy import ProxyRecord, ProxyRun, run_key, train_proxy
from mixwright.pretrain.records import read_record
from mixwright.pretrain.sweeps.doge import DogeRun, train_doge

Execute = Callable[[Sequence[ProxyRun]], list[ProxyRecord]]
"""Performs runs, in whatever order and however many at a time; records in the order of the runs."""


def find_record(run: ProxyRun, folder: Path, fingerprint: str) -> ProxyRecord | None:
    """The record of a finished run, None when there is none; raises ConfigError for a file that is none."""
    path = folder / f"{run_key(run, fingerprint)}.json"
    tree = read_record(path, "a run")
    return None if tree is None else validate(ProxyRecord, {**tree, "run": run}, str(path))


def perform(run: ProxyRun, folder: Path, num_threads: int = 1) -> ProxyRecord:
    """The record of `run`: read from `folder` when it is there, else trained for and written.

    Raises what training raises; nothing is left behind then.
    """
    store = TokenStore.open(run.store)
    found = find_record(run, folder, store.fingerprint)
    if found is not None:
        return found
    torch.set_num_threads(num_threads)
    record = train_doge(run, store) if isinstance(run, DogeRun) else train_proxy(run, store)
    _write(folder / f"{record.key}.json", record.model_dump_json(indent=1))
    return record


def in_process(folder: Path) -> Execute:
    """One run after the other, in this process."""
    return lambda runs: [perform(run, folder) for run in runs]


def _write(path: Path, text: str) -> None:
    # Two processes may perform the same run: each writes a file of its own, the last one stays.
    part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written: {error.strerror}") from None
