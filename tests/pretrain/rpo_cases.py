"""Small models and configurations for the tests of preference runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mixwright.pretrain.progress import Progress
from tests.pretrain.preferences import CHAT, text_rows, write_rows, write_tokenizer
from tests.pretrain.tiny import LLAMA

NUM_STEPS = 12


def write_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A small Llama with its tokenizer, as a Hugging Face folder; its predictions are far from uniform."""
    write_tokenizer(folder, CHAT)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = {**LLAMA, "max_position_embeddings": 256, "initializer_range": 0.2, **changes}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    config = AutoConfig.for_model(**settings, **ends, vocab_size=len(tokenizer))
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def rpo_tree(folder: Path, model: Path, pairs: Path, **changes: Any) -> dict[str, Any]:
    """A run configuration as YAML would hold it; `changes` are `section__key=value`."""
    tree: dict[str, Any] = {
        "run": {"name": "aligned", "folder": str(folder), "seed": 3},
        "data": {"train": str(pairs), "held_out_pairs": 7, "max_tokens": 64, "max_prompt_tokens": 24},
        "model": {"path": str(model)},
        "objective": {"beta": 0.3, "sft": {"regulariser": "cumulative", "eta": 0.05}},
        "optimizer": {"lr": 3e-3, "weight_decay": 0.0},
        "schedule": {"warmup_steps": 2},
        "training": {
            "num_steps": NUM_STEPS, "pairs_per_step": 8, "micro_batch_pairs": 4, "num_threads": 1, "report_every": 3,
        },
        "evaluation": {"every": 6, "generations": 2, "kl_samples": 4, "max_new_tokens": 8},
        "checkpoint": {"every": 4, "keep": 2},
        "metrics": {"tensorboard": False},
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree.setdefault(section, {})[name] = value
    return tree


class Silent:
    """A watcher that shows nothing."""

    def say(self, text: str) -> None: ...
    def progress(self, progress: Progress) -> None: ...
    def close(self) -> None: ...
    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None: ...


def write_pairs(path: Path, count: int = 45) -> Path:
    return write_rows(path, text_rows(count))


def model_and_pairs(factory: pytest.TempPathFactory) -> Path:
    """A new folder with a model (`model`) and pairs (`pairs.jsonl`)."""
    folder = factory.mktemp("rpo")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl")
    return folder
