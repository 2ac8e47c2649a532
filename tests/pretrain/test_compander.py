from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.utils import parametrize

from mixwright.pretrain.config import ModelConfig
from mixwright.pretrain.head import LanguageModel
from mixwright.pretrain.model import build_model
from mixwright.pretrain.model_options.compander import Compander, companded, merge
from mixwright.pretrain.model_options.config import ModelOptions, WeightCompander
from tests.pretrain.tiny import LLAMA

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
TOKENS = torch.arange(34).reshape(2, 17)


def model_with(settings: dict[str, Any], **keys: Any) -> LanguageModel:
    options = ModelOptions(weight_compander=WeightCompander(**keys))
    config = ModelConfig(config=settings)
    return build_model(config, vocab_size=97, sequence_length=16, eos_id=0, seed=0, options=options).eval()


def fresh(**keys: Any) -> tuple[Compander, torch.Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(20, 30) * 0.02
    return Compander(weight, WeightCompander(**keys)).double(), weight.double()


def test_the_inverse_gives_the_weight_back() -> None:
    compander, weight = fresh(slope=1.7, headroom=3.0)
    torch.testing.assert_close(compander(compander.right_inverse(weight)), weight, rtol=1e-9, atol=1e-12)


def test_the_function_is_odd_increasing_bounded_and_steepest_at_zero() -> None:
    compander, weight = fresh(slope=1.7, headroom=3.0)
    v = torch.linspace(-10, 10, 20001, dtype=torch.float64, requires_grad=True)
    w = compander(v)
    torch.testing.assert_close(w, -w.flip(0))
    assert (w.diff() > 0).all()
    assert float(w.detach().abs().max()) < 3.0 * float(weight.abs().max())
    slopes = torch.autograd.grad(w.sum(), v)[0]
    assert float(slopes[10000]) == pytest.approx(1.7)
    assert slopes.argmax() == 10000


def test_the_gradient_is_a_b_over_b_squared_plus_v_squared() -> None:
    compander, _ = fresh()
    a, b = (float(torch.nn.functional.softplus(raw)) for raw in (compander.raw_height, compander.raw_width))
    v = torch.tensor([0.0, 0.01, -0.2], dtype=torch.float64, requires_grad=True)
    compander(v).sum().backward()
    torch.testing.assert_close(v.grad, a * b / (b**2 + v.detach() ** 2))


@pytest.mark.parametrize("settings", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_the_first_forward_is_that_of_the_plain_model(settings: dict[str, Any]) -> None:
    plain = build_model(ModelConfig(config=settings), vocab_size=97, sequence_length=16, eos_id=0, seed=0).eval()
    torch.testing.assert_close(model_with(settings)(TOKENS).nll_N, plain(TOKENS).nll_N, rtol=1e-5, atol=1e-6)


def test_projections_are_parametrised_and_embeddings_norms_and_the_head_are_not() -> None:
    model = model_with({**LLAMA, "tie_word_embeddings": False})
    names = [name for name, module in model.causal_lm.named_modules() if parametrize.is_parametrized(module)]
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(names) == 2 * len(kinds)
    assert {name.rpartition(".")[2] for name in names} == set(kinds)


def test_height_and_width_are_learned_unless_they_are_fixed() -> None:
    for learn in (True, False):
        model = model_with(LLAMA, learn=learn)
        model(TOKENS).nll_N.mean().backward()
        raws = [p for name, p in model.named_parameters() if "raw_" in name]
        assert len(raws) == 2 * 14
        assert all((p.grad is not None and bool(p.grad != 0)) == learn for p in raws)


def test_a_matrix_of_zeros_has_a_bound_all_the_same() -> None:
    compander = Compander(torch.zeros(3, 3), WeightCompander())
    assert torch.equal(compander(compander.right_inverse(torch.zeros(3, 3))), torch.zeros(3, 3))
    assert 0 < float(companded(torch.tensor(1e6), compander.raw_height, compander.raw_width)) < 2.1e-3
    assert math.isfinite(float(compander.raw_height))


def test_merging_leaves_plain_names_and_the_weights_in_use() -> None:
    model = model_with(LLAMA)
    state = merge(dict(model.causal_lm.named_parameters(remove_duplicate=False)))
    plain = build_model(ModelConfig(config=LLAMA), vocab_size=97, sequence_length=16, eos_id=0, seed=3)
    assert set(state) == {name for name, _ in plain.causal_lm.named_parameters(remove_duplicate=False)}
    for name, module in model.causal_lm.named_modules():
        if parametrize.is_parametrized(module):
            assert torch.equal(state[f"{name}.weight"], module.weight)
