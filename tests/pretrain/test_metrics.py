from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from mixwright.data_mixing.config_file import validate
from mixwright.data_mixing.errors import ConfigError
from mixwright.pretrain.config import MetricsConfig, WandbConfig
from mixwright.pretrain.errors import TrainingError
from mixwright.pretrain.metric_sinks import WANDB_ID
from mixwright.pretrain.metrics import MetricWriter, read_metrics
from mixwright.pretrain.rpo.config import RpoMetricsConfig

SECRET = "5ec2e7" * 8
OFFLINE = WandbConfig(project="small", mode="offline")


def test_a_line_cut_by_a_kill_costs_only_itself(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, tensorboard=False) as metrics:
        metrics.write("step", 1, {"lr": 0.1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    with MetricWriter(tmp_path, tensorboard=False) as metrics:
        metrics.write("step", 2, {"lr": 0.2})
    assert [(record["step"], record["lr"]) for record in read_metrics(tmp_path)] == [(1, 0.1), (2, 0.2)]


def test_a_step_that_was_done_again_counts_as_done_last(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, tensorboard=False) as metrics:
        for step, lr in ((1, 0.1), (2, 0.2), (3, 0.3), (2, 0.9)):
            metrics.write("step", step, {"lr": lr})
    assert [(record["step"], record["lr"]) for record in read_metrics(tmp_path)] == [(1, 0.1), (2, 0.9), (3, 0.3)]


def test_numbers_reach_tensorboard_by_kind_and_domain(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricWriter(tmp_path, tensorboard=True) as metrics:
        metrics.write("train", 5, {"overall": 1.5, "loss": {"code": 2.5}, "run_digest": "00"})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["train/loss/code", "train/overall"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss/code")] == [(5, 2.5)]


class StandIn(ModuleType):
    """In place of the package `wandb`: keeps what it is told, fails when it is told to."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.began: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.failure: Exception | None = None
        self.is_finished = False

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **arguments: Any) -> SimpleNamespace:
        if self.failure is not None:
            raise self.failure
        self.began.append(arguments)
        return SimpleNamespace(define_metric=lambda *_, **__: None, log=self.log, finish=self.finish)

    def log(self, values: dict[str, Any]) -> None:
        if self.failure is not None:
            raise self.failure
        self.logged.append(values)

    def finish(self) -> None:
        self.is_finished = True


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The rules that do not depend on the package are tested on a stand-in; the package itself below."""
    module = StandIn()
    module.__spec__ = SimpleNamespace(name="wandb")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_resumed_run_goes_on_in_the_same_run_with_its_configuration(tmp_path: Path, stand_in: StandIn) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"optimizer": {"lr": 0.1}}))
    for step in (7, 5):
        with MetricWriter(tmp_path, tensorboard=False, wandb=OFFLINE) as metrics:
            metrics.write("train", step, {"overall": 1.5, "loss": {"code": 2.5}, "run_digest": "00"})
            metrics.write("note", step, {"text": "no number"})
    first, second = stand_in.began
    assert first["id"] == second["id"] == (tmp_path / WANDB_ID).read_text()
    assert (first["config"], first["mode"], first["project"]) == ({"optimizer": {"lr": 0.1}}, "offline", "small")
    assert stand_in.logged == [
        {"step": step, "train/overall": 1.5, "train/loss/code": 2.5} for step in (7, 5)
    ]  # fmt: skip
    assert stand_in.is_finished


def test_a_start_that_fails_is_one_line_and_a_later_failure_ends_nothing(tmp_path: Path, stand_in: StandIn) -> None:
    stand_in.failure = RuntimeError("api_key not configured\n(no-tty)")
    with pytest.raises(TrainingError, match=r"does not start: api_key not configured \(no-tty\)$"):
        MetricWriter(tmp_path, tensorboard=False, wandb=OFFLINE)
    stand_in.failure = None
    with MetricWriter(tmp_path, tensorboard=False, wandb=OFFLINE) as metrics:
        stand_in.failure = OSError("disk full")
        metrics.write("step", 1, {"lr": 0.1})
        stand_in.failure = None
        metrics.write("step", 2, {"lr": 0.2})
    assert stand_in.logged == []
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TrainingError, match=r"metrics\.wandb: the package `wandb` is not installed: pip install"):
        MetricWriter(tmp_path, tensorboard=False, wandb=OFFLINE)


@pytest.mark.parametrize("model", [MetricsConfig, RpoMetricsConfig])
def test_a_key_is_no_setting_and_is_not_repeated_in_the_error(model: type) -> None:
    assert validate(model, {"wandb": {"project": "p", "mode": "offline"}}, "run").wandb.entity is None
    with pytest.raises(ConfigError, match=r"wandb\.api_key: unknown key") as refused:
        validate(model, {"wandb": {"project": "p", "api_key": SECRET}}, "run")
    assert SECRET not in str(refused.value)


def test_the_package_itself_records_offline_and_the_key_is_written_nowhere(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"optimizer": {"lr": 0.1}}))
    code = (
        "import sys; from pathlib import Path\n"
        "from mixwright.pretrain.config import WandbConfig\n"
        "from mixwright.pretrain.metrics import MetricWriter\n"
        "with MetricWriter(Path(sys.argv[1]), False, WandbConfig(project='small', mode='offline')) as metrics:\n"
        "    for step in (1, 2): metrics.write('train', step, {'overall': 1.5, 'loss': {'code': 2.5}})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=180, check=False,
        env=os.environ | {"WANDB_API_KEY": SECRET},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (recorded,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    identity = (tmp_path / WANDB_ID).read_text()
    assert recorded.name == f"run-{identity}.wandb"
    data = recorded.read_bytes()
    assert data.count(b"train/loss/code") >= 2
    assert b"optimizer" in data
    written = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert (written, SECRET in done.stdout + done.stderr) == ([], False)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
