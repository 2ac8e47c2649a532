"""Options under DeepSpeed: the same parameters after three steps for any ranks, accumulation and ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mixwright.data_mixing.config_file import validate
from mixwright.pretrain.config import PretrainConfig
from mixwright.pretrain.engine import Engine, decayed_groups, pretrain_settings, start_ranks
from mixwright.pretrain.head import LanguageModel
from mixwright.pretrain.model import build_model
from mixwright.pretrain.model_options.apply import begin_step, follow_updates
from mixwright.pretrain.objective import Objective, Shape
from mixwright.pretrain.ranks import Ranks
from tests.pretrain.tiny import tiny_tree
from tests.ranks import run_ranks

ROWS, STEPS, VOCAB, SEED = 8, 3, 61, 3
BACKSLASH = {"backslash": {"strength": 2e-3}}
SHAPES = {"weight_compander": {}, "normalised_softmax": {"normalise": "both"}}
EXPERTS = {"stochastic_experts": {"num_experts": 3, "every": 1, "alpha": 2.0}}
Run = tuple[str, int, int, str]
"""Name of the options, ZeRO stage, rows of a micro-batch, dtype."""

OPTIONS: dict[str, dict[str, Any]] = {
    "backslash": BACKSLASH,
    "experts": EXPERTS,
    "shapes": SHAPES,
    "all": {**BACKSLASH, **SHAPES, **EXPERTS},
}
ALONE: list[Run] = [("backslash", 0, 8, "float32"), ("all", 0, 4, "float32"), ("all", 2, 4, "float32")]
TWO_RANKS: list[Run] = [
    ("backslash", 1, 4, "float32"),
    ("backslash", 2, 2, "float32"),
    ("experts", 0, 2, "float32"),
    ("shapes", 2, 4, "float32"),
    ("shapes", 3, 2, "float32"),
    ("all", 2, 2, "float32"),
]
BFLOAT16: list[Run] = [("backslash", 0, 4, "bfloat16"), ("backslash", 2, 4, "bfloat16")]


def config_for(run: Run) -> PretrainConfig:
    options, stage, micro, dtype = run
    # A large eps keeps AdamW's update proportional to the gradient, so that a wrong scale shows.
    tree = tiny_tree(
        Path("runs"), Path("store"), training__zero_stage=stage, training__rows_per_step=ROWS, model__dtype=dtype,
        training__micro_batch_rows=micro, optimizer__eps=1.0, optimizer__lr=10.0,
    )  # fmt: skip
    return validate(PretrainConfig, {**tree, "options": OPTIONS[options]}, "tiny")


def model_for(config: PretrainConfig) -> LanguageModel:
    return build_model(
        config.model, vocab_size=VOCAB, sequence_length=16, eos_id=0, seed=1, options=config.options
    )  # fmt: skip


def tokens_of(step: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (ROWS, 17), generator=torch.Generator().manual_seed(step))


def train_each(runs: list[Run]) -> list[dict[str, torch.Tensor]]:
    torch.set_num_threads(1)
    ranks = start_ranks(lambda text: None)
    return [train_one(ranks, run) for run in runs]


def train_one(ranks: Ranks, run: Run) -> dict[str, torch.Tensor]:
    """Full parameters after three steps."""
    config = config_for(run)
    engine = Engine(pretrain_settings(config), model_for(config), ranks)
    objective = Objective(Shape(ROWS, config.training.micro_batch_rows, 1, 0.0, eos_id=0), ranks)
    engine.train()
    for step in range(STEPS):
        begin_step(engine.module, config.options, SEED, step)
        mine = tokens_of(step)[ranks.rank * ROWS // ranks.size : (ranks.rank + 1) * ROWS // ranks.size]
        for batch in mine.split(config.training.micro_batch_rows):
            losses = engine.forward(batch)
            engine.backward(objective(losses, batch, torch.zeros(len(batch), dtype=torch.int64)))
            engine.step(lr=config.optimizer.lr)
    return engine.full_parameters()


def expected(run: Run) -> dict[str, torch.Tensor]:
    """The same three steps in float64 with plain torch: one process, one batch."""
    config = config_for((run[0], 0, ROWS, "float32"))
    model = model_for(config).double().train()
    optimizer = torch.optim.AdamW(decayed_groups(model, 0.1), lr=10.0, betas=(0.9, 0.95), eps=1.0)
    follow_updates(config.options, optimizer, model, lambda sums: sums)
    for step in range(STEPS):
        begin_step(model, config.options, SEED, step)
        model(tokens_of(step)).nll_N.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return dict(zip(map(str, ALONE), run_ranks(train_each, 1, ALONE)[0], strict=True))


@pytest.fixture(scope="module")
def two_ranks() -> dict[str, Any]:
    return dict(zip(map(str, TWO_RANKS + BFLOAT16), run_ranks(train_each, 2, TWO_RANKS + BFLOAT16)[0], strict=True))


def assert_as_expected(parameters: dict[str, torch.Tensor], run: Run) -> None:
    for name, parameter in expected(run).items():
        torch.testing.assert_close(
            parameters[name].double(), parameter.detach(), rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("run", ALONE, ids=str)
def test_one_rank_equals_plain_float64_training(alone: dict[str, Any], run: Run) -> None:
    assert_as_expected(alone[str(run)], run)


@pytest.mark.parametrize("run", TWO_RANKS, ids=str)
def test_two_ranks_equal_plain_float64_training(two_ranks: dict[str, Any], run: Run) -> None:
    assert_as_expected(two_ranks[str(run)], run)


def num_zeros(parameters: dict[str, torch.Tensor]) -> int:
    return sum(int((parameter == 0).sum()) for parameter in parameters.values())


@pytest.mark.parametrize("run", BFLOAT16, ids=str)
def test_backslash_acts_on_the_float32_masters_of_bfloat16_training(two_ranks: dict[str, Any], run: Run) -> None:
    zeros = num_zeros(expected(run))
    assert zeros > 1000
    assert num_zeros(two_ranks[str(run)]) == pytest.approx(zeros, rel=0.05)
