"""Small trained members of ensembles for tests, exported as runs export them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixwright.data_mixing.store import TokenStore
from mixwright.pretrain.config import ModelConfig
from mixwright.pretrain.ensemble.member import Member, inspect_member, parameters_hash, write_origin
from mixwright.pretrain.head import LanguageModel
from mixwright.pretrain.model import build_model, export
from tests.pretrain.tiny import LLAMA


def new_model(store: TokenStore, seed: int, **changes: Any) -> LanguageModel:
    """A tiny Llama that fits the store."""
    manifest = store.manifest
    return build_model(
        ModelConfig(config={**LLAMA, **changes}),
        vocab_size=manifest.vocab_size,
        sequence_length=manifest.sequence_length,
        eos_id=manifest.eos_id,
        seed=seed,
    )


def train(model: LanguageModel, store: TokenStore, seed: int, num_steps: int) -> None:
    """A few steps of AdamW on rows drawn with `seed`."""
    chance = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows_G = np.array([domain.num_rows for domain in store.domains()])
    for _ in range(num_steps):
        domain_n = chance.integers(0, len(rows_G), 8)
        row_n = chance.integers(0, rows_G[domain_n])
        rows_nS = np.asarray(store.gather(domain_n, row_n)).astype(np.int64)
        model(torch.from_numpy(rows_nS)).nll_N.mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def write_member(
    folder: Path, store: TokenStore, seed: int, *, init_seed: int | None = None, num_steps: int = 15, **changes: Any
) -> Member:
    """A trained member in `folder`; `changes` are of the model's configuration."""
    model = new_model(store, seed if init_seed is None else init_seed, **changes)
    origin = parameters_hash(model)
    train(model, store, seed, num_steps)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    export(model, parameters, store.tokenizer_folder, folder)
    write_origin(folder, origin)
    return inspect_member(folder)
