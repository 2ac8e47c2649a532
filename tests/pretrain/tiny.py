"""Small configurations and models for the tests of the training stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixwright.data_mixing.config_file import validate
from mixwright.pretrain.config import PretrainConfig

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip


def tiny_tree(folder: Path, store: Path, **changes: Any) -> dict[str, Any]:
    """A run configuration as YAML would hold it; `changes` are `section__key=value`."""
    tree: dict[str, Any] = {
        "run": {"name": "tiny", "folder": str(folder), "seed": 3},
        "data": {"store": str(store)},
        "model": {"config": dict(LLAMA)},
        "optimizer": {"lr": 1e-2},
        "schedule": {"warmup_steps": 2},
        "training": {"num_steps": 12, "rows_per_step": 8, "micro_batch_rows": 4, "num_threads": 1},
        "mixing": {"policy": {"kind": "temperature", "temperature": 1.0}, "service": "none", "report_every": 5},
        "evaluation": {"every": 6, "rows_per_domain": 4, "test_rows_per_domain": 4},
        "checkpoint": {"every": 4, "keep": 2},
        "metrics": {"tensorboard": False},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree.setdefault(section, {})[name] = value
    return tree


def tiny_config(folder: Path, store: Path, **changes: Any) -> PretrainConfig:
    return validate(PretrainConfig, tiny_tree(folder, store, **changes), "tiny")
