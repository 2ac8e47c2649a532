"""Whether the controller keeps up with a large job: `python -m tests.benchmarks.bench_controller`.

A job writes one report a step, whatever the number of its ranks: they add their sums up before (spec/mixing.md 4.9).
Here a process appends reports of 50 domains as fast as the disk allows, while the run's controller reads them.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.controller import MixingController
from mixwright.data_mixing.domain import Domain
from mixwright.data_mixing.entries import DomainLoss, Genesis, Report
from mixwright.data_mixing.journal import Journal
from mixwright.data_mixing.leader import open_run

NUM_REPORTS, NUM_DOMAINS, ROWS_PER_STEP = 2000, 50, 16_000
POLL_INTERVAL_S = 0.1


def genesis() -> Genesis:
    domains = tuple(Domain(name=f"d{i}", num_rows=1_000_000, fingerprint="") for i in range(NUM_DOMAINS))
    return Genesis(run="bench", seed=1, sequence_length=4096, rows_per_step=ROWS_PER_STEP, num_steps=10**6,
                   store_fingerprint="", domains=domains)  # fmt: skip


def report(step: int) -> Report:
    loss = DomainLoss(loss_sum=1234.5678901, loss_square_sum=9876.54321, num_tokens=1_310_720, num_rows=320)
    return Report(kind="train", first_step=step, last_step=step, domains={f"d{i}": loss for i in range(NUM_DOMAINS)},
                  digest="0123456789abcdef", attempt=0)  # fmt: skip


def write_reports(folder: Path) -> None:
    journal = Journal(folder, writer="leader")
    for step in range(NUM_REPORTS):
        journal.append(report(step))


def keep_up(folder: Path) -> tuple[list[float], list[int], float]:
    """Milliseconds per report of each look at the journal, reports read by each, seconds until all were read."""
    controller = MixingController(folder, "bench")
    writer = multiprocessing.get_context("spawn").Process(target=write_reports, args=(folder,))
    began, costs, counts, last = time.perf_counter(), [], [], controller.ping()["lsn"]
    writer.start()
    while sum(counts) < NUM_REPORTS:
        time.sleep(POLL_INTERVAL_S)
        looked = time.perf_counter()
        lsn = controller.ping()["lsn"]
        if lsn > last:
            costs.append((time.perf_counter() - looked) * 1e3 / (lsn - last))
            counts.append(lsn - last)
            last = lsn
    writer.join()
    return costs, counts, time.perf_counter() - began


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "journal"
        run = genesis()
        open_run(Journal(folder, "leader"), run, accept({"kind": "temperature", "temperature": 1.0}, run))
        costs, counts, seconds = keep_up(folder)
    wrote_ms = seconds * 1e3 / NUM_REPORTS
    print(f"\ncontroller beside a job that reports every step: {NUM_REPORTS:,} reports of {NUM_DOMAINS} domains")
    print(f"one message a step, for any number of ranks; load {os.getloadavg()[0]:.1f}")
    print(f"reading and folding a report: {statistics.median(costs):.2f} ms (worst look {max(costs):.2f} ms)")
    print(
        f"appended at full speed every {wrote_ms:.2f} ms; each look after {POLL_INTERVAL_S * 1e3:.0f} ms finds ", end=""
    )
    print(f"{statistics.median(counts):.0f} reports (most {max(counts)})")


if __name__ == "__main__":
    main()
