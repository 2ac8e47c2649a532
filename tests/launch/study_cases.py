"""A study of three tiny corpora."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from mixwright.launch.mixing_study import GARBAGE
from tests.pretrain.proxies import DOMAINS, proxy_tree

WORDS = ("alpha beta gamma delta", "one two three four", "red green blue black")
ODM = {"kind": "odm", "round_steps": 1}


def write_study(folder: Path) -> None:
    """`study.yaml` with its corpora; one of them may be garbage."""
    for name, words in zip(DOMAINS, WORDS, strict=True):
        chance = random.Random(name)
        texts = [" ".join(chance.choices(words.split(), k=80)) for _ in range(80)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpora = {
        "output": "elsewhere", "sequence_length": 16, "tokenizer": {"train": {"vocab_size": 300}}, "num_workers": 1,
        "split": {"validation": 0.1, "test": 0.1}, "domains": {n: {"paths": [f"{n}.jsonl"]} for n in DOMAINS},
    }  # fmt: skip
    for name in ("corpora.yaml", "fallback.yaml"):
        (folder / name).write_text(yaml.safe_dump(corpora))
    tree: dict[str, Any] = {
        "corpora": "corpora.yaml", "fallback_corpora": "fallback.yaml", "folder": "work", "proxy": proxy_tree(4),
        "seeds": 2, "fit_steps": 2, "fit_seed": 100,
        "settings": {
            "pair": {"domains": ["letters", "numbers"], "note": "two lists"},
            "waste": {"domains": ["letters", "colours", GARBAGE], "garbage": True},
        },
        "policies": {"odm": {"policy": ODM}, "law": {"fit": "mixing_law"}, "graph": {"fit": "skill_it"}},
        "default_policies": ["odm", "law"],
    }  # fmt: skip
    (folder / "study.yaml").write_text(yaml.safe_dump(tree))
