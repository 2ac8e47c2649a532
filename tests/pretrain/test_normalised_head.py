from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixwright.kernels.linear_nll import linear_nll_reference
from mixwright.pretrain.config import ModelConfig
from mixwright.pretrain.head import LanguageModel
from mixwright.pretrain.model import build_model
from mixwright.pretrain.model_options.config import ModelOptions, NormalisedSoftmax
from mixwright.pretrain.model_options.normalised_head import NormalisedHead
from tests.pretrain.tiny import LLAMA

WAYS = ("output", "hidden", "both")
TOKENS = torch.arange(34).reshape(2, 17)


def model_with(settings: dict[str, Any] = LLAMA, vocab_size: int = 97, **keys: Any) -> LanguageModel:
    options = ModelOptions(normalised_softmax=NormalisedSoftmax(**keys))
    config = ModelConfig(config=settings)
    return build_model(config, vocab_size=vocab_size, sequence_length=16, eos_id=0, seed=0, options=options)


def head_with(**keys: Any) -> NormalisedHead:
    head = model_with(**keys).double().head
    assert isinstance(head, NormalisedHead)
    return head


def reference(head: NormalisedHead, way: str, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and output embeddings of the definition, in plain torch."""
    features_ND = hidden_ND if way == "output" else hidden_ND / hidden_ND.norm(dim=1, keepdim=True)
    weight_VD = head.weight if way == "hidden" else head.weight / head.weight.norm(dim=1, keepdim=True)
    return head.first_scale * head.gain.exp() * features_ND, weight_VD


@pytest.mark.parametrize("way", WAYS)
def test_losses_and_gradients_are_those_of_the_definition(way: str) -> None:
    head = head_with(normalise=way, scale=7.0)
    torch.manual_seed(0)
    hidden_ND = torch.randn(11, 32, dtype=torch.float64, requires_grad=True)
    targets_N, upstream_N = torch.randint(0, 97, (11,)), torch.randn(11, dtype=torch.float64)
    with torch.no_grad():
        head.gain.fill_(0.3)
    leaves = [hidden_ND, head.weight, head.gain]
    losses = [head(hidden_ND, targets_N), linear_nll_reference(*reference(head, way, hidden_ND), targets_N)]
    torch.testing.assert_close(losses[0].nll_N, losses[1].nll_N)
    torch.testing.assert_close(losses[0].lse_N, losses[1].lse_N)
    found, expected = (torch.autograd.grad((each.nll_N * upstream_N).sum(), leaves) for each in losses)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("way", WAYS)
def test_the_logits_of_a_few_tokens_are_those_that_the_losses_are_made_of(way: str) -> None:
    head = head_with(normalise=way)
    hidden_ND, targets_N = torch.randn(5, 32, dtype=torch.float64), torch.arange(5)
    expected_N = F.cross_entropy(head.logits(hidden_ND), targets_N, reduction="none")
    torch.testing.assert_close(head(hidden_ND, targets_N).nll_N, expected_N)


@pytest.mark.parametrize("way", WAYS)
def test_first_logits_have_about_unit_variance(way: str) -> None:
    head = head_with(settings={**LLAMA, "hidden_size": 128}, vocab_size=3000, normalise=way)
    hidden_ND = torch.randn(64, 128, dtype=torch.float64)
    assert float(head.logits(hidden_ND).std()) == pytest.approx(1.0, rel=0.1)


def test_the_scale_is_learned_unless_it_is_fixed() -> None:
    for learn in (True, False):
        model = model_with(scale=3.0, learn_scale=learn)
        model(TOKENS).nll_N.mean().backward()
        gradient = model.head.gain.grad  # type: ignore[union-attr]
        assert (gradient is not None and bool(gradient != 0)) == learn


def test_lengths_of_output_embeddings_do_not_matter_and_rows_of_zeros_are_finite() -> None:
    model = model_with({**LLAMA, "tie_word_embeddings": False})
    before = model(TOKENS).nll_N
    with torch.no_grad():
        model.head.weight.mul_(torch.rand(97, 1) + 0.5)
    torch.testing.assert_close(model(TOKENS).nll_N, before)
    with torch.no_grad():
        model.head.weight[3] = 0
    model(TOKENS).nll_N.mean().backward()
    assert torch.isfinite(model.head.weight.grad).all()


def test_tied_embeddings_stay_tied() -> None:
    model = model_with()
    assert model.head.weight is model.backbone.embed_tokens.weight  # type: ignore[union-attr]


@pytest.mark.parametrize("way", WAYS)
def test_no_saved_tensor_has_a_row_of_logits_for_every_token(way: str) -> None:
    """With a cache budget of nothing, the head keeps V D + N D values and never N V."""
    options = model_with(vocab_size=2000, normalise=way).head
    torch.manual_seed(0)
    hidden_ND = torch.randn(500, 32, requires_grad=True)
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    import mixwright.kernels.linear_nll as kernel

    budget, kernel.CPU_CACHE_BYTES = kernel.CPU_CACHE_BYTES, 0
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            options(hidden_ND, torch.randint(0, 2000, (500,))).nll_N.sum().backward()
    finally:
        kernel.CPU_CACHE_BYTES = budget
    assert max(sizes) <= 2000 * 32
