"""Log-probabilities of completions in every layout: against log_softmax in float64, one sequence at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mixwright.kernels.linear_nll import linear_nll
from mixwright.pretrain.errors import TrainingError
from mixwright.pretrain.rpo import attention
from mixwright.pretrain.rpo.config import Layout, LoraConfig, PolicyModelConfig
from mixwright.pretrain.rpo.groups import Group
from mixwright.pretrain.rpo.layout import lay_out
from mixwright.pretrain.rpo.policy import PolicyModel, load_policy
from tests.pretrain.tiny import LLAMA

VOCAB = 97
LAYOUTS: list[Layout] = ["shared_prompt", "packed", "padded"]
SCALE = {"initializer_range": 0.2}  # predictions far from uniform, so that a wrong context shows
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, **SCALE, "tie_word_embeddings": False},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **SCALE},
    "mistral": {**LLAMA, **SCALE, "model_type": "mistral", "sliding_window": 5},
    "gemma2": {**LLAMA, **SCALE, "model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8},
    "mamba": {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, **SCALE},
}


def causal_lm(name: str) -> Any:
    torch.manual_seed(0)
    ids = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(vocab_size=VOCAB, **ids, **MODELS[name]))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A Hugging Face folder per model."""
    folders = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, folder in folders.items():
        causal_lm(name).save_pretrained(folder)
    return {name: str(folder) for name, folder in folders.items()}


def load(folder: str, layout: Layout = "shared_prompt", **settings: Any) -> PolicyModel:
    return load_policy(PolicyModelConfig(path=folder, **settings), layout=layout)


def draw_groups(num_completions: int, num_groups: int = 3) -> list[Group]:
    """Unequal lengths; the first group has a completion of one token, the second no prompt."""
    chance = np.random.default_rng(0)

    def tokens(size: int) -> np.ndarray:
        return chance.integers(0, VOCAB, size).astype(np.int32)

    lengths = [(6, (4, 1, 5)), (0, (3, 7, 2)), (2, (9, 2, 3))][:num_groups]
    return [
        Group(index, tokens(prompt), tuple(map(tokens, completions[:num_completions])))
        for index, (prompt, completions) in enumerate(lengths)
    ]


def brute_force(model: Any, groups: list[Group]) -> tuple[Tensor, Tensor]:
    """Sums of log-probabilities and of entropies of each completion, [P, C], in the model's dtype."""
    found = []
    for group in groups:
        for completion in group.completions:
            tokens_T = torch.from_numpy(np.concatenate([group.prompt, completion]).astype(np.int64))
            logp_TV = torch.log_softmax(model(input_ids=tokens_T[None, :-1], use_cache=False).logits[0], 1)
            first = max(len(group.prompt), 1)
            logp_T = logp_TV.gather(1, tokens_T[1:, None])[:, 0]
            found.append((logp_T[first - 1 :].sum(), -(logp_TV.exp() * logp_TV).sum(1)[first - 1 :].sum()))
    logp, entropy = (torch.stack(values).reshape(len(groups), -1) for values in zip(*found, strict=True))
    return logp, entropy


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Of all parameters, which are left without any."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def backpropagate(policy: PolicyModel, groups: list[Group], layout: Layout) -> dict[str, Tensor]:
    logp_PC = policy(lay_out(groups, layout)).logp_PC
    upstream_PC = torch.randn(logp_PC.shape, generator=torch.Generator().manual_seed(5))
    (logp_PC * upstream_PC).sum().backward()
    return gradients(policy)


@pytest.mark.parametrize(("num_completions", "num_groups"), [(2, 1), (3, 3)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "error"), [("gpt2", 1e-9), ("llama", 1e-5), ("mistral", 1e-5)])
def test_values_and_gradients_are_those_of_single_sequences(
    folder_of: dict[str, str], name: str, error: float, layout: Layout, num_completions: int, num_groups: int
) -> None:
    """In float64, but for the norms of Llama and Mistral, which `transformers` computes in float32."""
    groups = draw_groups(num_completions, num_groups)
    plain = causal_lm(name).double().eval()
    expected_PC, expected_entropy_PC = brute_force(plain, groups)
    upstream_PC = torch.randn(expected_PC.shape)
    (expected_PC * upstream_PC).sum().backward()
    expected = {id(parameter): parameter.grad for parameter in plain.parameters()}
    policy = load(folder_of[name], layout).double()
    found = policy(lay_out(groups, layout), entropy=True)
    assert found.logp_PC.dtype == torch.float32
    torch.testing.assert_close(found.logp_PC, expected_PC.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.entropy_PC, expected_entropy_PC.float(), rtol=1e-6, atol=1e-6)
    assert not found.entropy_PC.requires_grad
    (found.logp_PC * upstream_PC).sum().backward()
    pairs = zip(plain.named_parameters(), policy.causal_lm.named_parameters(), strict=True)
    for (key, parameter), (own_key, own) in pairs:
        assert key == own_key
        torch.testing.assert_close(
            own.grad, expected[id(parameter)], rtol=error, atol=error, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_completion_does_not_see_what_is_beside_it(folder_of: dict[str, str], layout: Layout) -> None:
    policy = load(folder_of["llama"], layout)
    groups = draw_groups(2)
    before_PC = policy(lay_out(groups, layout)).logp_PC
    other = Group(0, groups[0].prompt, (groups[0].completions[0], (groups[0].completions[1] + 1) % VOCAB))
    longer = Group(2, groups[2].prompt, (np.flip(groups[2].completions[0]).copy(), groups[2].completions[1]))
    after_PC = policy(lay_out([other, groups[1], longer], layout)).logp_PC
    same = before_PC == after_PC
    assert same.tolist() == [[True, False], [True, True], [False, True]]


def test_the_order_of_groups_is_the_order_of_results(folder_of: dict[str, str]) -> None:
    policy, groups = load(folder_of["llama"]), draw_groups(3)
    forwards = policy(lay_out(groups, "shared_prompt"))
    backwards = policy(lay_out(groups[::-1], "shared_prompt"))
    torch.testing.assert_close(forwards.logp_PC, backwards.logp_PC.flip(0), rtol=0, atol=1e-5)
    assert forwards.length_PC.tolist() == [[4, 1, 5], [2, 6, 1], [9, 2, 3]]


def test_two_runs_give_the_same_bits(folder_of: dict[str, str]) -> None:
    first, second = (backpropagate(load(folder_of["llama"]), draw_groups(3), "shared_prompt") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_checkpointed_layers_are_computed_again_in_their_blocks(folder_of: dict[str, str], name: str) -> None:
    found, calls = [], []
    for checkpointing in (False, True):
        policy = load(folder_of[name], gradient_checkpointing=checkpointing)
        projection = dict(policy.named_modules())[
            "backbone.layers.0.self_attn.q_proj" if name == "llama" else "backbone.h.0.attn.c_attn"
        ]
        calls.append(0)
        projection.register_forward_hook(lambda *_: calls.append(calls.pop() + 1))
        found.append(backpropagate(policy, draw_groups(2), "shared_prompt"))
    assert calls == [1, 2]
    for key in found[0]:
        torch.testing.assert_close(found[1][key], found[0][key], rtol=1e-6, atol=1e-7)


def test_new_adapters_change_nothing_and_are_all_that_is_trained(folder_of: dict[str, str]) -> None:
    packed = lay_out(draw_groups(2), "shared_prompt")
    base_PC = load(folder_of["llama"])(packed).logp_PC
    policy = load(folder_of["llama"], lora=LoraConfig(rank=2, alpha=4.0), gradient_checkpointing=True)
    found_PC = policy(packed).logp_PC
    assert torch.equal(found_PC, base_PC)
    found_PC.sum().backward()
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trained == set(gradients(policy))
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2 * 7 * 2  # two matrices, seven projections, two layers


def test_without_its_adapters_a_policy_is_its_reference_again(folder_of: dict[str, str]) -> None:
    packed = lay_out(draw_groups(2), "shared_prompt")
    policy = load(folder_of["llama"], lora=LoraConfig(rank=2, alpha=4.0))
    base_PC = policy(packed).logp_PC
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert not torch.allclose(policy(packed).logp_PC, base_PC)
    with policy.without_adapters():
        assert torch.equal(policy(packed).logp_PC, base_PC)
    assert policy(packed).logp_PC.requires_grad
    with pytest.raises(ValueError, match="trains no adapters"):
        load(folder_of["llama"]).without_adapters()


def test_adapters_are_drawn_from_their_seed(folder_of: dict[str, str]) -> None:
    config = PolicyModelConfig(path=folder_of["llama"], lora=LoraConfig(rank=2))
    models = [load_policy(config, layout="padded", seed=seed) for seed in (1, 1, 2)]
    first, same, other = (
        torch.cat([p.flatten() for n, p in m.named_parameters() if "lora_A" in n]) for m in models
    )  # fmt: skip
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_16_bit_logits_are_formed_in_float32(folder_of: dict[str, str]) -> None:
    policy = load(folder_of["llama"]).bfloat16()
    packed = lay_out(draw_groups(2), "shared_prompt")
    heard: list[Tensor] = []
    policy.head.register_forward_pre_hook(lambda _, arguments: heard.append(arguments[0].detach()))
    found_PC = policy(packed).logp_PC
    [hidden_MD] = heard
    assert hidden_MD.dtype == torch.bfloat16
    exact_M = linear_nll(hidden_MD.double(), policy.head.weight.detach().double(), packed.target_M).nll_N
    rounded_M = linear_nll(hidden_MD, policy.head.weight, packed.target_M).nll_N
    exact_PC = torch.stack([part.sum() for part in exact_M.split(packed.length_PC.flatten().tolist())])
    assert (found_PC.flatten() + exact_PC).abs().max() < 1e-4
    assert (rounded_M - exact_M).abs().max() > 1e-3


def test_dropout_is_off_where_the_model_has_some(folder_of: dict[str, str]) -> None:
    assert causal_lm("gpt2").config.attn_pdrop > 0
    policy, packed = load(folder_of["gpt2"]), lay_out(draw_groups(2), "shared_prompt")
    assert policy.training
    assert torch.equal(policy(packed).logp_PC, policy.eval()(packed).logp_PC)


def test_a_model_that_attends_in_blocks_still_writes_after_padded_prompts(folder_of: dict[str, str]) -> None:
    tokens_BT = torch.tensor([[0, 0, 0, 5, 6], [9, 8, 7, 6, 5]])
    mask_BT = (tokens_BT != 0).long()
    settings = {"attention_mask": mask_BT, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    plain, ours = causal_lm("mistral").eval(), load(folder_of["mistral"]).eval().causal_lm
    assert ours.generate(tokens_BT, **settings).tolist() == plain.generate(tokens_BT, **settings).tolist()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gemma2", "model type 'gemma2' cannot be given the layout 'packed': its attention has a soft cap"),
        ("mamba", "model type 'mamba' cannot be given the layout 'packed'"),
    ],
)
def test_a_model_whose_attention_cannot_be_replaced_is_told_the_way_out(
    folder_of: dict[str, str], name: str, expected: str
) -> None:
    with pytest.raises(TrainingError) as caught:
        load(folder_of[name], "packed")
    assert str(caught.value).startswith(expected)
    assert str(caught.value).endswith("; use training.layout: padded")
    assert "\n" not in str(caught.value)
    groups = draw_groups(2)
    expected_PC, _ = brute_force(causal_lm(name).eval(), groups)
    found_PC = load(folder_of[name], "padded")(lay_out(groups, "padded")).logp_PC
    torch.testing.assert_close(found_PC, expected_PC, rtol=1e-5, atol=1e-5)


def test_a_model_that_does_not_keep_blocks_apart_is_refused(
    folder_of: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *arguments, blocks=None, **options: kept(*arguments, **options))
    with pytest.raises(
        TrainingError, match="gives other log-probabilities in training with the layout 'shared_prompt'"
    ):
        load(folder_of["llama"])


def test_blocks_are_refused_by_a_model_that_would_not_keep_them_apart(folder_of: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="loaded for the padded layout"):
        load(folder_of["llama"], "padded")(lay_out(draw_groups(2), "packed"))


def test_an_adapter_of_the_output_projection_is_refused(folder_of: dict[str, str]) -> None:
    with pytest.raises(TrainingError, match=r"target_modules: \['lm_head', 'q_proj'\] takes in the output projection"):
        load(folder_of["llama"], lora=LoraConfig(target_modules=("lm_head", "q_proj")))
    with pytest.raises(TrainingError, match="target_modules: 'nothing'"):
        load(folder_of["llama"], lora=LoraConfig(target_modules="nothing"))


def test_too_few_positions_are_refused(folder_of: dict[str, str]) -> None:
    config = PolicyModelConfig(path=folder_of["llama"])
    with pytest.raises(TrainingError, match="up to 65 tokens exceed the model's max_position_embeddings = 64"):
        load_policy(config, layout="packed", max_tokens=65)


def test_a_folder_that_lacks_parameters_is_refused(folder_of: dict[str, str], tmp_path: Path) -> None:
    causal_lm("llama").model.save_pretrained(tmp_path)
    with pytest.raises(TrainingError, match=r"lacks 1 parameters, the first 'lm_head.weight'"):
        load(str(tmp_path))
