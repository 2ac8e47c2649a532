from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mixwright.pretrain.config import ModelConfig
from mixwright.pretrain.errors import TrainingError
from mixwright.pretrain.head import LanguageModel, seed_step
from mixwright.pretrain.model import build_model
from mixwright.pretrain.model_options.apply import begin_step
from mixwright.pretrain.model_options.config import LateDropout, ModelOptions
from mixwright.pretrain.model_options.late_dropout import late_dropout_probability
from tests.pretrain.tiny import LLAMA

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
MAMBA = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
TOKENS = torch.arange(34).reshape(2, 17)


def model_with(settings: dict[str, Any], options: ModelOptions) -> LanguageModel:
    config = ModelConfig(config=settings)
    return build_model(config, vocab_size=97, sequence_length=16, eos_id=0, seed=0, options=options).train()


def test_a_step_function_is_off_and_then_on() -> None:
    config = LateDropout(p=0.2, start_step=3)
    assert [late_dropout_probability(config, step) for step in range(6)] == [0.0, 0.0, 0.0, 0.2, 0.2, 0.2]


def test_a_ramp_rises_in_equal_parts_to_its_rate() -> None:
    config = LateDropout(p=0.2, start_step=2, ramp_steps=4)
    rates = [late_dropout_probability(config, step) for step in range(8)]
    assert rates == pytest.approx([0.0, 0.0, 0.05, 0.1, 0.15, 0.2, 0.2, 0.2])


@pytest.mark.parametrize("settings", [LLAMA, {**LLAMA, "attention_dropout": 0}, GPT2], ids=["llama", "zero", "gpt2"])
def test_losses_are_random_from_the_first_step_with_dropout_on_and_not_before(settings: dict[str, Any]) -> None:
    options = ModelOptions(late_dropout=LateDropout(p=0.3, start_step=5))
    model = model_with(settings, options)
    begin_step(model, options, seed=0, step=4)
    assert torch.equal(model(TOKENS).nll_N, model(TOKENS).nll_N)
    begin_step(model, options, seed=0, step=5)
    assert not torch.equal(model(TOKENS).nll_N, model(TOKENS).nll_N)
    model.eval()
    assert torch.equal(model(TOKENS).nll_N, model(TOKENS).nll_N)


def test_a_resumed_step_drops_what_it_dropped() -> None:
    options = ModelOptions(late_dropout=LateDropout(p=0.3, start_step=2, ramp_steps=3))
    losses = []
    for steps in (range(5), range(3, 5)):
        model = model_with(GPT2, options)
        for step in steps:
            seed_step(7, step, rank=0)
            begin_step(model, options, seed=7, step=step)
            last = model(TOKENS).nll_N
        losses.append(last)
    assert torch.equal(*losses)


def test_a_models_own_dropout_is_off_before_the_start() -> None:
    options = ModelOptions(late_dropout=LateDropout(p=0.3, start_step=5))
    model = model_with({**GPT2, "resid_pdrop": 0.1}, options)
    begin_step(model, options, seed=0, step=0)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.0}


def test_recomputed_activations_drop_what_the_forward_dropped() -> None:
    options = ModelOptions(late_dropout=LateDropout(p=0.3, start_step=0))
    gradients = []
    for checkpointing in (False, True):
        config = ModelConfig(config={**LLAMA, "num_hidden_layers": 3}, gradient_checkpointing=checkpointing)
        model = build_model(config, vocab_size=97, sequence_length=16, eos_id=0, seed=0, options=options).train()
        begin_step(model, options, seed=0, step=0)
        seed_step(0, 0, rank=0)
        model(TOKENS).nll_N.mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)


def test_a_model_without_dropout_is_refused_in_one_line() -> None:
    with pytest.raises(TrainingError) as caught:
        model_with(MAMBA, ModelOptions(late_dropout=LateDropout(p=0.3, start_step=5)))
    assert str(caught.value).startswith("options.late_dropout: model type 'mamba' has nothing to drop")
    assert "\n" not in str(caught.value)
