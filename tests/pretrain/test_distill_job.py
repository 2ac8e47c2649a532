"""Students as whole jobs: prepared once, trained on any launcher, resumed; what does not fit is refused first."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixwright.data_mixing.errors import ConfigError
from mixwright.launch.console import RunConsole
from mixwright.launch.distill import student_run
from mixwright.launch.distill_commands import prepare_from
from mixwright.pretrain.ensemble.member import Member
from tests.pretrain.jobs import BIN, ROOT, digests, finish, history_of, metrics, wait_for_step
from tests.pretrain.tiny import tiny_tree


def write_distillation(folder: Path, store: Path, members: list[Member], **changes: Any) -> Path:
    run = tiny_tree(folder / "runs", store, run__name="student", training__num_steps=12)
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    tree: dict[str, Any] = {
        "run": "run.yaml",
        "folder": str(folder / "teachers"),
        "teachers": [str(member.folder) for member in members],
        "calibration_rows_per_domain": 8,
        "samples": {"num_rows": 24, "share": 0.5, "batch_rows": 8},
        "logits": {"share": 0.8, "top_k": 8},
        **changes,
    }
    path = folder / "distill.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(config: Path, *launcher: str, script: str = "distill.py") -> subprocess.Popen[str]:
    command = [*(launcher or [sys.executable]), str(ROOT / "launch" / script), "--config", str(config)]
    environment = {
        **os.environ, "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def train(config: Path, *launcher: str) -> str:
    code, output = finish(start(config, *launcher))
    assert code == 0, output[-3000:]
    return output


def prepare(config: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "mixwright"), "distill", "prepare", str(config)],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


def last_test_losses(run_dir: Path) -> dict[str, float]:
    last: dict[str, float] = metrics(run_dir, "test")[-1]["loss"]
    return last


def test_a_student_of_samples_and_cached_logits_is_killed_and_goes_on_as_if_it_had_not_been(
    members: list[Member], tiny_store: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    config = write_distillation(whole, tiny_store, members)
    output = train(config)
    assert "temperature of the teachers on the validation split" in output
    run_dir = whole / "runs" / "student"
    shares = history_of(run_dir).genesis.domains
    assert [domain.name for domain in shares] == ["letters", "numbers", "colours", "synthetic"]
    last = metrics(run_dir, "train")[-1]["loss"]
    assert "synthetic" in last
    cut = tmp_path / "cut"
    cut.mkdir()
    config = write_distillation(cut, tiny_store, members)
    job = start(config)
    wait_for_step(cut / "runs" / "student", 6, job)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    samples = {path: path.stat().st_mtime_ns for path in (cut / "teachers").rglob("*.npy")}
    assert "resuming after step" in train(config)
    assert {path: path.stat().st_mtime_ns for path in (cut / "teachers").rglob("*.npy")} == samples
    assert digests(cut / "runs" / "student") == digests(run_dir)
    again = last_test_losses(cut / "runs" / "student")
    assert again == pytest.approx(last_test_losses(run_dir), rel=1e-6)


ONLINE: dict[str, Any] = {"samples": None, "logits": {"share": 0.8, "temperature": 2.0}}


@pytest.fixture(scope="module")
def alone(members: list[Member], tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Test losses of a student on one rank, with teachers that are run."""
    folder = tmp_path_factory.mktemp("alone")
    train(write_distillation(folder, tiny_store, members[:2], **ONLINE))
    return last_test_losses(folder / "runs" / "student")


@pytest.mark.parametrize(
    ("launcher", "zero_stage"),
    [
        (("accelerate", "launch", "--use_deepspeed", "--num_processes", "2", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port"), 0),
        (("deepspeed", "--num_gpus", "2", "--master_port"), 3),
    ],
    ids=["accelerate", "deepspeed-zero-3"],
)  # fmt: skip
def test_two_ranks_learn_what_one_learns(
    members: list[Member],
    tiny_store: Path,
    tmp_path: Path,
    alone: dict[str, float],
    launcher: tuple[str, ...],
    zero_stage: int,
) -> None:
    config = write_distillation(tmp_path, tiny_store, members[:2], **ONLINE)
    tree = yaml.safe_load((tmp_path / "run.yaml").read_text())
    tree["training"]["zero_stage"] = zero_stage
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    done = prepare(config)
    assert done.returncode == 0, done.stderr
    output = train(config, str(BIN / launcher[0]), *launcher[1:], str(29700 + os.getpid() % 200))
    assert f"2 rank(s), ZeRO {zero_stage}" in output
    assert last_test_losses(tmp_path / "runs" / "student") == pytest.approx(alone, rel=2e-4)


def test_several_ranks_ask_for_what_one_process_makes(
    members: list[Member], tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    code, output = finish(start(write_distillation(tmp_path, tiny_store, members)))
    assert code == 2
    assert "run `mixwright distill prepare" in output
    assert "Traceback" not in output


def test_several_ranks_train_what_was_prepared_or_say_what_differs(
    members: list[Member], tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    console = RunConsole(quiet=True)
    config = write_distillation(tmp_path, tiny_store, members[:1], **ONLINE, teacher_temperature=1.0)
    prepare_from(config, [], console)
    run = student_run(config, [], console)
    assert run.distillation is not None
    assert run.distillation.share == 0.8

    def refusal(*overrides: str) -> str:
        with pytest.raises(ConfigError) as refused:
            student_run(config, overrides, console)
        return str(refused.value)

    other = refusal("logits.share=0.5")
    assert "from other settings (distillation.logits.share: 0.8 there, 0.5 here)" in other
    command = re.findall("`(.*)`", other)[0]
    assert command == f"mixwright distill prepare {config} logits.share=0.5"
    subprocess.run([BIN / "mixwright", *command.split()[1:]], check=True, capture_output=True, timeout=200)
    assert student_run(config, ["logits.share=0.5"], console).distillation.share == 0.5  # type: ignore[union-attr]
    tree = yaml.safe_load((tmp_path / "run.yaml").read_text())
    tree["optimizer"]["lr"] = 0.5
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    assert "run.optimizer.lr: 0.01 there, 0.5 here" in refusal("logits.share=0.5")
    (tmp_path / "teachers" / "student.source.json").unlink()
    assert "not prepared, or not to the end: run `mixwright distill prepare" in refusal()


def test_what_does_not_go_together_is_refused_before_training(
    members: list[Member], tiny_store: Path, tmp_path: Path
) -> None:
    config = write_distillation(tmp_path, tiny_store, members)
    tree = yaml.safe_load(config.read_text())

    def refusal(**changes: Any) -> str:
        config.write_text(yaml.safe_dump({**tree, **changes}))
        done = prepare(config)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "nowhere: holds no model" in refusal(teachers=[str(tmp_path / "nowhere")])
    assert "give `samples`, `logits` or both" in refusal(samples=None, logits=None)
    assert "a cache holds predictions at temperature 1" in refusal(logits={"top_k": 4, "temperature": 2.0})
    assert "top_k is 5000, expected 1 to the vocabulary" in refusal(logits={"top_k": 5000})
    assert "unknown key" in refusal(sample={"num_rows": 4})
    other = tmp_path / "other"
    other.mkdir()
    for path in members[0].folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    teachers = [str(members[0].folder), str(other)]
    assert "have different tokenizers" in refusal(teachers=teachers)
    assert not (tmp_path / "teachers" / "student.yaml").exists()
