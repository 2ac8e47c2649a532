"""What each model option does to a small run: test loss and step time beside the plain model, at equal tokens.

    python -m tests.benchmarks.bench_model_options [--steps 150] [--seeds 2] [--only NAME ...]

Same rows in the same order, same initial seed, one thread; options take turns, seed by seed, beside a plain run each.
Needs the token store of `make quickstart`. A small Llama over its first tokens: it shows costs, and whether an option
trains; it does not show what the option's authors claim for large models or many epochs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch

from mixwright.data_mixing.config_file import validate
from mixwright.data_mixing.store import TokenStore
from mixwright.pretrain.model_options.backslash import Shrinking
from mixwright.pretrain.model_options.config import BackSlash
from mixwright.pretrain.objective import weighting_at
from mixwright.pretrain.proxy import ProxyConfig, ProxyRun, ProxyTrainer, genesis_of
from mixwright.pretrain.proxy_mixture import steering

STORE = Path("runs/quickstart-store")
MODEL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": True,
    "initializer_range": 0.1,
}  # fmt: skip


def cases(num_steps: int) -> dict[str, dict[str, Any]]:
    """Options by name; `plain` first."""
    return {
        "plain": {},
        "late_dropout 0.1 from half": {"late_dropout": {"p": 0.1, "start_step": num_steps // 2}},
        "init shape 2": {"generalised_gaussian_init": {"shape": 2}},
        "init shape 1": {"generalised_gaussian_init": {"shape": 1}},
        "backslash 0.01": {"backslash": {"strength": 0.01}},
        "backslash 0.1": {"backslash": {"strength": 0.1}},
        "experts alpha 1": {"stochastic_experts": {"alpha": 1}},
        "compander": {"weight_compander": {}},
        "normalised output": {"normalised_softmax": {}},
        "normalised both": {"normalised_softmax": {"normalise": "both"}},
    }


class Measured(NamedTuple):
    """Mean test nats per token over domains, median seconds of a step, share of zeros and shape of the matrices."""

    loss: float
    step_s: float
    zeros: float
    shape: float


def measure(store: TokenStore, options: dict[str, Any], seed: int, num_steps: int) -> Measured:
    tree = {
        "model": {"config": MODEL}, "options": options, "optimizer": {"lr": 3e-3}, "schedule": {"warmup_steps": 15},
        "num_steps": num_steps, "rows_per_step": 4, "validation_rows": 1, "test_rows": 16,
    }  # fmt: skip
    names = tuple(domain.name for domain in store.domains())
    config = validate(ProxyConfig, tree, "bench")
    policy = {"kind": "static", "mixture": dict.fromkeys(names, 1.0)}
    run = ProxyRun(store=STORE, domains=names, policy=policy, config=config, seed=seed)
    genesis = genesis_of(run, store)
    mixture, trainer = steering(policy, genesis), ProxyTrainer(run, store, genesis)
    seconds = []
    for step in range(num_steps):
        refs, began = mixture.plan.rows(step), time.perf_counter()
        trainer.begin_step(step)
        trainer.objective.begin(*weighting_at(mixture.plan, step))
        trainer.forward_backward(refs)
        trainer.update(step)
        seconds.append(time.perf_counter() - began)
    matrices = [p.detach() for p in trainer.model.parameters() if p.ndim >= 2]
    num_values = sum(matrix.numel() for matrix in matrices)
    zeros = sum(int((matrix == 0).sum()) for matrix in matrices) / num_values
    shape = Shrinking(BackSlash(strength=1), matrices, num_values, lambda sums: sums).shape(matrices)
    return Measured(mean(trainer.test().values()), median(seconds), zeros, float(shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="names of options; the plain run is always there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    store, chosen = TokenStore.open(STORE), cases(arguments.steps)
    if arguments.only:
        chosen = {name: options for name, options in chosen.items() if name == "plain" or name in arguments.only}
    found: dict[str, list[Measured]] = {name: [] for name in chosen}
    for seed in range(arguments.seeds):
        for name, options in chosen.items():
            found[name].append(measure(store, options, seed, arguments.steps))
            print(f"  seed {seed}, {name}: {found[name][-1].loss:.4f} nats", flush=True)
    print(f"\n{'option':28}{'test nats':>10}{'difference by seed':>22}{'step':>8}{'zeros':>8}{'shape':>7}")
    for name, results in found.items():
        differences = " ".join(f"{a.loss - b.loss:+.3f}" for a, b in zip(results, found["plain"], strict=True))
        ratio = median(r.step_s for r in results) / median(r.step_s for r in found["plain"])
        loss, zeros, shape = (mean(r[column] for r in results) for column in (0, 2, 3))
        print(f"{name:28}{loss:10.3f}{differences:>22}{ratio:7.2f}x{zeros:8.1%}{shape:7.2f}")


if __name__ == "__main__":
    main()
