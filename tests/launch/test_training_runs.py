"""Training runs as tasks: whose result it is that a folder holds, and what is told when it holds none."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixwright.data_mixing.extended import extend_store
from mixwright.data_mixing.store import TokenStore
from mixwright.launch.training_runs import Launch, RunResult, find_result, perform_run
from mixwright.pretrain.ensemble.config import ResourcesConfig
from mixwright.pretrain.errors import CheckpointMismatch, TrainingError
from tests.pretrain.tiny import tiny_config

STEPS = {"training__num_steps": 2, "evaluation__every": 2}


@pytest.fixture(scope="module")
def finished(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    perform_run(Launch(tiny_config(folder, tiny_store, **STEPS), ResourcesConfig()))
    return folder


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optimizer__lr": 3e-3}, "optimizer.lr: 0.01 there, 0.003 here"),
        ({"run__init_seed": 4}, "run.init_seed: None there, 4 here"),
        ({"mixing__policy": {"kind": "temperature", "temperature": 2.0}}, "mixing.policy.temperature: 1.0 there, 2.0"),
    ],
)
def test_a_run_of_another_recipe_is_not_taken_for_this_one(
    changes: dict[str, Any], told: str, finished: Path, tiny_store: Path
) -> None:
    other = tiny_config(finished, tiny_store, **STEPS, **changes)
    with pytest.raises(
        CheckpointMismatch, match=rf"tiny: was trained with other settings \({told}.*remove that folder"
    ):
        find_result(other)
    with pytest.raises(CheckpointMismatch, match="other settings"):
        perform_run(Launch(other, ResourcesConfig()))


def test_where_a_run_is_and_how_it_is_shared_out_may_differ(finished: Path, tiny_store: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "moved")
    shutil.copytree(tiny_store, tmp_path / "store")
    changes = {
        "training__micro_batch_rows": 2, "training__zero_stage": 2, "checkpoint__every": 1, "metrics__row_log": True,
        "mixing__report_every": 1,
    }  # fmt: skip
    here = find_result(tiny_config(tmp_path / "moved", tmp_path / "store", **STEPS, **changes))
    there = find_result(tiny_config(finished, tiny_store, **STEPS))
    assert isinstance(here, RunResult)
    assert isinstance(there, RunResult)
    assert (here.validation, here.test) == (there.validation, there.test)


def test_a_run_of_other_text_is_not_taken_for_this_one(finished: Path, tiny_store: Path, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 200, (5, 17))
    more = extend_store(TokenStore.open(tiny_store), tmp_path / "more", "synthetic", rows, {})
    with pytest.raises(CheckpointMismatch, match=r"other settings \(store: "):
        find_result(tiny_config(finished, more.folder, **STEPS))


def test_a_run_that_did_not_end_is_not_gone_on_with_by_another_recipe(tiny_store: Path, tmp_path: Path) -> None:
    wild = tiny_config(tmp_path, tiny_store, optimizer__lr=1e30)
    assert perform_run(Launch(wild, ResourcesConfig())).validation == float("inf")
    with pytest.raises(CheckpointMismatch, match=r"optimizer.lr: 1e\+30 there, 0.01 here"):
        perform_run(Launch(tiny_config(tmp_path, tiny_store), ResourcesConfig()))


def test_before_anything_is_trained_settings_may_change(tiny_store: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"exit code 2: error: .*nowhere"):
        perform_run(Launch(tiny_config(tmp_path, tmp_path / "nowhere"), ResourcesConfig()))
    assert find_result(tiny_config(tmp_path, tiny_store, optimizer__lr=3e-3)) is None


@pytest.mark.parametrize("kind", ["validation", "test"])
def test_a_run_without_figures_is_one_line(kind: str, finished: Path, tiny_store: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "runs")
    path = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    path.write_text("".join(line for line in path.open() if f'"kind": "{kind}"' not in line))
    with pytest.raises(TrainingError, match=f"tiny: complete, but without {kind} losses"):
        find_result(tiny_config(tmp_path / "runs", tiny_store, **STEPS))
