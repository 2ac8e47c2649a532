"""A whole job whose samples are weighted: submitted while it runs, killed and resumed, beside everything else."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from mixwright.pretrain.row_log import read_row_log, row_log_folder
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

NUM_STEPS = 40
WEIGHTING = {"strategy": "linupper", "r": 0.4, "warmup_steps": 4}
AIOLI = {"kind": "aioli", "variant": "paper", "sweeps": 1, "sweep_steps": 2, "round_steps": 12}


def config_in(folder: Path, store: Path, **weighting: Any) -> Path:
    """Weights, aioli, z-loss, accumulation and bounded gradients in one run."""
    folder.mkdir()
    tree = tiny_tree(folder, store, training__num_steps=NUM_STEPS, training__z_loss=1e-3, training__micro_batch_rows=2)
    tree["metrics"] = {"row_log": True}
    tree["mixing"].update(policy={**AIOLI, "loss_weighting": {**WEIGHTING, **weighting}}, service="required")
    return write_config(folder, tree)


def grad_norms(run_dir: Path) -> dict[int, float]:
    return {record["step"]: record["grad_norm"] for record in metrics(run_dir, "step")}


@pytest.mark.ray
@pytest.mark.parametrize("scope", ["step_deferred", "micro_step"])
def test_killed_and_resumed_it_weighs_as_if_nothing_had_happened(tiny_store: Path, tmp_path: Path, scope: str) -> None:
    asked = {"scope": scope, "score": "excess"}
    run_job(config_in(tmp_path / "whole", tiny_store, **asked))
    config, run_dir = config_in(tmp_path / "killed", tiny_store, **asked), tmp_path / "killed" / "tiny"
    job = start_job(config)
    wait_for_step(run_dir, 17, job)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    assert "resuming after step" in run_job(config)
    whole = tmp_path / "whole" / "tiny"
    assert digests(run_dir) == digests(whole)
    assert grad_norms(run_dir) == grad_norms(whole)
    weights, undisturbed = metrics(run_dir, "weights"), metrics(whole, "weights")
    assert weights[-1] == undisturbed[-1]
    assert 0.3 < weights[-1]["effective_sample_size"] < 0.99
    assert sum(weights[-1]["weight_share"].values()) == pytest.approx(1)
    logged, expected = read_row_log(row_log_folder(run_dir)), read_row_log(row_log_folder(whole))
    assert logged.weight_n.tolist() == expected.weight_n.tolist()
    assert (
        logged.position_n.tolist()
        == list(range(tiny_tree(tmp_path, tiny_store)["training"]["rows_per_step"])) * NUM_STEPS
    )
    assert len({round(float(weight), 4) for weight in logged.weight_n}) > 4  # two rows of a micro-step have few values
    shown = mixwright("mix", "hard-samples", "--run", str(run_dir), "--by", "down-weighted", "--count", "3", "--json")
    assert shown.returncode == 0, shown.stderr
    assert history_of(run_dir).commits[0].policy.loss_weighting is not None


@pytest.mark.ray
def test_weighting_is_switched_on_and_off_in_a_running_job(tiny_store: Path, tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path, tiny_store, training__num_steps=100_000, mixing__service="required")
    config, run_dir = write_config(tmp_path, tree), tmp_path / "tiny"
    on, off = tmp_path / "on.yaml", tmp_path / "off.yaml"
    on.write_text("kind: keep\nloss_weighting: {strategy: extremes, r: 0.2, scope: step_two_phase}\n")
    off.write_text("kind: keep\nloss_weighting: {strategy: uniform}\n")
    job = start_job(config)
    wait_for_step(run_dir, 5, job)
    for policy in (on, off):
        submitted = mixwright("mix", "submit", str(policy), "--run", str(run_dir), "--wait")
        assert submitted.returncode == 0, submitted.stdout + submitted.stderr
        wait_for_step(run_dir, history_of(run_dir).commits[-1].effective_step + 30, job)
    job.send_signal(signal.SIGINT)
    code, output = finish(job)
    assert code == 75, output[-3000:]
    begun, ended = (commit.effective_step for commit in history_of(run_dir).commits[1:])
    steps = [record["step"] for record in metrics(run_dir, "weights")]
    assert steps
    assert begun < steps[0]
    assert steps[-1] <= ended + 10
