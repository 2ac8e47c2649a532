"""The loader beside the DeepSpeed job: the same journal and seed give the same digests."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from mixwright.data_mixing.loader import NewRun, open_loader
from mixwright.data_mixing.store import TokenStore
from tests.pretrain.jobs import digests, run_job, write_config
from tests.pretrain.tiny import tiny_tree
from tests.ranks import run_ranks

NEW = NewRun(policy={"kind": "temperature", "temperature": 1.0}, rows_per_step=8, num_steps=12, seed=3)


def sum_over_ranks(array: np.ndarray) -> np.ndarray:
    tensor = torch.from_numpy(array)
    dist.all_reduce(tensor)
    return tensor.numpy()


def read_with_torch(run_dir: Path, store: Path) -> list[str]:
    """What a plain PyTorch loop on several ranks does, without the model."""
    dist.init_process_group("gloo")
    seen = []
    with open_loader(
        run_dir, TokenStore.open(store), begin=NEW, micro_batch_rows=2, sum_over_ranks=sum_over_ranks
    ) as loader:
        for step in loader:
            for batch in step:
                loader.observe(batch, torch.full((batch.num_rows,), 2.5))
            loader.end_step()
            seen.append(f"{loader.run_digest:016x}")
    dist.destroy_process_group()
    return seen


def test_loader_and_job_read_the_same(tiny_store: Path, tmp_path: Path) -> None:
    run_job(write_config(tmp_path, tiny_tree(tmp_path, tiny_store)))
    trained = digests(tmp_path / "tiny")
    assert len(trained) == 12
    two_ranks = run_ranks(read_with_torch, 2, tmp_path / "loader" / "tiny", tiny_store)
    assert two_ranks == [trained, trained]
    copy = tmp_path / "copy" / "tiny"
    copy.mkdir(parents=True)
    shutil.copytree(tmp_path / "tiny" / "journal", copy / "journal")
    with open_loader(copy, TokenStore.open(tiny_store), micro_batch_rows=8, start_step=4) as loader:
        again = [f"{loader.run_digest:016x}" for _ in loader if loader.end_step() is None]
    assert again == trained[4:]
