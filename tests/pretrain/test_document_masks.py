"""Documents of a row that do not see each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixwright.pretrain.config import ModelConfig
from mixwright.pretrain.errors import TrainingError
from mixwright.pretrain.head import LanguageModel, document_positions
from mixwright.pretrain.model import build_model

EOS = 0
SIZES = {
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
}


def model_of(kind: str, masks: bool) -> LanguageModel:
    settings: dict[str, Any] = {"model_type": kind, **SIZES[kind]}
    config = ModelConfig(config=settings, document_masks=masks)
    return build_model(config, vocab_size=61, sequence_length=16, eos_id=EOS, seed=1).eval()


def test_positions_begin_again_after_the_end_of_a_document() -> None:
    tokens_BT = torch.tensor([[5, 6, EOS, 7, 8, 9, EOS, EOS, 4], [EOS, 1, 2, 3, 4, 5, 6, 7, 8]])
    assert document_positions(tokens_BT, EOS).tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 0], [0, 0, 1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_a_document_inside_a_row_has_the_losses_that_it_has_alone(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows_BS = torch.randint(1, 61, (3, 17), generator=generator)
    rows_BS[:, 6] = EOS
    masked, plain = model_of(kind, masks=True), model_of(kind, masks=False)
    inside_BT = masked(rows_BS).nll_N.reshape(3, -1)[:, 7:]
    alone_BT = plain(rows_BS[:, 7:]).nll_N.reshape(3, -1)
    torch.testing.assert_close(inside_BT, alone_BT, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain(rows_BS).nll_N.reshape(3, -1)[:, 7:], alone_BT, atol=1e-3)


def test_a_model_that_cannot_keep_documents_apart_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"model.document_masks: "):
        model_of("mamba", masks=True)
