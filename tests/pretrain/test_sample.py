"""Sampling from teachers: the distribution, chunks that do not depend on interruptions, folders of other settings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixwright.data_mixing.store import TokenStore
from mixwright.pretrain.distill import sample as sample_module
from mixwright.pretrain.distill.sample import SamplingConfig, num_repeated, sample_rows
from mixwright.pretrain.distill.sampler import continue_rows
from mixwright.pretrain.ensemble.member import Member, load_member
from mixwright.pretrain.ensemble.pooling import pool
from mixwright.pretrain.errors import EnsembleError

LENGTH = 16


def sample(members: list[Member], folder: Path, **changes: Any) -> np.ndarray:
    config = SamplingConfig(**{"num_rows": 20, "batch_rows": 8, "seed": 3, **changes})
    return sample_rows(members, config, sequence_length=LENGTH, eos_id=0, folder=folder)


@pytest.mark.parametrize("pooling", ["logits", "arithmetic"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_follow_the_pooled_prediction(members: list[Member], pooling: Any, temperature: float) -> None:
    models, prompt = [load_member(member) for member in members], torch.tensor([[0, 5, 9]])
    with torch.no_grad():
        scores = pool([model.causal_lm(input_ids=prompt).logits[0, -1] for model in models], pooling)
    expected = torch.softmax(scores / temperature, 0).numpy()
    drawn = continue_rows(
        models, prompt.expand(20_000, -1), 1, torch.Generator().manual_seed(0), pooling=pooling, temperature=temperature
    )
    found = np.bincount(drawn[:, -1].numpy(), minlength=len(expected)) / 20_000
    error = np.sqrt(expected * (1 - expected) / 20_000)
    assert np.abs(found - expected).max() < 5 * error.max()


def test_a_cache_of_keys_gives_what_the_whole_row_gives(members: list[Member]) -> None:
    """Temperature 0 takes the likeliest token, so rows can be compared with forwards over all of them."""
    models = [load_member(member) for member in members]
    prompt = torch.tensor([[0, 7], [0, 11]])
    rows = continue_rows(models, prompt, 8, torch.Generator(), temperature=0)
    with torch.no_grad():
        for at in range(2, rows.shape[1]):
            scores = pool([m.causal_lm(input_ids=rows[:, :at]).logits[:, -1] for m in models], "logits")
            assert rows[:, at].tolist() == scores.argmax(1).tolist()


def test_rows_begin_with_a_document_and_are_as_long_as_the_stores(members: list[Member], tmp_path: Path) -> None:
    rows = sample(members, tmp_path)
    assert rows.shape == (20, LENGTH + 1)
    assert (rows[:, 0] == 0).all()
    assert num_repeated(rows) == 0
    assert num_repeated(np.concatenate([rows, rows[3:5]])) == 2


def test_a_chunk_does_not_depend_on_the_others(members: list[Member], tmp_path: Path) -> None:
    whole = sample(members, tmp_path)
    for chunk in (0, 2):
        (tmp_path / f"chunk-{chunk:05d}.npy").unlink()
    np.testing.assert_array_equal(sample(members, tmp_path), whole)
    assert not np.array_equal(whole[:8], whole[8:16])
    assert not np.array_equal(sample(members, tmp_path / "other", seed=4), whole)


def test_what_is_done_is_not_done_again(members: list[Member], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample(members, tmp_path)
    (tmp_path / "chunk-00001.npy").unlink()
    made: list[int] = []
    inner = sample_module._sample_chunk

    def count(models: Any, config: Any, chunk: int, *rest: Any) -> Any:
        made.append(chunk)
        return inner(models, config, chunk, *rest)

    monkeypatch.setattr(sample_module, "_sample_chunk", count)
    sample(members, tmp_path)
    assert made == [1]
    monkeypatch.setattr(sample_module, "load_member", None)  # nothing is loaded when nothing is missing
    sample(members, tmp_path)


def test_members_take_turns_by_chunk_and_are_loaded_one_by_one(members: list[Member], tmp_path: Path) -> None:
    union = sample(members, tmp_path / "union", source="members", num_rows=24)
    alone = [sample([member], tmp_path / member.name, source="members", num_rows=24) for member in members]
    for chunk in range(3):
        part = slice(8 * chunk, 8 * chunk + 8)
        np.testing.assert_array_equal(union[part], alone[chunk][part])


def test_samples_of_others_are_refused_naming_what_differs(members: list[Member], tmp_path: Path) -> None:
    sample(members, tmp_path)
    with pytest.raises(EnsembleError, match="holds samples with other temperature, seed; choose another folder"):
        sample(members, tmp_path, seed=9, temperature=0.7)
    with pytest.raises(EnsembleError, match="holds samples with other members"):
        sample(members[:2], tmp_path)


SCRIPT = """
import sys
from pathlib import Path
from mixwright.pretrain.distill.sample import SamplingConfig, sample_rows
from mixwright.pretrain.ensemble.member import inspect_member
members = [inspect_member(Path(path)) for path in sys.argv[2:]]
config = SamplingConfig(num_rows=400, batch_rows=8, seed=3)
sample_rows(members, config, sequence_length=16, eos_id=0, folder=Path(sys.argv[1]))
"""


def test_a_killed_process_costs_one_chunk_and_changes_nothing(members: list[Member], tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "killed"), *(str(m.folder) for m in members)]
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "killed").glob("chunk-*.npy"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("chunk-*.npy")}
    assert 5 <= len(done) < 50
    after = sample(members, tmp_path / "killed", num_rows=400)
    assert all((tmp_path / "killed" / name).stat().st_mtime_ns == when for name, when in done.items())
    np.testing.assert_array_equal(after, sample(members, tmp_path / "whole", num_rows=400))


def test_sampled_rows_are_of_the_stores_vocabulary(members: list[Member], tiny_store: Path, tmp_path: Path) -> None:
    rows = sample(members, tmp_path)
    assert rows.min() >= 0
    assert rows.max() < TokenStore.open(tiny_store).manifest.vocab_size
