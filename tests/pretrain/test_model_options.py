"""Options in a run: what its configuration refuses, what its export holds, that a resumed run goes on as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForCausalLM

from mixwright.data_mixing.config_file import validate
from mixwright.data_mixing.errors import ConfigError
from mixwright.data_mixing.store import TokenStore
from mixwright.pretrain.config import ModelConfig, PretrainConfig
from mixwright.pretrain.errors import TrainingError
from mixwright.pretrain.head import LanguageModel
from mixwright.pretrain.model import build_model, export
from mixwright.pretrain.model_options.apply import begin_step, follow_updates
from mixwright.pretrain.model_options.config import ModelOptions
from mixwright.pretrain.model_options.exporting import HEAD_FILE, how_to_load
from mixwright.pretrain.proxy import ProxyConfig, ProxyRun, run_key, train_proxy
from tests.pretrain.proxies import ALIKE, DOMAINS, proxy_run, proxy_tree
from tests.pretrain.tiny import LLAMA, tiny_tree

UNTIED = {**LLAMA, "tie_word_embeddings": False}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
THREE = {"training__zero_stage": 3}
TOKENS = torch.arange(68).reshape(4, 17)
EACH: dict[str, dict[str, Any]] = {
    "late_dropout": {"p": 0.1, "start_step": 2},
    "generalised_gaussian_init": {"shape": 1.5},
    "backslash": {"strength": 0.05},
    "stochastic_experts": {"every": 1},
    "weight_compander": {},
    "normalised_softmax": {},
}


def error_of(options: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(PretrainConfig, {**tiny_tree(Path("runs"), Path("store"), **changes), "options": options}, "run.yaml")
    return str(caught.value)


def test_every_option_is_off_by_default_and_changes_nothing() -> None:
    tree = tiny_tree(Path("runs"), Path("store"))
    options = validate(PretrainConfig, tree, "run.yaml").options
    assert {getattr(options, name) for name in ModelOptions.model_fields} == {None}
    plain, same = (
        build_model(ModelConfig(config=LLAMA), vocab_size=97, sequence_length=16, eos_id=0, seed=0, **keys)
        for keys in ({}, {"options": options})
    )
    assert type(same) is LanguageModel
    assert [name for name, _ in same.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert torch.equal(same(TOKENS).nll_N, plain(TOKENS).nll_N)


@pytest.mark.parametrize(
    ("options", "changes", "expected"),
    [
        ({"backslash": EACH["backslash"]}, THREE, "backslash supports training.zero_stage 0 to 2, found 3"),
        ({"stochastic_experts": {}}, THREE, "stochastic_experts supports training.zero_stage 0 to 2"),
        ({"stochastic_experts": {}}, {"model__gradient_checkpointing": True}, "go with model.gradient_checkpointing"),
        ({"generalised_gaussian_init": {"shape": 1}}, {"model": {"path": "x"}}, "use model.config, not model.path"),
        ({"late_dropout": EACH["late_dropout"]}, {"training__dropout": [{"step": 1, "p": 0.1}]}, "both set dropout"),
        ({"late_dropout": {"p": 0.1, "start_step": 12}}, {}, "12 is never reached: training.num_steps = 12"),
        ({"late_dropout": {"p": 1.0, "start_step": 2}}, {}, "options.late_dropout.p"),
        ({"backslash": {"strength": float("nan")}}, {}, "options.backslash.strength"),
        ({"weight_compander": {"slope": 0.5}}, {}, "options.weight_compander.slope"),
        ({"normalised_softmax": {"normalise": "outputs"}}, {}, "options.normalised_softmax.normalise"),
        ({"back_slash": {}}, {}, "options.back_slash: unknown key; did you mean 'backslash'?"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(
    options: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    model = changes.pop("model", None)
    if model is None:
        message = error_of(options, **changes)
    else:
        tree = {**tiny_tree(Path("runs"), Path("store")), "model": model, "options": options}
        with pytest.raises(ConfigError) as caught:
            validate(PretrainConfig, tree, "run.yaml")
        message = str(caught.value)
    assert expected in message
    assert "\n" not in message


def trained(settings: dict[str, Any], options: ModelOptions) -> LanguageModel:
    """A model after ten steps, in evaluation."""
    config = ModelConfig(config=settings)
    model = build_model(config, vocab_size=97, sequence_length=16, eos_id=0, seed=0, options=options).train()
    groups = [[p for p in model.parameters() if (p.ndim >= 2) == matrix] for matrix in (True, False)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=1e-2)
    follow_updates(options, optimizer, model, lambda sums: sums)
    for step in range(10):
        begin_step(model, options, seed=0, step=step)
        model(TOKENS).nll_N.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def export_of(model: LanguageModel, tiny_store: Path, folder: Path) -> Path:
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    export(model, parameters, TokenStore.open(tiny_store).tokenizer_folder, folder)
    return folder


@pytest.mark.parametrize("settings", [LLAMA, UNTIED, GPT2], ids=["tied", "untied", "gpt2"])
@pytest.mark.parametrize("names", [*([name] for name in EACH), list(EACH)], ids=lambda names: "+".join(names)[:30])
def test_a_plain_model_loads_and_has_the_losses_of_the_trained_one(
    names: list[str], settings: dict[str, Any], tiny_store: Path, tmp_path: Path
) -> None:
    model = trained(settings, ModelOptions.model_validate({name: EACH[name] for name in names}))
    folder = export_of(model, tiny_store, tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert type(loaded) is type(model.causal_lm)
    logits = loaded(TOKENS[:, :-1]).logits.flatten(0, 1)
    losses_N = F.cross_entropy(logits, TOKENS[:, 1:].reshape(-1), reduction="none")
    torch.testing.assert_close(model(TOKENS).nll_N, losses_N, rtol=1e-5, atol=1e-5)
    assert model.causal_lm.config.tie_word_embeddings == settings.get("tie_word_embeddings", True)
    assert how_to_load(folder) == "transformers: AutoModelForCausalLM.from_pretrained"


@pytest.mark.parametrize("settings", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("normalise", ["hidden", "both"])
def test_normalised_hidden_states_are_exported_as_a_body_and_a_head_that_give_the_losses(
    normalise: str, settings: dict[str, Any], tiny_store: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    options = ModelOptions.model_validate(
        {"normalised_softmax": {"normalise": normalise}, "weight_compander": {}, "stochastic_experts": {}}
    )
    model = trained(settings, options)
    folder = export_of(model, tiny_store, tmp_path)
    body, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    hidden_BTD = F.normalize(body(TOKENS[:, :-1]).last_hidden_state, dim=-1)
    logits = (hidden_BTD @ load_file(folder / HEAD_FILE)["weight"].T).flatten(0, 1)
    losses_N = F.cross_entropy(logits, TOKENS[:, 1:].reshape(-1), reduction="none")
    torch.testing.assert_close(model(TOKENS).nll_N, losses_N, rtol=1e-5, atol=1e-5)
    assert HEAD_FILE in how_to_load(folder)
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert report["missing_keys"], "a causal language model would load without a word about its head"
    with pytest.raises(TrainingError, match="holds the body of a model without its head"):
        build_model(ModelConfig(path=str(folder)), vocab_size=97, sequence_length=16, eos_id=0, seed=0)


def test_proxy_runs_with_options_train_and_have_keys_of_their_own(tiny_store: Path) -> None:
    config = validate(ProxyConfig, {**proxy_tree(), "options": EACH}, "proxy")
    run = ProxyRun(store=tiny_store, domains=DOMAINS, policy=ALIKE, config=config)
    store = TokenStore.open(tiny_store)
    first, again = train_proxy(run, store), train_proxy(run, store)
    assert first.test == again.test
    assert first.last["letters"] < first.first["letters"]
    assert run_key(run, "fp") != run_key(proxy_run(tiny_store), "fp")


def test_options_that_are_off_give_a_proxy_run_no_other_key(tiny_store: Path) -> None:
    config = validate(ProxyConfig, {**proxy_tree(), "options": dict.fromkeys(EACH)}, "proxy")
    run = ProxyRun(store=tiny_store, domains=DOMAINS, policy=ALIKE, config=config)
    assert run_key(run, "fp") == run_key(proxy_run(tiny_store), "fp")
