"""Contract 4: one objective per optimizer step, whatever the ranks, the accumulation and the ZeRO stage."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mixwright.data_mixing.config_file import validate
from mixwright.pretrain.config import PretrainConfig
from mixwright.pretrain.engine import (
    Engine,
    accumulation_steps,
    decayed_groups,
    deepspeed_settings,
    extensions_folder,
    own_device,
    pretrain_settings,
    start_ranks,
)
from mixwright.pretrain.errors import NonFiniteLoss, TrainingError
from mixwright.pretrain.head import LanguageModel
from mixwright.pretrain.model import build_model
from mixwright.pretrain.objective import DomainSums, Objective, Shape
from mixwright.pretrain.ranks import Ranks
from tests.pretrain.tiny import tiny_config, tiny_tree
from tests.ranks import run_ranks

ROWS, STEPS, VOCAB = 8, 3, 61
Run = tuple[int, int, dict[str, Any]]
"""ZeRO stage, rows of a micro-batch, further changes of the configuration."""


def tokens_of(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCAB, (ROWS, 17), generator=generator)


def fixed_model(config: PretrainConfig) -> LanguageModel:
    return build_model(config.model, vocab_size=VOCAB, sequence_length=16, eos_id=0, seed=1)


def config_for(stage: int, micro: int, **changes: Any) -> PretrainConfig:
    # A large eps keeps AdamW's update proportional to the gradient, so that a wrong scale shows.
    return tiny_config(
        Path("runs"), Path("store"), training__zero_stage=stage, training__rows_per_step=ROWS,
        training__micro_batch_rows=micro, optimizer__eps=1.0, optimizer__lr=10.0, training__z_loss=1e-3, **changes,
    )  # fmt: skip


def train_briefly(runs: list[Run]) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    """For each run: gradient norms of three steps and the parameters after them."""
    torch.set_num_threads(1)
    ranks = start_ranks(lambda text: None)
    return [train_one(ranks, run) for run in runs]


def train_one(ranks: Ranks, run: Run) -> tuple[list[float], dict[str, torch.Tensor]]:
    stage, micro, changes = run
    config = config_for(stage, micro, **changes)
    engine = Engine(pretrain_settings(config), fixed_model(config), ranks)
    objective = Objective(Shape(ROWS, micro, 1, config.training.z_loss, eos_id=0), ranks)
    norms = []
    for step in range(STEPS):
        mine = tokens_of(step)[ranks.rank * ROWS // ranks.size : (ranks.rank + 1) * ROWS // ranks.size]
        for batch in mine.split(micro):
            losses = engine.forward(batch)
            engine.backward(objective(losses, batch, torch.zeros(len(batch), dtype=torch.int64)))
            norm = engine.step(lr=config.optimizer.lr)
        norms.append(norm)
    return norms, engine.full_parameters()


def expected(clip_norm: float) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same three steps in float64 with plain torch: one process, one batch."""
    config = config_for(0, ROWS)
    model = fixed_model(config).double()
    optimizer = torch.optim.AdamW(decayed_groups(model, 0.1), lr=10.0, betas=(0.9, 0.95), eps=1.0)
    norms = []
    for step in range(STEPS):
        logits = model.causal_lm(tokens_of(step)[:, :-1], use_cache=False).logits
        targets = tokens_of(step)[:, 1:]
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.reshape(-1))
        (nll + 1e-3 * logits.logsumexp(-1).square().mean()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)))
        optimizer.step()
        optimizer.zero_grad()
    return norms, dict(model.named_parameters())


ALONE: list[Run] = [(0, 8, {}), (0, 4, {}), (0, 2, {}), (2, 4, {})]
TWO_RANKS: list[Run] = [(0, 4, {}), (0, 2, {}), (1, 2, {}), (2, 4, {}), (2, 2, {}), (3, 2, {})]
BFLOAT16 = {"model__dtype": "bfloat16"}
UNCLIPPED = {"training__clip_norm": 0.0}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return results(1, [*ALONE, (0, 4, BFLOAT16), (0, 8, UNCLIPPED), (2, 8, UNCLIPPED)])


@pytest.fixture(scope="module")
def two_ranks() -> dict[str, Any]:
    return results(2, [*TWO_RANKS, (2, 2, BFLOAT16)])


def results(world: int, runs: list[Run]) -> dict[str, Any]:
    """What the leader saw, by run. One start of the ranks serves all runs: it takes ten seconds."""
    return dict(zip(map(str, runs), run_ranks(train_briefly, world, runs)[0], strict=True))


def assert_equal_to_plain_training(result: Any, clip_norm: float = 1.0) -> None:
    norms, parameters = result
    expected_norms, expected_parameters = expected(clip_norm)
    assert norms == pytest.approx(expected_norms, rel=2e-5)
    for name, parameter in expected_parameters.items():
        torch.testing.assert_close(parameters[name].double(), parameter.detach(), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("run", ALONE, ids=str)
def test_one_rank_equals_plain_float64_training(alone: dict[str, Any], run: Run) -> None:
    assert_equal_to_plain_training(alone[str(run)])


@pytest.mark.parametrize("run", TWO_RANKS, ids=str)
def test_two_ranks_equal_plain_float64_training(two_ranks: dict[str, Any], run: Run) -> None:
    assert_equal_to_plain_training(two_ranks[str(run)])


@pytest.mark.parametrize("stage", [0, 2])
def test_no_clipping_when_the_norm_is_zero(alone: dict[str, Any], stage: int) -> None:
    assert_equal_to_plain_training(alone[str((stage, 8, UNCLIPPED))], clip_norm=float("inf"))


def test_bfloat16_training_stays_near_float64(alone: dict[str, Any], two_ranks: dict[str, Any]) -> None:
    expected_norms, _ = expected(clip_norm=1.0)
    assert alone[str((0, 4, BFLOAT16))][0] == pytest.approx(expected_norms, rel=0.05)
    assert two_ranks[str((2, 2, BFLOAT16))][0] == pytest.approx(expected_norms, rel=0.05)


def poison_and_step() -> tuple[str, bool]:
    config = config_for(0, ROWS)
    ranks = start_ranks(lambda text: None)
    engine = Engine(pretrain_settings(config), fixed_model(config), ranks)
    before = {name: parameter.clone() for name, parameter in engine.full_parameters().items()}
    losses = engine.forward(tokens_of(0))
    engine.backward(losses.nll_N.sum() * float("nan"))
    try:
        engine.step(lr=1.0)
    except NonFiniteLoss as error:
        return str(error), all(torch.equal(before[name], p) for name, p in engine.full_parameters().items())
    return "no error", False


def test_a_gradient_that_is_not_finite_stops_before_the_update() -> None:
    message, unchanged = run_ranks(poison_and_step, 1)[0]
    assert "gradient norm is nan" in message
    assert unchanged


def test_a_batch_that_cannot_be_cut_evenly_names_sizes_that_fit() -> None:
    config = config_for(0, 3)
    with pytest.raises(
        TrainingError,
        match=r"8 is not a multiple of 2 ranks x training.micro_batch_rows = 3; fitting micro_batch_rows: 1, 2, 4",
    ):
        accumulation_steps(pretrain_settings(config), 2)


def test_the_users_deepspeed_section_reaches_deepspeed() -> None:
    tree = tiny_tree(Path("runs"), Path("store"), training__zero_stage=2)
    tree["deepspeed"] = {"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True}
    settings = deepspeed_settings(pretrain_settings(validate(PretrainConfig, tree, "x")), 1)
    assert settings["zero_optimization"] == {"reduce_bucket_size": 1000, "stage": 2}
    assert settings["wall_clock_breakdown"] is True


def test_domain_sums_equal_brute_force_and_start_again_after_take() -> None:
    generator = torch.Generator().manual_seed(0)
    sums = DomainSums(4, torch.device("cpu"))
    expected_KC = torch.zeros(4, 4, dtype=torch.float64)
    for _ in range(3):
        nll_N = torch.rand(5 * 7, generator=generator)
        domain_B = torch.tensor([0, 2, 2, 0, 3])
        sums.add(nll_N, domain_B)
        for row, domain in enumerate(domain_B.tolist()):
            nll_T = nll_N.reshape(5, 7)[row].double()
            expected_KC[domain] += torch.stack([nll_T.sum(), (nll_T**2).sum(), torch.tensor(7.0), torch.tensor(1.0)])
    torch.testing.assert_close(sums.take(), expected_KC, rtol=1e-12, atol=1e-12)
    assert sums.take().abs().sum() == 0


def test_ranks_of_a_node_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpus:
        """A node with several, as DeepSpeed's accelerator shows it."""

        current = 0

        def device_name(self) -> str:
            return "cuda"

        def set_device(self, index: int) -> None:
            self.current = index

        def current_device_name(self) -> str:
            return f"cuda:{self.current}"

    gpus = Gpus()
    monkeypatch.setattr("mixwright.pretrain.engine.get_accelerator", lambda: gpus)
    assert own_device(3) == torch.device("cuda:3")


def test_a_port_that_another_job_has_is_named() -> None:
    """Two jobs that `deepspeed` starts on one machine both want 29500."""
    code = "from mixwright.pretrain.engine import start_ranks; start_ranks(print)"
    with socket.create_server(("0.0.0.0", 0)) as other_job:
        port = other_job.getsockname()[1]
        environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": str(port)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
    expected = f"TrainingError: MASTER_PORT: port {port} is taken on this machine"
    assert expected in done.stderr
    assert f"`deepspeed --master_port {port + 1} ...`" in done.stderr


def test_environments_do_not_share_their_compiled_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    here = extensions_folder()
    assert extensions_folder() == here
    monkeypatch.setattr(sys, "prefix", "/opt/another")
    other = extensions_folder()
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert len({here, other, extensions_folder()}) == 3
