"""Small proxy runs for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixwright.data_mixing.config_file import validate
from mixwright.pretrain.proxy import ProxyConfig, ProxyRun
from mixwright.pretrain.sweeps.fits import Problem
from tests.pretrain.tiny import LLAMA

DOMAINS = ("letters", "numbers", "colours")
ALIKE = {"kind": "static", "mixture": dict.fromkeys(DOMAINS, 1.0)}


def proxy_tree(num_steps: int = 6) -> dict[str, Any]:
    """A proxy configuration as YAML would hold it."""
    return {
        "model": {"config": dict(LLAMA)}, "optimizer": {"lr": 1e-2}, "schedule": {"warmup_steps": 2},
        "num_steps": num_steps, "rows_per_step": 6, "validation_rows": 4, "test_rows": 4,
    }  # fmt: skip


def proxy_run(store: Path, **changes: Any) -> ProxyRun:
    config = validate(ProxyConfig, proxy_tree(changes.pop("num_steps", 6)), "tiny proxy")
    return ProxyRun(**{"store": store, "domains": DOMAINS, "policy": ALIKE, "config": config, **changes})


def problem(store: Path, domains: tuple[str, ...] = DOMAINS, num_steps: int = 4) -> Problem:
    config = validate(ProxyConfig, proxy_tree(num_steps), "tiny proxy")
    return Problem(store, domains, config, seed=5, target=tuple([1 / len(domains)] * len(domains)))
