"""Every way of starting and every kind of training that the documentation names, once, as a whole job."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.pretrain.jobs import BIN, ROOT, digests, metrics, run_job, write_config
from tests.pretrain.tiny import tiny_tree
from tests.ranks import free_port


def learned(run_dir: Path) -> bool:
    before, after = metrics(run_dir, "test")
    return all(after["loss"][name] < before["loss"][name] - 0.5 for name in before["loss"])


def test_zero_3_on_two_ranks_with_checkpointed_activations_exports_the_whole_model(
    tiny_store: Path, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path, tiny_tree(tmp_path, tiny_store, training__zero_stage=3, model__gradient_checkpointing=True)
    )
    run_job(config, num_ranks=2)
    assert learned(tmp_path / "tiny")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny" / "export")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.isfinite(parameter).all() and parameter.numel() for parameter in model.parameters())


def test_bfloat16_with_z_loss_and_dropout_trains(tiny_store: Path, tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path, tiny_store, model__dtype="bfloat16", training__z_loss=1e-4, training__num_steps=24)
    tree["training"]["dropout"] = [{"step": 8, "p": 0.1}]
    run_job(write_config(tmp_path, tree))
    assert learned(tmp_path / "tiny")


def test_a_run_starts_from_the_model_that_another_exported(tiny_store: Path, tmp_path: Path) -> None:
    run_job(write_config(tmp_path, tiny_tree(tmp_path, tiny_store)))
    exported = str(tmp_path / "tiny" / "export")
    second = tiny_tree(tmp_path, tiny_store, run__name="second", training__num_steps=4)
    second["model"] = {"path": exported}
    run_job(write_config(tmp_path, second))
    first_end, second_start = metrics(tmp_path / "tiny", "test")[-1], metrics(tmp_path / "second", "test")[0]
    assert second_start["loss"] == pytest.approx(first_end["loss"], rel=1e-5)


def test_torchrun_reads_the_batches_that_one_process_reads(tiny_store: Path, tmp_path: Path) -> None:
    alone, both = (tiny_tree(tmp_path / name, tiny_store, training__num_steps=4) for name in ("alone", "both"))
    for name in ("alone", "both"):
        (tmp_path / name).mkdir()
    run_job(write_config(tmp_path / "alone", alone))
    command = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port())]
    command += [str(ROOT / "launch" / "pretrain.py"), "--config", str(write_config(tmp_path / "both", both))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert digests(tmp_path / "both" / "tiny") == digests(tmp_path / "alone" / "tiny")
