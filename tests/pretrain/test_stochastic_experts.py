from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mixwright.pretrain.config import ModelConfig
from mixwright.pretrain.errors import TrainingError
from mixwright.pretrain.head import LanguageModel
from mixwright.pretrain.model import build_model
from mixwright.pretrain.model_options import stochastic_experts
from mixwright.pretrain.model_options.apply import begin_step
from mixwright.pretrain.model_options.config import ModelOptions, StochasticExperts
from mixwright.pretrain.model_options.stochastic_experts import Paths, consistency, half_symmetric_kl, paths_of
from tests.pretrain.tiny import LLAMA

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": 64}
TOKENS = torch.arange(68).reshape(4, 17)
THREE = ModelOptions(stochastic_experts=StochasticExperts(num_experts=3, every=1, alpha=2.0))


def model_with(settings: dict[str, Any], options: ModelOptions = THREE, seed: int = 0) -> LanguageModel:
    config = ModelConfig(config={"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, **settings})
    return build_model(config, vocab_size=97, sequence_length=16, eos_id=0, seed=seed, options=options).train()


def chosen(model: LanguageModel) -> list[tuple[int, int]]:
    return [module._chosen for module in paths_of(model)]


def test_the_golden_pair_of_predictions() -> None:
    value = half_symmetric_kl(torch.tensor([[2.0, 0, -1]]), torch.tensor([[1, 0.5, -1]]))
    assert float(value) == pytest.approx(0.193352, abs=1e-6)


def test_logits_of_120_have_a_finite_loss_and_finite_gradients() -> None:
    first = torch.tensor([[120.0, 0, -120]], requires_grad=True)
    second = torch.tensor([[-120.0, 0, 120]], requires_grad=True)
    value = half_symmetric_kl(first, second)
    value.sum().backward()
    assert value.item() == pytest.approx(240)
    assert torch.isfinite(first.grad).all()
    assert torch.isfinite(second.grad).all()


def test_the_gradient_is_the_numerical_one() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(half_symmetric_kl, logits)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_blocks_of_tokens_give_the_values_and_gradients_of_all_at_once(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stochastic_experts, "rows_per_scratch", lambda *_: rows)
    head = model_with({**LLAMA, "model_type": "gemma2", "final_logit_softcapping": 5.0, "head_dim": 8}).double().head
    torch.manual_seed(0)
    first, second = (torch.randn(10, 32, dtype=torch.float64, requires_grad=True) for _ in range(2))
    upstream = torch.randn(10, dtype=torch.float64)
    leaves = [first, second, head.weight]

    def gradients(value: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((value * upstream).sum(), leaves)

    p, q = (torch.softmax(5 * torch.tanh(hidden @ head.weight.T / 5), -1) for hidden in (first, second))
    expected = 0.5 * ((p - q) * (p.log() - q.log())).sum(-1)
    value = consistency(head, first, second)
    torch.testing.assert_close(value, expected)
    for found, wanted in zip(gradients(value), gradients(expected), strict=True):
        torch.testing.assert_close(found, wanted)


def test_every_second_layer_has_experts_that_differ_but_are_distributed_alike() -> None:
    model = model_with(GPT2, ModelOptions(stochastic_experts=StochasticExperts()))
    layers = model.backbone.h  # type: ignore[union-attr]
    assert [isinstance(layer.mlp, Paths) for layer in layers] == [True, False, True, False]  # type: ignore[union-attr]
    first, second = layers[0].mlp.paths  # type: ignore[index,union-attr]
    assert not torch.equal(first.c_fc.weight, second.c_fc.weight)
    assert torch.equal(first.c_fc.weight.flatten().sort().values, second.c_fc.weight.flatten().sort().values)


def test_draws_follow_seed_and_step_alone_and_use_every_expert() -> None:
    model, other_rank = model_with(GPT2), model_with(GPT2, seed=1)
    seen = []
    for step in range(40):
        begin_step(model, THREE, seed=5, step=step)
        begin_step(other_rank, THREE, seed=5, step=step)
        assert chosen(model) == chosen(other_rank)
        seen.append(chosen(model))
    begin_step(model, THREE, seed=5, step=7)
    assert chosen(model) == seen[7]
    begin_step(model, THREE, seed=6, step=7)
    assert chosen(model) != seen[7]
    counts = torch.tensor(seen).flatten().bincount()
    assert counts.sum() == 40 * 4 * 2
    assert counts.min() > 80
    assert any(first != second for first, second in seen[0] + seen[1])


def test_the_gradient_is_that_of_both_passes_and_their_consistency() -> None:
    model = model_with({**LLAMA, "num_hidden_layers": 3}).double()
    begin_step(model, THREE, seed=5, step=1)
    assert any(first != second for first, second in chosen(model))
    model(TOKENS).nll_N.mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = []
    for which in (0, 1):
        for module in paths_of(model):
            module.take(which)
        logits.append(model.causal_lm(TOKENS[:, :-1], use_cache=False).logits.flatten(0, 1))
    targets = TOKENS[:, 1:].reshape(-1)
    both = sum(torch.nn.functional.cross_entropy(each, targets) for each in logits)
    p, q = (each.softmax(-1) for each in logits)
    penalty = 0.5 * ((p - q) * (p.log() - q.log())).sum(-1).mean()
    (0.5 * (both + 2.0 * penalty)).backward()
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[name], expected, msg=lambda m, n=name: f"{n}: {m}")


def test_reported_losses_stay_plain_cross_entropy() -> None:
    model = model_with(LLAMA)
    begin_step(model, THREE, seed=5, step=1)
    with_gradients = model(TOKENS)
    with torch.no_grad():
        without = model(TOKENS)
    assert torch.equal(with_gradients.nll_N.detach(), without.nll_N)


def test_an_idle_expert_has_a_gradient_of_zero() -> None:
    model = model_with(LLAMA)
    begin_step(model, THREE, seed=5, step=1)
    model(TOKENS).nll_N.mean().backward()
    for module in paths_of(model):
        for number, path in enumerate(module.paths):
            gradient = path.up_proj.weight.grad
            assert gradient is not None
            assert bool((gradient != 0).any()) == (number in module._chosen)


def test_evaluation_uses_the_first_expert_whatever_was_drawn() -> None:
    model = model_with(LLAMA)
    with torch.no_grad():
        losses = []
        for step in range(4):
            begin_step(model, THREE, seed=5, step=step)
            losses.append(model.eval()(TOKENS).nll_N)
    assert all(torch.equal(losses[0], other) for other in losses[1:])
    plain = build_model(ModelConfig(config=LLAMA), vocab_size=97, sequence_length=16, eos_id=0, seed=0).eval()
    assert torch.equal(losses[0], plain(TOKENS).nll_N)


def test_training_brings_the_passes_together() -> None:
    gaps = {}
    for alpha in (0.0, 200.0):
        options = ModelOptions(stochastic_experts=StochasticExperts(every=1, alpha=alpha))
        model = model_with(LLAMA, options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(15):
            begin_step(model, options, seed=0, step=step)
            model(TOKENS).nll_N.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        for module in paths_of(model):
            module.choose(0, 1)
        with torch.no_grad():
            hidden = [model._hidden_of_pass(TOKENS, which) for which in (0, 1)]
            gaps[alpha] = float(consistency(model.head, *hidden).mean())
    assert gaps[200.0] < gaps[0.0] / 2


def test_experts_of_a_loaded_model_begin_as_equal_copies(tmp_path: Any) -> None:
    plain = build_model(ModelConfig(config=LLAMA), vocab_size=97, sequence_length=16, eos_id=0, seed=0)
    plain.causal_lm.save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path))
    model = build_model(config, vocab_size=97, sequence_length=16, eos_id=0, seed=1, options=THREE)
    for module in paths_of(model):
        first, *others = module.paths
        assert all(torch.equal(first.up_proj.weight, other.up_proj.weight) for other in others)


def test_a_model_without_plain_mlps_is_refused_in_one_line() -> None:
    mamba = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    with pytest.raises(TrainingError) as caught:
        build_model(ModelConfig(config=mamba), vocab_size=97, sequence_length=16, eos_id=0, seed=0, options=THREE)
    assert str(caught.value) == (
        "options.stochastic_experts: layers of model type 'mamba' have no plain `mlp` to replicate, they hold norm, "
        "mixer"
    )
