from __future__ import annotations

import itertools
import math

import pytest
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mixwright.pretrain.config import DropoutPoint, ScheduleConfig
from mixwright.pretrain.schedules import apply_dropout, dropout_probability, learning_rate
from tests.pretrain.tiny import LLAMA


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    config = ScheduleConfig(kind="constant", warmup_steps=4)
    assert [learning_rate(config, 2.0, step, 10) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_cosine_is_half_way_down_in_the_middle_and_ends_at_the_final_ratio() -> None:
    config = ScheduleConfig(kind="cosine", warmup_steps=0, final_ratio=0.2)
    rates = [learning_rate(config, 1.0, step, 100) for step in range(100)]
    assert rates[49] == pytest.approx(0.6)
    assert rates[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(rates))
    assert rates[24] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_wsd_is_flat_until_the_decay_and_then_linear() -> None:
    config = ScheduleConfig(kind="wsd", warmup_steps=2, decay_steps=4, final_ratio=0.0)
    assert [learning_rate(config, 1.0, step, 10) for step in range(10)] == pytest.approx(
        [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0]
    )


def test_dropout_is_a_step_function_that_begins_with_its_first_point() -> None:
    points = [DropoutPoint(step=2, p=0.1), DropoutPoint(step=5, p=0.0)]
    assert [dropout_probability(points, step) for step in range(7)] == [None, None, 0.1, 0.1, 0.1, 0.0, 0.0]


@pytest.mark.parametrize(
    "settings",
    [
        {**LLAMA, "vocab_size": 64, "attention_dropout": 0.0},
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64},
    ],
)
def test_applied_dropout_changes_what_a_model_in_training_computes(settings: dict) -> None:
    import torch

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).train()
    tokens = torch.arange(16).reshape(2, 8)
    apply_dropout(model, 0.0)
    first, again = model(tokens).logits, model(tokens).logits
    apply_dropout(model, 0.5)
    dropped = model(tokens).logits
    assert torch.equal(first, again)
    assert not torch.equal(first, dropped)
    assert all(module.p == 0.5 for module in model.modules() if isinstance(module, nn.Dropout))
