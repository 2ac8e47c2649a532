"""What instance weights cost in a training step: quickstart's model with each scope beside none.

    python -m tests.benchmarks.bench_weighting [--config configs/quickstart.yaml] [--rounds 10] [--steps 2]

Forward, objective, backward, division, AdamW on the same random rows, in micro-batches as the job takes them. The sides
take turns in one process; peak memory is measured in a process per side. Prints medians over rounds and their ratios.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from mixwright.data_mixing.loss_weighting import LossWeighting
from mixwright.pretrain.config import PretrainConfig, load_pretrain_config
from mixwright.pretrain.model import build_model
from mixwright.pretrain.objective import InForce, Objective, Shape
from mixwright.pretrain.ranks import Ranks
from tests.benchmarks.bench_head import SEQUENCE_LENGTH, VOCABULARY, peak_bytes_of

DOMAINS = 6
SIDES: dict[str, LossWeighting | None] = {
    "off": None,
    "step_deferred": LossWeighting(r=0.4),
    "step_deferred, documents": LossWeighting(r=0.4, sample="document"),
    "micro_step": LossWeighting(r=0.4, scope="micro_step"),
    "step_two_phase": LossWeighting(r=0.4, scope="step_two_phase"),
}


class Stepper:
    """A model with its optimizer and its weighting; the same initial parameters and rows for all."""

    def __init__(self, config: PretrainConfig, weighting: LossWeighting | None) -> None:
        torch.manual_seed(0)
        training = config.training
        self._model = build_model(
            config.model, vocab_size=VOCABULARY, sequence_length=SEQUENCE_LENGTH, eos_id=0, seed=config.run.seed
        )
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=config.optimizer.lr, fused=True)
        shape = Shape(training.rows_per_step, training.micro_batch_rows, DOMAINS, training.z_loss, eos_id=0)
        self._objective = Objective(shape, Ranks(0, 1, torch.device("cpu"), None))
        self._in_force = InForce(weighting, 0) if weighting else None
        tokens_BS = torch.randint(0, VOCABULARY, (training.rows_per_step, SEQUENCE_LENGTH + 1))
        tokens_BS[:, ::64] = 0
        domain_B = torch.arange(training.rows_per_step) % DOMAINS
        micro = training.micro_batch_rows
        self._batches = list(zip(tokens_BS.split(micro), domain_B.split(micro), strict=True))

    def step(self) -> None:
        """One optimizer step."""
        objective = self._objective
        objective.begin(self._in_force)
        if objective.has_first_pass:
            with torch.no_grad():
                for tokens_BS, domain_B in self._batches:
                    objective.preview(self._model(tokens_BS), tokens_BS, domain_B)
        for tokens_BS, domain_B in self._batches:
            objective(self._model(tokens_BS), tokens_BS, domain_B).backward()  # type: ignore[no-untyped-call]
        divisor = objective.end()
        if divisor != 1.0:
            for parameter in self._model.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(divisor)
        self._optimizer.step()
        self._optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--peak-of", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    config = load_pretrain_config(arguments.config)
    if arguments.peak_of:
        print(peak_bytes_of(Stepper(config, SIDES[arguments.peak_of])))
        return
    steppers = {side: Stepper(config, weighting) for side, weighting in SIDES.items()}
    for stepper in steppers.values():
        stepper.step()
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(arguments.rounds):
        for side, stepper in steppers.items():
            began = time.perf_counter()
            for _ in range(arguments.steps):
                stepper.step()
            seconds[side].append((time.perf_counter() - began) / arguments.steps)
    print_table(config, seconds, {side: _peak_in_own_process(arguments.config, side) for side in SIDES})


def _peak_in_own_process(config: Path, side: str) -> int:
    call = [sys.executable, "-m", "tests.benchmarks.bench_weighting", "--config", str(config), "--peak-of", side]
    return int(subprocess.run(call, capture_output=True, text=True, check=True).stdout)


def print_table(config: PretrainConfig, seconds: dict[str, list[float]], peaks: dict[str, int]) -> None:
    tokens = config.training.rows_per_step * SEQUENCE_LENGTH
    print(f"torch {torch.__version__}, {torch.get_num_threads()} of {os.cpu_count()} cores, ", end="")
    print(
        f"{tokens} tokens a step, medians of {len(seconds['off'])} rounds in turns; ratios to `off` of the same round"
    )
    print(f"{'loss_weighting':28}{'ms/step':>10}{'throughput':>12}{'peak MiB':>10}{'ratio':>8}")
    for side, times in seconds.items():
        throughput = median(off / mine for off, mine in zip(seconds["off"], times, strict=True))
        memory = peaks[side] / peaks["off"]
        print(f"{side:28}{1e3 * median(times):>10.1f}{throughput:>12.3f}{peaks[side] / 2**20:>10.0f}{memory:>8.3f}")


if __name__ == "__main__":
    main()
