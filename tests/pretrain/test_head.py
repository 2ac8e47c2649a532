from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from mixwright.pretrain.config import ModelConfig
from mixwright.pretrain.errors import TrainingError
from mixwright.pretrain.head import LanguageModel
from mixwright.pretrain.model import build_model, num_parameters
from tests.pretrain.tiny import LLAMA

MODELS = [
    {**LLAMA, "tie_word_embeddings": True},
    {**LLAMA, "tie_word_embeddings": False},
    {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    {"model_type": "gpt_neox", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
     "num_attention_heads": 4, "max_position_embeddings": 64},
    {**LLAMA, "model_type": "gemma2", "final_logit_softcapping": 5.0, "head_dim": 8, "query_pre_attn_scalar": 8},
    {**LLAMA, "model_type": "granite", "logits_scaling": 4.0},
    {**LLAMA, "model_type": "cohere", "logit_scale": 0.25},
    {**LLAMA, "model_type": "qwen2"},
]  # fmt: skip


@pytest.mark.parametrize("settings", MODELS, ids=lambda s: f"{s['model_type']}-{s.get('tie_word_embeddings', '')}")
def test_losses_and_gradients_are_those_of_the_models_own_logits(settings: dict) -> None:
    torch.manual_seed(0)
    causal_lm = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(vocab_size=97, pad_token_id=None, **settings))
        .double()
        .eval()
    )
    tokens_BS = torch.randint(0, 97, (3, 12))
    upstream_N = torch.randn(33, dtype=torch.float64)
    logits_NV = causal_lm(tokens_BS[:, :-1], use_cache=False).logits.flatten(0, 1)
    expected_N = F.cross_entropy(logits_NV, tokens_BS[:, 1:].reshape(-1), reduction="none")
    (expected_N * upstream_N).sum().backward()
    expected = {name: p.grad.clone() for name, p in causal_lm.named_parameters()}
    causal_lm.zero_grad()
    losses = LanguageModel(causal_lm)(tokens_BS)
    (losses.nll_N * upstream_N).sum().backward()
    torch.testing.assert_close(losses.nll_N, expected_N, rtol=0, atol=1e-9)
    for name, parameter in causal_lm.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_tied_embedding_is_counted_and_trained_once() -> None:
    config = ModelConfig(config={**LLAMA, "tie_word_embeddings": True})
    model = build_model(config, vocab_size=97, sequence_length=16, eos_id=0, seed=0)
    assert num_parameters(model) == model.causal_lm.num_parameters()
    assert model.head.weight is model.backbone.embed_tokens.weight


def test_the_same_seed_builds_the_same_model() -> None:
    models = [
        build_model(ModelConfig(config=dict(LLAMA)), vocab_size=97, sequence_length=16, eos_id=0, seed=seed)
        for seed in (5, 5, 6)
    ]
    first, same, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_position_embeddings": 8}, "sequence_length = 16 exceeds the model's max_position_embeddings = 8"),
        ({"vocab_size": 50}, "model.vocab_size = 50 is smaller than the token store's vocabulary of 97"),
        ({"model_type": "lama"}, "no such model 'lama'; did you mean"),
        ({"hidden_act": "nonsense"}, "'llama' cannot be built"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(changes: dict, expected: str) -> None:
    with pytest.raises(TrainingError) as caught:
        build_model(ModelConfig(config={**LLAMA, **changes}), vocab_size=97, sequence_length=16, eos_id=0, seed=0)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_that_changes_its_logits_in_private_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    original = LlamaForCausalLM.forward

    def doubled(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", doubled)
    with pytest.raises(TrainingError, match="changes its logits after the output projection"):
        build_model(
            ModelConfig(config={**LLAMA, "initializer_range": 1.0}), vocab_size=97, sequence_length=16, eos_id=0, seed=0
        )
