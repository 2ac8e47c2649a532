"""`mixwright ensemble` as a user types it: real runs in processes of their own, killed and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixwright.launch import training_runs
from mixwright.launch.training_runs import ATTEMPTS, Launch, find_result, perform_run, with_absolute_paths
from mixwright.pretrain.ensemble.config import ResourcesConfig, Runs, load_ensemble_config
from mixwright.pretrain.ensemble.member import Member, inspect_member
from mixwright.pretrain.errors import TrainingError
from tests.pretrain.jobs import BIN, history_of
from tests.pretrain.tiny import tiny_config, tiny_tree

TIMEOUT_S = 280.0


def write_ensemble(folder: Path, store: Path, **changes: Any) -> Path:
    run = tiny_tree(folder / "unused", store, training__num_steps=12)
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    tree: dict[str, Any] = {
        "run": "run.yaml",
        "folder": str(folder / "ensemble"),
        "recipe": {"lr": 3e-3, "weight_decay": 0.8, "epochs": 0.1},
        "tune": {"lr": [3e-3], "weight_decay": [0.1, 0.8], "epochs": [0.1]},
        "members": {"recipe": "given", "epochs_factor": 2, "decay_factor": 0.5},
        **changes,
    }
    path = folder / "ensemble.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(BIN / "mixwright"), "ensemble", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip


def done(*arguments: str) -> tuple[int, str, str]:
    process = start(*arguments)
    output, errors = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, output, errors


def await_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.is_file() and f'"kind": "step", "step": {step},' in metrics.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def trainers_of(folder: Path) -> list[int]:
    """Processes that train a run below `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        if any(word.endswith("launch/pretrain.py") for word in words) and any(str(folder) in word for word in words):
            found.append(int(path.parent.name))
    return found


def test_a_killed_command_leaves_no_run_behind_and_the_same_one_ends_the_work(tiny_store: Path, tmp_path: Path) -> None:
    config = write_ensemble(tmp_path, tiny_store)
    command = ("train", str(config), "--members", "2", "--workers", "0")
    members = tmp_path / "ensemble" / "members"
    process = start(*command)
    await_step(members / "member-1", 6)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 30
    while trainers_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert trainers_of(tmp_path) == []
    assert history_of(members / "member-0").end is not None
    assert history_of(members / "member-1").end is None
    before = {path: path.stat().st_mtime_ns for path in (members / "member-0").rglob("*") if path.is_file()}
    code, output, errors = done(*command)
    assert code == 0, errors
    assert "1/1 member-1" in output
    after = {path: path.stat().st_mtime_ns for path in (members / "member-0").rglob("*") if path.is_file()}
    assert {path: when for path, when in after.items() if "journal" not in path.parts} == {
        path: when for path, when in before.items() if "journal" not in path.parts
    }
    assert "resuming after step" in (members / "member-1" / "log.txt").read_text()
    first, second = (inspect_member(members / f"member-{number}") for number in range(2))
    assert first.origin != second.origin
    assert first.fingerprint != second.fingerprint


def test_a_lost_worker_restarts_its_own_member_alone(tiny_store: Path, tmp_path: Path) -> None:
    config = write_ensemble(tmp_path, tiny_store)
    members = tmp_path / "ensemble" / "members"
    process = start("train", str(config), "--members", "2", "--workers", "2")
    await_step(members / "member-0", 5)
    victims = [pid for pid in trainers_of(tmp_path) if str(members / "member-0") in _command_of(pid)]
    os.kill(victims[0], signal.SIGKILL)
    output, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors
    assert "resuming after step 4" in (members / "member-0" / "log.txt").read_text()
    assert "resuming" not in (members / "member-1" / "log.txt").read_text()
    assert output.index("members (nats per token)") > 0


def test_tuning_ends_in_a_certificate_that_is_read_again(tiny_store: Path, tmp_path: Path) -> None:
    config = write_ensemble(tmp_path, tiny_store)
    code, output, errors = done("tune", str(config), "--workers", "0")
    assert code == 0, errors
    assert "certificate: none of the 1 neighbours on the grid is better" in output
    assert "at the edge of the grid: weight_decay" in output
    record = json.loads((tmp_path / "ensemble" / "tuning.json").read_text())
    losses = [point["loss"] for point in record["points"]]
    assert losses[0] <= losses[1]
    _, base = load_ensemble_config(config)
    steps = [json.loads(line) for line in (Path(record["points"][0]["folders"][0]) / "metrics.jsonl").open()]
    assert [line["step"] for line in steps if line["kind"] == "validation"][-1] == max(line["step"] for line in steps)
    began = time.monotonic()
    code, again, _ = done("tune", str(config), "--workers", "0")
    assert code == 0
    assert time.monotonic() - began < 60
    assert again.splitlines()[-8:] == output.splitlines()[-8:]
    assert base.run.name == "tiny"


def test_members_vary_in_order_in_parameters_or_in_both(tiny_store: Path, tmp_path: Path) -> None:
    seeds = {}
    for vary in ("both", "order", "init"):
        config = write_ensemble(tmp_path, tiny_store, members={"recipe": "given", "vary": vary, "first_seed": 4})
        settings, base = load_ensemble_config(config)
        from mixwright.data_mixing.store import TokenStore

        runs = Runs(base, TokenStore.open(tiny_store), settings.warmup_share)
        made = [runs.member(settings.recipe, tmp_path, number, settings.members).run for number in range(3)]
        seeds[vary] = [(run.seed, run.seed_of_parameters) for run in made]
    assert seeds["both"] == [(4, 4), (5, 5), (6, 6)]
    assert seeds["order"] == [(4, 4), (5, 4), (6, 4)]
    assert seeds["init"] == [(4, 4), (4, 5), (4, 6)]


def test_a_run_that_diverges_is_a_result_and_one_that_cannot_start_is_an_error(
    tiny_store: Path, tmp_path: Path
) -> None:
    wild = tiny_config(tmp_path, tiny_store, run__name="wild", optimizer__lr=1e30)
    result = perform_run(Launch(wild, ResourcesConfig()))
    assert result.validation == float("inf")
    assert find_result(wild) is not None
    missing = tiny_config(tmp_path, tmp_path / "nowhere", run__name="missing")
    with pytest.raises(TrainingError, match=r"run .*missing ended with exit code 2: error: .*nowhere"):
        perform_run(Launch(missing, ResourcesConfig()))


@pytest.mark.parametrize(
    ("ranks", "code", "attempts"), [(1, 70, 1), (1, 1, 1), (2, 1, ATTEMPTS), (1, 75, ATTEMPTS), (1, -9, ATTEMPTS)]
)
def test_a_run_that_breaks_has_not_diverged(
    ranks: int, code: int, attempts: int, tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The codes are those of real processes, the processes are not: torchrun makes 1 of every code of a rank."""
    config, codes = tiny_config(tmp_path, tiny_store), [code] * attempts
    monkeypatch.setattr(training_runs, "_train", lambda launch: codes.pop())
    with pytest.raises(TrainingError, match=f"exit code {code}" if attempts == 1 else f"not end in {ATTEMPTS} att"):
        perform_run(Launch(config, ResourcesConfig(ranks=ranks, cpus=ranks)))
    assert not codes
    assert find_result(config) is None


def test_runs_are_sent_with_paths_that_hold_anywhere(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    teachers = {"teachers": ["members/a", "members/b"], "cache": "cache"}
    config = tiny_config(
        Path("runs"), Path("store"), run__name="one", **{f"distillation__{k}": v for k, v in teachers.items()}
    )
    sent = with_absolute_paths(config)
    assert sent.run_dir == tmp_path / "runs" / "one"
    assert sent.data.store == tmp_path / "store"
    assert sent.distillation is not None
    assert sent.distillation.teachers == (tmp_path / "members" / "a", tmp_path / "members" / "b")
    assert sent.distillation.cache == tmp_path / "cache"
    assert sent.model_copy(update={k: getattr(config, k) for k in ("run", "data", "distillation")}) == config


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (("tune",), {"recipe": {"lr": 1.0, "weight_decay": 0.8, "epochs": 0.1}}, "recipe.lr = 1 is not in tune.lr"),
        (("tune",), {"recipe": {"lr": 3e-3, "epochs": 0.1}}, "exactly one of weight_decay and decay_time_epochs"),
        (("tune",), {"tune": {"lr": [3e-3, 1e-3]}}, "values of a grid must increase"),
        (("train",), {"members": {"recipe": "tuned"}}, "run `mixwright ensemble tune` first"),
        (("train",), {"run": "rum.yaml"}, "rum.yaml: no such file"),
        (("train",), {"member": {}}, "unknown key; did you mean 'members'"),
    ],
)
def test_mistakes_are_one_line(
    tiny_store: Path, tmp_path: Path, arguments: tuple[str, ...], changes: dict[str, Any], message: str
) -> None:
    config = write_ensemble(tmp_path, tiny_store, **changes)
    code, _, errors = done(*arguments, str(config), "--workers", "0")
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors


def test_members_are_evaluated_extrapolated_and_refused_as_a_soup(
    members: list[Member], tiny_store: Path, tmp_path: Path
) -> None:
    folder = str(members[0].folder.parent)
    rows = ("--rows", "8", "--calibration-rows", "8")
    code, output, errors = done("eval", folder, "--store", str(tiny_store), *rows, "--out", str(tmp_path / "e"))
    assert code == 0, errors
    assert [line.split("│")[1].strip() for line in output.splitlines() if line.startswith("│ ")] == ["1", "2", "3"] * 2
    standard = ("--standard", "1e4=5.5", "--standard", "2e4=5.2", "--standard", "4e4=5.0", "--tokens", "1e4")
    code, output, errors = done("scaling", str(tmp_path / "e"), *standard, "--out", str(tmp_path / "s.png"))
    assert code == 0, errors
    assert "3 points for three parameters: the exponent is not to be trusted" in output
    assert "as the standard recipe with" in output or "with any amount of text" in output
    assert (tmp_path / "s.png").stat().st_size > 10_000
    code, _, errors = done("eval", folder, "--store", str(tiny_store), "--k", "9")
    assert (code, "--k 9: only 3 members" in errors) == (2, True)
    code, _, errors = done("soup", folder, "--store", str(tiny_store), "--out", str(tmp_path / "soup"))
    assert (code, "began from different parameters" in errors) == (2, True)
    assert not (tmp_path / "soup").exists()
    code, _, errors = done("eval", folder, "--store", str(tiny_store), "--pooling", "logit")
    assert (code, "did you mean 'logits'" in errors) == (2, True)


def _command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode()
