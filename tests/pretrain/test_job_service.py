"""The job with its surroundings: a policy submitted through Ray, Ray that cannot start, full disks, no compiler."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixwright.data_mixing.entries import Checkpoint
from tests.pretrain.jobs import (
    digests,
    finish,
    history_of,
    metrics,
    mixwright,
    run_job,
    start_job,
    wait_for_step,
    write_config,
)
from tests.pretrain.tiny import tiny_tree


@pytest.mark.ray
def test_a_policy_submitted_to_a_running_job_takes_effect_without_a_restart(tiny_store: Path, tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path, tiny_store, training__num_steps=100_000, mixing__service="required")
    config, run_dir = write_config(tmp_path, tree), tmp_path / "tiny"
    policy = tmp_path / "policy.yaml"
    policy.write_text("kind: static\nmixture: {numbers: 1}\n")
    job = start_job(config)
    wait_for_step(run_dir, 5, job)
    submitted = mixwright("mix", "submit", str(policy), "--run", str(run_dir), "--why", "only numbers", "--wait")
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    refused = tmp_path / "refused.yaml"
    refused.write_text("kind: static\nmixture: {number: 1}\n")
    rejected = mixwright("mix", "submit", str(refused), "--run", str(run_dir))
    assert rejected.returncode == 2
    assert "did you mean 'numbers'?" in rejected.stdout + rejected.stderr
    effective_step = history_of(run_dir).commits[1].effective_step
    assert str(effective_step) in submitted.stdout
    wait_for_step(run_dir, effective_step + 30, job)
    job.send_signal(signal.SIGINT)
    code, output = finish(job)
    assert code == 75, output[-3000:]
    history = history_of(run_dir)
    late = [r for r in history.reports if r.kind == "train" and r.first_step >= effective_step]
    assert late
    assert {name for report in late for name in report.domains} == {"numbers"}
    assert history.commits[1].policy.why == "only numbers"


def test_training_goes_on_when_ray_cannot_be_reached(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    config = write_config(tmp_path, tiny_tree(tmp_path, tiny_store, mixing__service="auto"))
    run_job(config)
    assert len(digests(tmp_path / "tiny")) == 12


def test_a_required_service_that_cannot_start_is_exit_code_3(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    config = write_config(tmp_path, tiny_tree(tmp_path, tiny_store, mixing__service="required"))
    code, output = finish(start_job(config))
    assert code == 3, output[-3000:]
    assert "error: mixing.service is required, but" in output
    assert "Traceback" not in output


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB: less than the tiny model's checkpoint."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs needs more rights than this test has")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_clear_line_and_leaves_nothing_half_written(
    tiny_store: Path, tmp_path: Path, small_disk: Path
) -> None:
    tree = tiny_tree(small_disk, tiny_store)
    tree["model"]["config"] |= {"hidden_size": 128, "intermediate_size": 256}
    code, output = finish(start_job(write_config(tmp_path, tree)))
    assert code == 2, output[-3000:]
    assert "step-00000004: the checkpoint cannot be written" in output
    assert "Traceback" not in output
    assert not list((small_disk / "tiny" / "checkpoints").glob("step-*"))
    # With room again, the same command completes the run.
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    run_job(tmp_path / "run.yaml")
    assert len(digests(small_disk / "tiny")) == 12


def test_a_run_folder_that_cannot_be_written_is_refused(tiny_store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    config = write_config(tmp_path, tiny_tree(tmp_path / "file", tiny_store))
    code, output = finish(start_job(config))
    assert code == 2
    assert "the run folder cannot be written" in output
    assert "Traceback" not in output


def test_two_ranks_without_a_compiler_use_gloo_and_say_so(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    config = write_config(tmp_path, tiny_tree(tmp_path, tiny_store, training__num_steps=4))
    output = run_job(config, num_ranks=2)
    assert "DeepSpeed's shared-memory all-reduce is not built, gloo is used instead" in output
    assert not (tmp_path / "extensions").exists()


def test_old_checkpoints_are_dropped_and_latest_names_the_newest(tiny_store: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_tree(tmp_path, tiny_store, checkpoint__every=2, checkpoint__keep=3))
    run_job(config)
    folder = tmp_path / "tiny" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [
        "latest",
        "step-00000008",
        "step-00000010",
        "step-00000012",
    ]
    assert (folder / "latest").read_text() == "step-00000012"
    assert [c.step for c in history_of(tmp_path / "tiny").checkpoints if isinstance(c, Checkpoint)] == [
        2,
        4,
        6,
        8,
        10,
        12,
    ]


def test_a_stopping_cap_ends_the_run_early_and_completely(tiny_store: Path, tmp_path: Path) -> None:
    policy = {
        "kind": "static",
        "mixture": {"colours": 1},
        "caps": {"colours": {"max_epochs": 0.5, "on_exhaust": "stop"}},
    }
    config = write_config(tmp_path, tiny_tree(tmp_path, tiny_store, training__num_steps=500, mixing__policy=policy))
    output = run_job(config)
    end = history_of(tmp_path / "tiny").end
    assert end is not None
    assert end.reason == "exhausted"
    assert f"the plan ended at step {end.step}" in output
    assert metrics(tmp_path / "tiny", "test")[-1]["step"] == end.step
    assert (tmp_path / "tiny" / "export" / "model.safetensors").exists()
    assert (tmp_path / "tiny" / "report.html").exists()
