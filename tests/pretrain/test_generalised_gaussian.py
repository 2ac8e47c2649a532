from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mixwright.pretrain.config import ModelConfig
from mixwright.pretrain.errors import TrainingError
from mixwright.pretrain.head import LanguageModel
from mixwright.pretrain.model import build_model
from mixwright.pretrain.model_options.backslash import moment_ratio
from mixwright.pretrain.model_options.config import GeneralisedGaussianInit, ModelOptions
from mixwright.pretrain.model_options.generalised_gaussian import draw
from tests.pretrain.tiny import LLAMA

WIDE = {**LLAMA, "hidden_size": 384, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}
GPT2 = {"model_type": "gpt2", "n_embd": 384, "n_layer": 2, "n_head": 2, "n_positions": 64}


def initialised(settings: dict[str, Any], vocab_size: int = 97, **keys: Any) -> LanguageModel:
    options = ModelOptions(generalised_gaussian_init=GeneralisedGaussianInit(**keys))
    config = ModelConfig(config=settings)
    return build_model(config, vocab_size=vocab_size, sequence_length=16, eos_id=0, seed=0, options=options)


@pytest.mark.parametrize("shape", [0.5, 1.0, 1.5, 2.0, 4.0])
def test_moments_are_those_of_the_distribution(shape: float) -> None:
    torch.manual_seed(0)
    values = draw(shape, 0.3, torch.Size((4_000_000,))).double()
    assert float(values.square().mean()) == pytest.approx(0.09, rel=0.01)
    assert float(values.mean()) == pytest.approx(0, abs=1e-3)
    ratio = float(values.square().mean() / values.abs().mean() ** 2)
    assert ratio == pytest.approx(moment_ratio(shape), rel=0.01)


def test_shape_two_is_gaussian_and_one_is_laplace() -> None:
    torch.manual_seed(0)
    values = {shape: draw(shape, 1.0, torch.Size((400_000,))) for shape in (1.0, 2.0)}
    for quantile in (0.6, 0.9, 0.99):
        normal, laplace = (float(values[shape].quantile(quantile)) for shape in (2.0, 1.0))
        assert normal == pytest.approx(math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * quantile - 1))), abs=0.02)
        assert laplace == pytest.approx(-math.log(2 * (1 - quantile)) / math.sqrt(2), abs=0.03)


@pytest.mark.parametrize("settings", [WIDE, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("shape", [1.0, 2.0])
def test_the_variance_of_every_projection_is_xi_over_what_it_sums(settings: dict[str, Any], shape: float) -> None:
    model = initialised(settings, shape=shape, xi=2.0)
    head = model.causal_lm.get_output_embeddings()
    squares: dict[float, list[float]] = {}
    for name, module in model.causal_lm.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or module is head:
            continue
        last = name.rpartition(".")[2]
        depth = 4 if last in ("o_proj", "down_proj", "c_proj") else 1
        fan_in = module.weight.shape[1] if isinstance(module, nn.Linear) else module.weight.shape[0]
        scaled = module.weight.detach().double().square() * fan_in * depth / 2.0
        squares.setdefault(depth, []).append(scaled.flatten())  # type: ignore[arg-type]
    assert sorted(squares) == [1, 4]
    for parts in squares.values():
        assert float(torch.cat(parts).mean()) == pytest.approx(1.0, rel=0.01)  # type: ignore[arg-type]


def test_residual_scaling_can_be_left_out() -> None:
    model = initialised(WIDE, shape=2.0, residual_scaling=False)
    weight = model.backbone.layers[0].mlp.down_proj.weight  # type: ignore[union-attr,index]
    assert float(weight.detach().double().square().mean()) * 768 == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_keep_their_standard_deviation_and_take_the_shape(tied: bool) -> None:
    model = initialised({**WIDE, "tie_word_embeddings": tied, "initializer_range": 0.05}, 2000, shape=0.8)
    embedding, projection = model.backbone.embed_tokens.weight, model.head.weight  # type: ignore[union-attr]
    assert (embedding is projection) == tied
    for weight in (embedding, projection):
        values = weight.detach().double()
        assert float(values.std()) == pytest.approx(0.05, rel=0.02)
        ratio = float(values.square().mean() / values.abs().mean() ** 2)
        assert ratio == pytest.approx(moment_ratio(0.8), rel=0.02)


def test_norms_and_biases_stay_and_the_same_seed_draws_the_same() -> None:
    first, same = initialised(GPT2, shape=1.0), initialised(GPT2, shape=1.0)
    plain = build_model(ModelConfig(config=GPT2), vocab_size=97, sequence_length=16, eos_id=0, seed=0)
    for (name, a), b, unchanged in zip(first.named_parameters(), same.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(a, unchanged) == (a.ndim < 2), name


def test_a_parameter_of_unknown_fan_in_is_refused_by_name() -> None:
    mamba = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    with pytest.raises(TrainingError, match=r"the fan-in of backbone.layers.0.mixer.A_log \[64, 4\] is not known"):
        initialised(mamba, shape=1.0)


def test_heavy_tails_below_shape_one() -> None:
    torch.manual_seed(0)
    assert float(draw(0.5, 1.0, torch.Size((400_000,))).abs().max()) > 15
    assert float(draw(2.0, 1.0, torch.Size((400_000,))).abs().max()) < 6
