"""The whole job with all options on, in one process: stopped and resumed it has the same losses, and it exports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from mixwright.data_mixing.config_file import validate
from mixwright.data_mixing.store import TokenStore
from mixwright.pretrain.config import PretrainConfig
from mixwright.pretrain.engine import start_ranks
from mixwright.pretrain.job import EXIT_INTERRUPTED, Job
from mixwright.pretrain.progress import Progress
from mixwright.pretrain.start import StopRequest, open_mixing
from tests.pretrain.jobs import metrics
from tests.pretrain.tiny import tiny_tree
from tests.ranks import run_ranks

OPTIONS: dict[str, Any] = {
    "late_dropout": {"p": 0.2, "start_step": 3, "ramp_steps": 3},
    "generalised_gaussian_init": {"shape": 1.5},
    "backslash": {"strength": 0.05},
    "stochastic_experts": {"every": 1},
    "weight_compander": {},
    "normalised_softmax": {},
}


class Silent:
    """Watches and says nothing."""

    def say(self, text: str) -> None:
        pass

    def progress(self, progress: Progress) -> None:
        pass

    def close(self) -> None:
        pass

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        pass


class StopAfter(StopRequest):
    """Asks to stop in the step after `num_steps` others."""

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self._left = num_steps

    def is_requested(self) -> bool:
        self._left -= 1
        return self._left < 0


def run_parts(tree: dict[str, Any], parts: list[int]) -> list[int]:
    """Exit codes of the job, each part of which stops after a number of further steps."""
    torch.set_num_threads(1)
    config = validate(PretrainConfig, tree, "tiny")
    ranks = start_ranks(lambda text: None)
    store, codes = TokenStore.open(config.data.store), []
    for num_steps in parts:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        with open_mixing(config, store, ranks, Silent()) as mixing:
            codes.append(Job.build(config, ranks, store, mixing, Silent()).run(StopAfter(num_steps - 1)))
    return codes


def losses(run_dir: Path) -> list[dict[str, float]]:
    return [record["loss"] for record in metrics(run_dir, "train")]


@pytest.fixture(scope="module")
def runs(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run to its end, one in three parts."""
    folder = tmp_path_factory.mktemp("runs")
    for name, parts, codes in (("whole", [99], [0]), ("parts", [2, 3, 99], [EXIT_INTERRUPTED, EXIT_INTERRUPTED, 0])):
        tree = tiny_tree(
            folder / name, tiny_store, training__num_steps=8, mixing__report_every=1, evaluation__every=0,
            model__config={**tiny_tree(folder, tiny_store)["model"]["config"], "attention_dropout": 0.0},
        )  # fmt: skip
        assert run_ranks(run_parts, 1, {**tree, "options": OPTIONS}, parts)[0] == codes
    return {name: folder / name / "tiny" for name in ("whole", "parts")}


def test_a_run_that_was_stopped_twice_has_the_losses_of_one_that_was_not(runs: dict[str, Path]) -> None:
    assert len(losses(runs["whole"])) == 8
    assert losses(runs["parts"]) == losses(runs["whole"])
    assert metrics(runs["parts"], "test")[-1]["loss"] == metrics(runs["whole"], "test")[-1]["loss"]


def test_the_exported_model_is_plain_and_has_the_reported_test_loss(runs: dict[str, Path], tiny_store: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(runs["whole"] / "export")
    store = TokenStore.open(tiny_store)
    spread = torch.arange(4) * store.num_rows("letters", "test") // 4
    domain = torch.full((4,), store.index("letters"))
    rows = torch.from_numpy(store.gather(domain.numpy(), spread.numpy(), "test").astype("int64"))
    with torch.no_grad():
        logits = model(rows[:, :-1]).logits.double()
    loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].reshape(-1))
    assert metrics(runs["whole"], "test")[-1]["loss"]["letters"] == pytest.approx(float(loss), rel=1e-5)
