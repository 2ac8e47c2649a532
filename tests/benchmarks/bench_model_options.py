"""What each model option does to a small run: test loss and step time beside the plain model, at equal tokens.

    python -m tests.benchmarks.bench_model_options [--steps 150] [--seeds 2] [--only NAME ...]

Same rows in the same order, same initial seed, one thread. Step times are medians of ratios: an option and the plain
model take turns, step by step, at the end of the run. Needs the token store of `make quickstart`. A small Llama over
its first tokens: it shows costs, and whether an option trains; it does not show what the option's authors claim for
large models or many epochs.
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
    """Mean test nats per token over domains, share of zeros and shape of the matrices."""

    loss: float
    zeros: float
    shape: float


class Run:
    """A small run under way."""

    def __init__(self, store: TokenStore, options: dict[str, Any], seed: int, num_steps: int) -> None:
        tree = {
            "model": {"config": MODEL}, "options": options, "optimizer": {"lr": 3e-3}, "schedule": {"warmup_steps": 15},
            "num_steps": num_steps, "rows_per_step": 4, "validation_rows": 1, "test_rows": 16,
        }  # fmt: skip
        names = tuple(domain.name for domain in store.domains())
        policy = {"kind": "static", "mixture": dict.fromkeys(names, 1.0)}
        config = validate(ProxyConfig, tree, "bench")
        run = ProxyRun(store=STORE, domains=names, policy=policy, config=config, seed=seed)
        genesis = genesis_of(run, store)
        self.trainer, self._plan = ProxyTrainer(run, store, genesis), steering(policy, genesis).plan

    def step(self, step: int) -> float:
        """One optimizer step; returns its seconds."""
        refs, began = self._plan.rows(step), time.perf_counter()
        self.trainer.begin_step(step)
        self.trainer.objective.begin(*weighting_at(self._plan, step))
        self.trainer.forward_backward(refs)
        self.trainer.update(step)
        return time.perf_counter() - began


def measure(store: TokenStore, options: dict[str, Any], seed: int, num_steps: int) -> Measured:
    run = Run(store, options, seed, num_steps)
    for step in range(num_steps):
        run.step(step)
    matrices = [p.detach() for p in run.trainer.model.parameters() if p.ndim >= 2]
    num_values = sum(matrix.numel() for matrix in matrices)
    zeros = sum(int((matrix == 0).sum()) for matrix in matrices) / num_values
    shape = Shrinking(BackSlash(strength=1), matrices, num_values, lambda sums: sums).shape(matrices)
    return Measured(mean(run.trainer.test().values()), zeros, float(shape))


def step_ratio(store: TokenStore, options: dict[str, Any], num_steps: int, rounds: int = 20) -> float:
    """Seconds of a step with options over seconds of a plain one, median of steps side by side."""
    ours, plain = (Run(store, each, 0, num_steps) for each in (options, {}))
    last = range(max(num_steps - rounds - 1, 0), num_steps)
    return median([ours.step(step) / plain.step(step) for step in last][1:])


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
    ratios = {name: step_ratio(store, options, arguments.steps) for name, options in chosen.items()}
    found: dict[str, list[Measured]] = {name: [] for name in chosen}
    for seed in range(arguments.seeds):
        for name, options in chosen.items():
            found[name].append(measure(store, options, seed, arguments.steps))
            print(f"  seed {seed}, {name}: {found[name][-1].loss:.4f} nats", flush=True)
    print(f"\n{'option':28}{'test nats':>10}{'difference by seed':>22}{'step':>8}{'zeros':>8}{'shape':>7}")
    for name, results in found.items():
        differences = " ".join(f"{a.loss - b.loss:+.3f}" for a, b in zip(results, found["plain"], strict=True))
        loss, zeros, shape = (mean(column) for column in zip(*results, strict=True))
        print(f"{name:28}{loss:10.3f}{differences:>22}{ratios[name]:7.2f}x{zeros:8.1%}{shape:7.2f}")


if __name__ == "__main__":
    main()
