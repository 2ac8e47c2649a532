"""What the fused head changes in a training step: quickstart's model with materialised logits and with `linear_nll`.

    python -m tests.benchmarks.bench_head [--config configs/quickstart.yaml] [--rounds 10] [--steps 3]

Forward, backward and AdamW on the same random rows; the sides take turns in one process, peak memory is measured in a
process per side. Prints medians over rounds and their ratios.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mixwright.pretrain.config import PretrainConfig, load_pretrain_config
from mixwright.pretrain.head import LanguageModel
from mixwright.pretrain.model import build_model

VOCABULARY, SEQUENCE_LENGTH = 4096, 256
Loss = Callable[[LanguageModel, Tensor], Tensor]


def before(model: LanguageModel, tokens_BS: Tensor) -> Tensor:
    """Logits of all tokens in memory, as `transformers` does it."""
    logits_BTV = model.causal_lm(input_ids=tokens_BS[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), tokens_BS[:, 1:].reshape(-1))


def after(model: LanguageModel, tokens_BS: Tensor) -> Tensor:
    """The head of the training loop."""
    return model(tokens_BS).nll_N.mean()


SIDES: dict[str, Loss] = {"logits + F.cross_entropy": before, "linear_nll": after}


class Stepper:
    """A model with its optimizer and its way to the loss; the same initial parameters and rows for all."""

    def __init__(self, config: PretrainConfig, loss: Loss) -> None:
        torch.manual_seed(0)
        self._model = build_model(
            config.model, vocab_size=VOCABULARY, sequence_length=SEQUENCE_LENGTH, eos_id=0, seed=config.run.seed
        )
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=config.optimizer.lr, fused=True)
        self._loss = loss
        self._tokens_BS = torch.randint(0, VOCABULARY, (config.training.rows_per_step, SEQUENCE_LENGTH + 1))

    def step(self) -> float:
        """One optimizer step; its loss."""
        loss = self._loss(self._model, self._tokens_BS)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())


class Steps(Protocol):
    """Something that does one optimizer step."""

    def step(self) -> object: ...


def peak_bytes_of(stepper: Steps) -> int:
    """Resident high-water mark of two steps beyond what is resident once the model is there."""
    Path("/proc/self/clear_refs").write_text("5")
    held = _status_kib("VmRSS")
    for _ in range(2):
        stepper.step()
    return (_status_kib("VmHWM") - held) << 10


def _status_kib(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--peak-of", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    config = load_pretrain_config(arguments.config)
    if arguments.peak_of:
        print(peak_bytes_of(Stepper(config, SIDES[arguments.peak_of])))
        return
    steppers = {side: Stepper(config, loss) for side, loss in SIDES.items()}
    losses = {side: stepper.step() for side, stepper in steppers.items()}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(arguments.rounds):
        for side, stepper in steppers.items():
            began = time.perf_counter()
            for _ in range(arguments.steps):
                stepper.step()
            seconds[side].append((time.perf_counter() - began) / arguments.steps)
    peaks = {side: _peak_in_own_process(arguments.config, side) for side in SIDES}
    print_table(config, seconds, peaks, losses)


def _peak_in_own_process(config: Path, side: str) -> int:
    call = [sys.executable, "-m", "tests.benchmarks.bench_head", "--config", str(config), "--peak-of", side]
    return int(subprocess.run(call, capture_output=True, text=True, check=True).stdout)


def print_table(
    config: PretrainConfig, seconds: dict[str, list[float]], peaks: dict[str, int], losses: dict[str, float]
) -> None:
    tokens = config.training.rows_per_step * SEQUENCE_LENGTH
    print(f"torch {torch.__version__}, {torch.get_num_threads()} of {os.cpu_count()} cores, ", end="")
    print(f"{tokens} tokens a step, vocabulary {VOCABULARY}, medians of {len(seconds['linear_nll'])} rounds in turns")
    print(f"{'':28}{'ms/step':>10}{'peak MiB':>10}{'first loss':>12}")
    for side, times in seconds.items():
        print(f"{side:28}{1e3 * median(times):>10.1f}{peaks[side] / 2**20:>10.0f}{losses[side]:>12.5f}")
    plain, ours = SIDES
    print(f"{'ratio':28}{median(seconds[ours]) / median(seconds[plain]):>10.3f}{peaks[ours] / peaks[plain]:>10.3f}")


if __name__ == "__main__":
    main()
