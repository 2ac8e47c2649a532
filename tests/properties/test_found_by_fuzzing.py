"""Inputs that once ended in a traceback, a wrong record or a blown-up process, each as small as it gets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.config_file import MAX_MISTAKES, load_config, set_override
from mixwright.data_mixing.entries import Commit, Genesis, Report
from mixwright.data_mixing.entry_file import read_entry
from mixwright.data_mixing.errors import (
    ConfigError,
    DataError,
    JournalError,
    MixingError,
    PlanMismatch,
    PolicyRejected,
)
from mixwright.data_mixing.manifest import read_manifest
from mixwright.data_mixing.seal import Seal
from mixwright.data_mixing.service import WATCH, is_watched_alive
from mixwright.data_mixing.worlds import World
from mixwright.launch.dashboard.metrics_view import MetricsView
from mixwright.launch.dashboard.panels import PANELS
from mixwright.launch.dashboard.run_view import RunView
from mixwright.launch.dashboard.tails import records
from mixwright.launch.job_manifest import VARIABLE
from mixwright.launch.job_manifest import read_manifest as read_job_manifest
from mixwright.pretrain.checkpoint import Checkpoints, CheckpointSettings
from mixwright.pretrain.metrics import read_metrics
from mixwright.pretrain.ranks import Ranks
from mixwright.pretrain.records import read_record
from mixwright.pretrain.rpo.config import ObjectiveConfig
from tests.data_mixing.run_cases import TrainerSide, genesis
from tests.properties.commands import mixwright

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "text", ["a: 2001-99-99", "[" * 3000, "a: " + "9" * 5000, 'a: "\\0"', 'a: "\\ud800"', "a: 1\na: 2"]
)
def test_yaml_that_is_no_configuration(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml: not valid YAML"):
        load_config(World, path)
    with pytest.raises(ConfigError, match="the value is not valid YAML"):
        set_override({}, "k={" + text.replace("\n", ", ") + "}")


def test_a_preset_that_is_no_name() -> None:
    with pytest.raises(ValueError, match="preset"):
        ObjectiveConfig.model_validate({"preset": ["liu2024"]})


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("name", "text", "read", "error"),
    [
        ("sealed.json", "3", Seal.read, JournalError),
        ("sealed.json", "[1e999, 1]", Seal.read, JournalError),
        ("sealed.json", DEEP, Seal.read, JournalError),
        ("manifest.json", DEEP, read_manifest, DataError),
        ("record.json", DEEP, lambda folder: read_record(folder / "record.json", "a run"), ConfigError),
        ("x", "", lambda folder: read_job_manifest({VARIABLE: DEEP}), ConfigError),
    ],
)
def test_records_that_are_no_records(
    name: str, text: str, read: Callable[[Path], Any], error: type[MixingError], tmp_path: Path
) -> None:
    with pytest.raises(error):
        read(write(tmp_path, name, text))


@pytest.mark.parametrize("seal", ["[]", '{"files": []}', '{"files": {}}', '{"files": {}, "step": "x"}', DEEP])
def test_a_seal_that_is_no_seal_is_a_damaged_checkpoint(seal: str, tmp_path: Path) -> None:
    (tmp_path / "step-00000003").mkdir()
    write(tmp_path / "step-00000003", "sealed.json", seal)
    told: list[str] = []
    checkpoints = Checkpoints(tmp_path, CheckpointSettings("exp", 0, 2), Ranks(0, 1, torch.device("cpu"), None))
    assert checkpoints.find(told.append) is None
    assert "step-00000003 is damaged" in told[0]


def test_metrics_of_any_shape(tmp_path: Path) -> None:
    lines = [b"3", b"[]", b"{}", b'{"kind": "step"}', b'{"kind": 7, "step": 1}', b"\xff", DEEP.encode()]
    lines += [b'{"kind": "step", "step": %s, "lr": %s}' % (step, b"9" * 400) for step in (b"2", b"-1", b"9" * 30)]
    lines += [b'{"kind": "weights", "step": 3, "weight_share": %s, "histogram": %s}' % (odd, odd) for odd in
              (b"3", b'["a"]', b'{"edges": 1}', b'{"edges": [[1]], "counts": 2}', b"null")]  # fmt: skip
    lines += [b'{"kind": "weights", "step": 4, "weight_share": {"a": {"b": 1}}, "token_share": 7}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    assert [(record["kind"], record["step"]) for record in read_metrics(tmp_path)][:2] == [("step", -1), ("step", 2)]
    view = MetricsView(tmp_path, with_figures=True)
    while view.advance():
        pass
    assert view.num_steps_read == 1
    assert [record["step"] for record in records(lines, ("step",))] == [2]


def test_an_error_obeys_nobody_and_fills_no_screen(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({"\u009b2J\u202e" + "x" * 9000: 1, **{f"k{i}": 1 for i in range(300)}}))
    ended = mixwright("config", "check", str(path))
    assert ended.code == 2
    assert "\u009b" not in ended.errors
    assert "\u202e" not in ended.errors
    assert len(ended.errors.splitlines()) <= 52
    assert max(map(len, ended.errors.splitlines())) < 2100


def test_half_a_surrogate_pair_is_printed_as_an_escape_and_taken_in_no_policy(tmp_path: Path) -> None:
    with pytest.raises(PolicyRejected, match="expected plain text"):
        accept({"kind": "static", "mixture": {"code": 1}, "why": "\ud800"}, genesis())
    from mixwright.data_mixing.entries import Cancel

    trainer = TrainerSide(tmp_path / "exp")
    trainer.journal.append(Cancel.model_construct(policy_lsn=2, author="", why="x", request_id=""))
    ended = mixwright("mix", "log", "--json", "--run", str(tmp_path / "exp"))
    assert ended.code in (0, 2)


@pytest.mark.parametrize("pid", [2**53 + 1, 10**30, -(10**30)])
def test_a_process_number_that_no_process_has_is_no_trainer(pid: int, tmp_path: Path) -> None:
    write(tmp_path, WATCH, json.dumps({"pid": pid, "started": "1", "alive": 1}))
    assert not is_watched_alive(tmp_path)


def test_a_policy_with_hundreds_of_mistakes_is_refused_with_the_first_of_them() -> None:
    document = {"kind": "keep", "loss_weighting": {"strategy": "linupper", "r": ["x"] * 300}}
    with pytest.raises(PolicyRejected, match=r"\d+ further mistakes") as told:
        accept(document, genesis())
    assert str(told.value).count("TemperaturePoint") <= 2 * MAX_MISTAKES
    assert len(str(told.value)) < 10_000


@pytest.mark.parametrize(
    ("change", "said"),
    [(lambda tree: tree.update(rows_per_file=10**30), "rows_per_file"),
     (lambda tree: tree["domains"][0]["splits"].pop("train"), "split 'train' is missing"),
     (lambda tree: tree["domains"][0]["splits"]["train"].update(num_rows=10**30), "num_rows")],
)  # fmt: skip
def test_a_manifest_without_a_split_or_with_numbers_beyond_all_files(
    change: Callable[[Any], Any], said: str, tiny_store: Path, tmp_path: Path
) -> None:
    tree = json.loads((tiny_store / "manifest.json").read_text())
    change(tree)
    with pytest.raises(DataError, match=said):
        read_manifest(write(tmp_path, "manifest.json", json.dumps(tree)))


def test_a_commit_of_another_state_is_named_as_an_entry() -> None:
    from mixwright.data_mixing.history import CommitRecord, check_digest
    from tests.data_mixing.plan_cases import CommittedPolicy, Plan, policy

    plan = Plan(genesis(), [CommittedPolicy(0, 2, policy([1] * len(genesis().domains)))])
    with pytest.raises(PlanMismatch, match="the COMMIT entry of policy 2 at step 0 recorded plan state '%s%n"):
        check_digest(plan, CommitRecord(policy_lsn=2, effective_step=0, plan_digest="%s%n{0}{{x}}"))


@pytest.mark.parametrize("field", ["num_tokens", "num_rows"])
def test_counts_that_no_array_holds_are_no_report(field: str) -> None:
    loss = {"loss_sum": 1.0, "loss_square_sum": 1.0, "num_tokens": 1, "num_rows": 1, field: 10**400}
    with pytest.raises(ValueError, match=field):
        Report.model_validate({"kind": "train", "first_step": 0, "last_step": 9, "domains": {"a": loss}, "attempt": 0})


@pytest.mark.parametrize("field", ["rows_per_step", "sequence_length", "num_steps"])
def test_a_run_of_a_size_that_no_number_holds_is_none(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Genesis.model_validate({**genesis().model_dump(mode="json"), field: 10**400})


def test_a_step_that_no_array_holds_is_no_commit() -> None:
    with pytest.raises(ValueError, match="effective_step"):
        Commit(policy_lsn=2, effective_step=2**63, plan_digest="")


def test_an_entry_at_no_time_is_refused_by_its_file(tmp_path: Path) -> None:
    payload = b'{"body":{"held":true},"lsn":0,"prev":"","time":"1e400","type":"PAUSE","writer":"x"}'
    raw = b'{"entry":%s,"hash":"%s"}\n' % (payload, hashlib.sha256(payload).hexdigest().encode())
    (tmp_path / "00000000.json").write_bytes(raw)
    with pytest.raises(JournalError, match=r"00000000\.json: is not a journal entry: .*time inf is no time"):
        read_entry(tmp_path, 0, None)


def test_a_test_and_an_end_without_finite_figures_are_shown(tmp_path: Path) -> None:
    lines = [{"kind": "test", "step": 3, "perplexity": {"a": float("nan")}},
             {"kind": "end", "step": 3, "peak_memory_bytes": float("inf")}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    view = RunView(tmp_path)
    while view.advance():
        pass
    built = {name: json.loads(view.panel(name, build)[1]) for name, build in PANELS.items()}
    assert built["summary"]["tests"][0]["perplexity"] == {"a": None}
    assert built["throughput"]["peak_memory_bytes"] is None
