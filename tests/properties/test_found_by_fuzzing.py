"""Inputs that once ended in a traceback, a wrong record or a blown-up process, each as small as it gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.config_file import load_config, set_override
from mixwright.data_mixing.errors import ConfigError, DataError, JournalError, MixingError, PolicyRejected
from mixwright.data_mixing.manifest import read_manifest
from mixwright.data_mixing.seal import Seal
from mixwright.data_mixing.worlds import World
from mixwright.launch.dashboard.metrics_view import MetricsView
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
