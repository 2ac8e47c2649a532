"""Training throughput and peak memory beside `transformers.Trainer`: same model, rows, batch, optimizer and threads.

    python -m tests.benchmarks.bench_training [--rounds 3] [--steps 40]

Each measurement is a process of its own (so that peak memory is its own), and the two sides take turns. Ours is the
whole job as a user starts it: journal, controller, reports, control word, digests. Prints medians over all steps
after the warm-up, their ratio, and the share of step time spent waiting for data.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from mixwright.pretrain.config import PretrainConfig, load_pretrain_config

CONFIG = Path("configs/quickstart.yaml")
WARMUP_STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--trainer-in", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.trainer_in:
        measure_trainer(arguments.trainer_in, arguments.steps)
        return
    with tempfile.TemporaryDirectory() as folder:
        measured = [measure_round(Path(folder) / str(i), arguments.steps) for i in range(arguments.rounds)]
    print_table(load_pretrain_config(CONFIG), [ours for ours, _ in measured], [theirs for _, theirs in measured])


def measure_round(folder: Path, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """One measurement of each side, ours first: its journal tells the peer which rows to read."""
    folder.mkdir(parents=True)
    overrides = [f"run.folder={folder}", "run.name=ours", f"training.num_steps={steps}", "evaluation.every=0",
                 "evaluation.test_rows_per_domain=1", "checkpoint.every=100000"]  # fmt: skip
    run([sys.executable, "launch/pretrain.py", "--config", str(CONFIG), *overrides], folder / "ours.log")
    run(
        [sys.executable, "-m", "tests.benchmarks.bench_training", "--trainer-in", str(folder), "--steps", str(steps)],
        folder / "trainer.log",
    )
    return read_ours(folder / "ours"), json.loads((folder / "trainer.json").read_text())


def run(command: list[str], log: Path) -> None:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "TRANSFORMERS_VERBOSITY": "error"}
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{log.read_text()[-3000:]}")


def read_ours(run_dir: Path) -> dict[str, Any]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"][WARMUP_STEPS:]
    memory = [record["peak_memory_bytes"] for record in records if record["kind"] == "end"]
    losses = [record["overall"] for record in records if record["kind"] == "train"]
    return {
        "seconds": [record["step_seconds"] for record in steps],
        "waiting": sum(record["wait_seconds"] for record in steps) / sum(record["step_seconds"] for record in steps),
        "peak_bytes": memory[-1],
        "last_loss": losses[-1],
    }


def measure_trainer(folder: Path, steps: int) -> None:
    """The peer, in a process of its own; writes `trainer.json`."""
    import torch
    from torch.utils.data import Dataset, SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from mixwright.data_mixing.feeder import store_order
    from mixwright.data_mixing.store import TokenStore
    from mixwright.pretrain.model import build_model
    from mixwright.pretrain.rundir import read_history

    config = load_pretrain_config(CONFIG)
    store = TokenStore.open(config.data.store)
    history = read_history(folder / "ours")
    plan, order = history.plan(), store_order(history.genesis, store)

    class Rows(Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return steps * config.training.rows_per_step

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            step, position = divmod(index, config.training.rows_per_step)
            refs = plan.rows(step, range(position, position + 1))
            tokens = torch.from_numpy(store.gather(order[refs.domain_n], refs.row_n)[0].astype("int64"))
            return {"input_ids": tokens[:-1], "shift_labels": tokens[1:], "labels": tokens[1:]}

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.marks: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.marks.append(time.perf_counter())

    manifest = store.manifest
    model = build_model(config.model, vocab_size=manifest.vocab_size, sequence_length=manifest.sequence_length,
                        eos_id=manifest.eos_id, seed=config.run.seed).causal_lm  # fmt: skip
    optimizer = config.optimizer
    clock = Clock()
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=steps, report_to=[], save_strategy="no", use_cpu=True,
        per_device_train_batch_size=config.training.rows_per_step, learning_rate=optimizer.lr, logging_steps=10,
        weight_decay=optimizer.weight_decay, adam_beta1=optimizer.betas[0], adam_beta2=optimizer.betas[1],
        max_grad_norm=config.training.clip_norm, warmup_steps=config.schedule.warmup_steps, disable_tqdm=True,
        lr_scheduler_type="cosine", optim="adamw_torch_fused", seed=config.run.seed,
    )  # fmt: skip
    trainer = InOrder(model=model, args=arguments, train_dataset=Rows(), callbacks=[clock])
    trainer.train()
    seconds = [b - a for a, b in zip(clock.marks, clock.marks[1:], strict=False)][WARMUP_STEPS - 1 :]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "seconds": seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "last_loss": losses[-1],
    }
    (folder / "trainer.json").write_text(json.dumps(result))


def print_table(config: PretrainConfig, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    import torch
    import transformers

    from mixwright.data_mixing.store import TokenStore

    tokens = config.training.rows_per_step * TokenStore.open(config.data.store).manifest.sequence_length
    rows = [figures("mixwright", ours, tokens), figures("transformers.Trainer", theirs, tokens)]
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {os.cpu_count()} cores, ", end="")
    print(f"{len(ours)} rounds in turns, {tokens} tokens a step, medians")
    print(f"{'':22}{'ms/step':>10}{'tokens/s':>12}{'peak MiB':>10}{'last loss':>11}")
    for name, ms, speed, mib, loss in rows:
        print(f"{name:22}{ms:>10.1f}{speed:>12,.0f}{mib:>10,.0f}{loss:>11.3f}")
    (_, ours_ms, _, ours_mib, _), (_, theirs_ms, _, theirs_mib, _) = rows
    print(f"{'ratio':22}{ours_ms / theirs_ms:>10.3f}{theirs_ms / ours_ms:>12.3f}{ours_mib / theirs_mib:>10.3f}")
    print(f"mixwright waits for data {median(r['waiting'] for r in ours):.3%} of the step time")


def figures(name: str, side: list[dict[str, Any]], tokens: int) -> tuple[str, float, float, float, float]:
    """Name, milliseconds a step, tokens a second, peak MiB, last loss: medians over all rounds."""
    seconds = median(s for measured in side for s in measured["seconds"])
    mib = median(measured["peak_bytes"] for measured in side) / 2**20
    return name, 1e3 * seconds, tokens / seconds, mib, median(measured["last_loss"] for measured in side)


if __name__ == "__main__":
    main()
