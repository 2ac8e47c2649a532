"""Preference files and small tokenizers for tests, with and without chat templates."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast

from mixwright.data_mixing.tokenizer import train_tokenizer
from mixwright.pretrain.rpo.config import PairDataConfig
from mixwright.pretrain.rpo.pairs import PreparedPairs, prepare_pairs
from tests.data_mixing.corpora_for_tests import sentences

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BOS, START, END = "<s>", "<|im_start|>", "<|im_end|>"


def write_tokenizer(folder: Path, template: str | None = None, post: str | None = None, bos: str | None = BOS) -> Path:
    """A byte-level BPE in a Hugging Face folder; `post` is what it makes of a text, as in `<s> $A <|im_end|>`."""
    texts = [*sentences(1, 60), *["assistant\n", "\n\n\n", "user\n"] * 40]
    tokenizer = train_tokenizer(texts, 400)
    tokenizer.add_special_tokens([BOS, START, END])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    if post is not None:
        special = [(token, tokenizer.token_to_id(token)) for token in (BOS, END)]
        tokenizer.post_processor = processors.TemplateProcessing(single=post, special_tokens=special)
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=END, additional_special_tokens=[START]
    )
    whole.chat_template = template
    whole.save_pretrained(folder)
    return folder


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def text_rows(count: int, num_prompts: int | None = None) -> list[dict[str, Any]]:
    """Rows of texts of different lengths; with `num_prompts`, that many prompts take turns."""
    words = sentences(5, 3 * count, num_words=9)
    return [
        {
            "prompt": words[3 * (i % (num_prompts or count))],
            "chosen": " " + words[3 * i + 1] * (1 + i % 3),
            "rejected": " " + words[3 * i + 2][: 5 + 7 * (i % 5)],
        }
        for i in range(count)
    ]


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """JSONL, gzipped if its name says so; a row that is bytes is written as it stands."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    content = b"".join(line + b"\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def prepare(
    train: Path, tokenizer: Path, folder: Path, seed: int = 3, chat_template: Path | None = None, **settings: Any
) -> PreparedPairs:
    """`prepare_pairs` without a word."""
    config = PairDataConfig(train=str(train), **settings)
    return prepare_pairs(
        config,
        model_folder=str(tokenizer),
        chat_template=chat_template,
        folder=folder,
        seed=seed,
        say=lambda text: None,
        progress=lambda stage, done, total: None,
    )


def ids_of(pairs: PreparedPairs) -> list[list[list[int]]]:
    """Prompt, chosen and rejected of all pairs to train on."""
    groups = [pairs.train.group(i) for i in range(len(pairs.train))]
    return [[part.tolist() for part in (group.prompt, *group.completions)] for group in groups]
