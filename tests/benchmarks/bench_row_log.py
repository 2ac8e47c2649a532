"""What the row log costs: bytes per row, time of a step and of a file, time to find the hard rows.

python -m tests.benchmarks.bench_row_log
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from mixwright.pretrain.hard_rows import identify, last_readings, ranked
from mixwright.pretrain.row_log import FLUSH_STEPS, RowLossLog, read_row_log
from tests.data_mixing.run_cases import TrainerSide, genesis

NUM_STEPS = 1000
NUM_DOMAINS, ROWS_PER_STEP, READ_STEPS = 20, 1024, 4000


def main() -> None:
    for num_rows in (1, 4, 8, 16, 64, 256, 1024):
        measure_writing(num_rows)
    measure_reading()


def measure_writing(num_rows: int) -> None:
    """Random losses and weights, one rank."""
    chance = np.random.default_rng(0)
    adds, files = [], []
    with tempfile.TemporaryDirectory() as folder:
        with RowLossLog(Path(folder), rank=0, attempt=0) as log:
            for step in range(NUM_STEPS):
                loss_n, weight_n = chance.normal(3, 1, num_rows), chance.lognormal(0, 0.5, num_rows)
                began = time.perf_counter()
                log.add(step, np.arange(num_rows), loss_n, weight_n)
                (files if step and step % FLUSH_STEPS == 0 else adds).append(time.perf_counter() - began)
        num_bytes = sum(path.stat().st_size for path in Path(folder).iterdir())
    print(
        f"{num_rows:5} rows per step: {num_bytes / (NUM_STEPS * num_rows):5.1f} bytes/row, step "
        f"{1e6 * statistics.median(adds):3.0f} us, file of {FLUSH_STEPS} steps {1e3 * statistics.median(files):4.1f} ms"
    )


def measure_reading() -> None:
    """A log of about 4 million rows, as `mix hard-samples` reads it."""
    sizes = {f"domain-{i}": 50_000 + i for i in range(NUM_DOMAINS)}
    run = genesis(num_steps=READ_STEPS, sizes=sizes).model_copy(update={"rows_per_step": ROWS_PER_STEP})
    chance, position_n = np.random.default_rng(0), np.arange(ROWS_PER_STEP)
    with tempfile.TemporaryDirectory() as folder:
        plan = TrainerSide(Path(folder) / "run", run).history.plan()
        with RowLossLog(Path(folder) / "row_log", rank=0, attempt=0) as log:
            for step in range(READ_STEPS):
                log.add(step, position_n, chance.normal(3, 1, ROWS_PER_STEP), np.ones(ROWS_PER_STEP))
        marks = [time.perf_counter()]
        rows = identify(read_row_log(Path(folder) / "row_log"), plan)
        marks.append(time.perf_counter())
        ranked(last_readings(rows), "highest", 10)
        marks.append(time.perf_counter())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{len(rows):,} rows of {READ_STEPS} steps, {NUM_DOMAINS} domains: read and identified in "
        f"{marks[1] - marks[0]:.1f} s, ranked in {marks[2] - marks[1]:.1f} s, peak {peak / 1e9:.1f} GB"
    )


if __name__ == "__main__":
    main()
