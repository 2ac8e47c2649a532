"""Files that programs wrote and something has damaged: read as far as that makes sense, or refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixwright.data_mixing.entry_file import entry_path
from mixwright.data_mixing.errors import MixingError
from mixwright.data_mixing.journal import verify
from mixwright.data_mixing.manifest import MANIFEST
from mixwright.data_mixing.run_figures import RunFollower
from mixwright.data_mixing.run_status import entry_record, run_status
from mixwright.data_mixing.seal import Seal
from mixwright.data_mixing.service import is_watched_alive, read_record, service_status
from mixwright.data_mixing.snapshot import resume
from mixwright.data_mixing.store import TokenStore
from mixwright.launch.dashboard.panels import PANELS
from mixwright.launch.dashboard.run_view import RunView
from mixwright.launch.job_manifest import VARIABLE
from mixwright.launch.job_manifest import read_manifest as read_job_manifest
from mixwright.launch.metrics_endpoint import newest_step
from mixwright.pretrain.checkpoint import SEAL, Checkpoints, CheckpointSettings
from mixwright.pretrain.metrics import read_metrics
from mixwright.pretrain.ranks import Ranks
from mixwright.pretrain.records import read_record as read_result
from mixwright.pretrain.rpo.pair_files import read_manifest as read_pair_manifest
from tests.properties.effort import effort
from tests.properties.mutations import as_yaml, mutated, mutated_texts
from tests.properties.random_runs import make_log

SERVICE = {"state": "ready", "run": "exp", "host": "h", "pid": 7, "private": True, "watched": False,
           "address": "127.0.0.1:1", "actor": "mixing/exp", "token_path": "/t", "message": ""}  # fmt: skip
WATCHED = {"pid": os.getpid(), "started": "1", "alive": 1}
SEALED = {"run": "exp", "step": 5, "run_digest": "00ff", "weighting": {}, "num_ranks": 1, "zero_stage": 0, "files": {}}
JOB = {"stage": "pretrain", "run": "exp-1", "run_dir": "/r", "config": {"run": {"name": "x"}},
       "resources": {"ranks": 2}, "retries": 1, "stop_seconds": 9, "code": "c"}  # fmt: skip
COUNTS = {"num_documents": 3, "num_bytes": 9, "num_tokens": 9, "num_rows": 1, "num_tail_tokens": 1}
PAIRS = {"format_version": 1, "fingerprint": "f", "num_tokens": 9, "probes": {"tokens.bin": "p"},
         "splits": {"train": "a", "evaluation": "b"}, "counts": {}, "decided_by": {}}  # fmt: skip


def outcome(read: Callable[[], object]) -> MixingError | None:
    """How it was refused; None when it was read. Any error that is not ours is a failure of the test."""
    try:
        read()
    except MixingError as error:
        return error
    return None


def check_file(path: Path, seeds: list[Any], read: Callable[[], object], examples: int = 80) -> None:
    """`read` with mutations of `seeds` as the file at `path`: it may refuse, and changes nothing."""

    @given(mutated_texts(seeds))
    @effort(examples)
    def check(content: bytes) -> None:
        path.write_bytes(content)
        outcome(read)
        assert path.read_bytes() == content

    check()


def test_service_records(tmp_path: Path) -> None:
    def read() -> None:
        read_record(tmp_path)
        service_status(tmp_path)

    check_file(tmp_path / "service.json", [SERVICE], read)


def test_watched_trainers(tmp_path: Path) -> None:
    check_file(tmp_path / "service.watch", [WATCHED], lambda: is_watched_alive(tmp_path), 40)


def test_seals_of_the_order(tmp_path: Path) -> None:
    check_file(tmp_path / "sealed.json", [[7, 3], [0, -1]], lambda: Seal.read(tmp_path), 60)


def test_records_of_finished_runs(tmp_path: Path) -> None:
    check_file(tmp_path / "r.json", [{"loss": 1.0}], lambda: read_result(tmp_path / "r.json", "a run"), 40)


def test_seals_of_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000005"
    folder.mkdir()
    checkpoints = Checkpoints(tmp_path, CheckpointSettings("exp", 0, 2), Ranks(0, 1, torch.device("cpu"), None))
    check_file(folder / SEAL, [SEALED], lambda: checkpoints.find(lambda _: None))


def test_store_manifests(tiny_store: Path, tmp_path: Path) -> None:
    whole = json.loads((tiny_store / MANIFEST).read_text())
    for entry in tiny_store.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / MANIFEST).unlink()

    def read() -> None:
        store = TokenStore.open(tmp_path)
        for domain in store.domains():
            store.rows(domain.name, "train", 0, 1)

    check_file(tmp_path / MANIFEST, [whole], read)


def test_pair_manifests(tmp_path: Path) -> None:
    check_file(tmp_path / MANIFEST, [PAIRS], lambda: read_pair_manifest(tmp_path), 50)


@given(mutated_texts([JOB]))
@effort(60)
def test_job_manifests(content: bytes) -> None:
    refused = outcome(lambda: read_job_manifest({VARIABLE: content.decode("latin-1")}))
    assert refused is None or (refused.exit_code == 2 and VARIABLE in str(refused))


# --- metrics ----------------------------------------------------------------------------------------------------

STEPS = [{"kind": "step", "step": step, "loss": 2.0, "lr": 1e-3, "step_seconds": 0.1, "wait_seconds": 0.0,
          "grad_norm": 1.0} for step in range(3)]  # fmt: skip
WEIGHTS = {"kind": "weights", "step": 2, "effective_sample_size": 3.0, "correlation": 0.1,
           "weight_share": {"a": 0.5, "b": 0.5}, "token_share": {"a": 0.4, "b": 0.6},
           "histogram": {"edges": [0.5, 1.0], "counts": [1, 2, 3]}}  # fmt: skip
OTHERS = [
    {"kind": "evaluation", "step": 2, "accuracy": 0.5, "loss": {"a": 1.0}},
    {"kind": "train", "step": 2, "margin": 0.5},
    {"kind": "test", "step": 3, "loss": {"a": 2.0}, "perplexity": {"a": 7.4}},
    {"kind": "end", "step": 3, "reason": "complete"},
]


@st.composite
def metrics_files(draw: st.DrawFn) -> bytes:
    """A file of records with one of them changed or cut; most keep their `kind`, or nobody would look at the rest."""
    chance = random.Random(draw(st.integers(0, 2**32)))
    records: list[Any] = [dict(record) for record in [*STEPS, WEIGHTS, *OTHERS]]
    place = chance.randrange(len(records))
    kind = records[place]["kind"]
    changed = mutated({"rest": json.loads(json.dumps(records[place]))}, chance).get("rest")
    records[place] = {**{"kind": kind}, **changed} if isinstance(changed, dict) and chance.random() < 0.7 else changed
    lines = [json.dumps(record).encode() for record in records]
    if chance.random() < 0.2:
        lines[place] = b'{"kind": "step", "step": ' + chance.choice([b"[" * 3000, b"1", b"9" * 5000, b"\xff\xfe}"])
    return b"\n".join(lines) + chance.choice([b"\n", b"", b'\n{"kind": "st'])


@pytest.mark.parametrize("has_journal", [False, True])
def test_metrics_are_read_as_far_as_they_make_sense(has_journal: bool, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    if has_journal:
        (tmp_path / "journal").mkdir()
        for lsn, raw in enumerate(make_log(random.Random(5)).raw):
            entry_path(tmp_path / "journal", lsn).write_bytes(raw)

    @given(metrics_files())
    @effort(80)
    def check(content: bytes) -> None:
        path.write_bytes(content)
        view = RunView(tmp_path)
        while view.advance():
            pass
        for name, build in PANELS.items():
            view.panel(name, build)
        newest_step(path)
        assert all(isinstance(record["kind"], str) for record in read_metrics(tmp_path))

    check()


# --- the journal ------------------------------------------------------------------------------------------------


def test_entries_that_are_sealed_right_and_say_nonsense(tmp_path: Path) -> None:
    """What a program with a bug, or somebody with a hash function, could write: refused by its file, everywhere."""
    folder = tmp_path / "journal"
    folder.mkdir()
    raws = make_log(random.Random(3), max_changes=14).raw

    @given(st.integers(0, len(raws) - 1), st.integers(0, 2**32))
    @effort(250)
    def check(place: int, seed: int) -> None:
        for path in folder.iterdir():
            path.unlink()
        for lsn, raw in enumerate(raws[: place + 1]):
            entry_path(folder, lsn).write_bytes(raw if lsn < place else resealed(raw, random.Random(seed)))
        before = sorted(path.name for path in folder.iterdir())
        told = [outcome(lambda read=read: read(tmp_path)) for read in READERS]
        assert sorted(path.name for path in folder.iterdir()) == before
        for error in filter(None, told):
            assert "entry" in str(error) or ".json" in str(error), error

    check()


def resealed(raw: bytes, chance: random.Random) -> bytes:
    """An entry with something changed in it and the right hash for that."""
    entry = mutated({"entry": json.loads(raw)["entry"]}, chance).get("entry")
    payload = as_yaml(entry).encode("ascii") if chance.random() < 0.9 else b'{"body":' + b"[" * 3000 + b"}"
    return b'{"entry":' + payload + b',"hash":"' + hashlib.sha256(payload).hexdigest().encode() + b'"}\n'


def read_status(run_dir: Path) -> None:
    _, history = resume(run_dir / "journal", "reader")
    run_status(history)


def read_log(run_dir: Path) -> None:
    journal, _ = resume(run_dir / "journal", "reader")
    for entry in journal.poll():
        entry_record(entry)


def look(run_dir: Path) -> None:
    view = RunView(run_dir)
    while view.advance():
        pass
    for name, build in PANELS.items():
        view.panel(name, build)


READERS: list[Callable[[Path], object]] = [
    lambda run_dir: verify(run_dir / "journal"),
    lambda run_dir: RunFollower(run_dir / "journal").figures(),
    read_status,
    read_log,
    look,
]
