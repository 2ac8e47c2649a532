"""What a job of 1,000 ranks and 10,000 domains asks of the service: `python -m tests.benchmarks.bench_scale`.

The ranks are simulated one after the other on this machine: each computes its slice of every step and reads every
entry of the journal that it is told of, as a `Feeder` does. Journal, leader and controller are real; the controller
runs in a process of its own and is handed one policy. What ranks exchange among themselves is a size, not a time:
no network is here. Times are of the CPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.control import MixingController
from mixwright.data_mixing.domain import Domain
from mixwright.data_mixing.entries import DomainLoss, Genesis, Report
from mixwright.data_mixing.entry_file import entry_path
from mixwright.data_mixing.journal import Journal, read_entries
from mixwright.data_mixing.leader import Leader, open_run
from mixwright.data_mixing.plan import rank_positions
from mixwright.data_mixing.snapshot import resume

CONTROL_WORD_BYTES = 24  # pretrain/ranks.py
SUM_COLUMNS = 4  # pretrain/objective.py, DomainSums: float64 each
POLL_INTERVAL_S = 0.1
FOLDED_RANKS = 10
"""Ranks that also fold the journal into a plan of their own; it costs each the same, and memory."""


@dataclass(frozen=True)
class Job:
    """What is simulated."""

    num_ranks: int
    num_domains: int
    rows_per_step: int
    num_steps: int
    report_every: int

    def genesis(self) -> Genesis:
        domains = tuple(Domain(name=f"d{i}", num_rows=10_000 + 37 * i, fingerprint="") for i in range(self.num_domains))
        return Genesis(
            run="scale", seed=1, sequence_length=4096, rows_per_step=self.rows_per_step, num_steps=10**6,
            store_fingerprint="", domains=domains,
        )  # fmt: skip

    def policy(self, exponent: float) -> dict[str, Any]:
        share_G = np.arange(1.0, self.num_domains + 1) ** -exponent
        share_G /= share_G.sum()
        return {"kind": "static", "mixture": {f"d{i}": share for i, share in enumerate(share_G.tolist())}}

    def report(self, last_step: int) -> Report:
        loss = DomainLoss(loss_sum=1234.5678901, loss_square_sum=9876.54321, num_tokens=65_536, num_rows=16)
        return Report(
            kind="train", first_step=last_step - self.report_every + 1, last_step=last_step,
            domains={f"d{i}": loss for i in range(self.num_domains)}, digest="0123456789abcdef", attempt=0,
        )  # fmt: skip


@dataclass(frozen=True)
class ControllerUse:
    """What a controller's process did: seconds of CPU for the policy, and for looks that found something new."""

    submit_cpu_s: float
    follow_cpu_s: float
    peak_mib: float


def control(folder: Path, document: dict[str, Any], link: Connection) -> None:
    """The controller's process: follows the journal, accepts a policy when it is told to, and ends likewise."""
    controller = MixingController(folder, "controller")
    submit_s, follow_s, is_over, known = 0.0, 0.0, False, controller.ping()["lsn"]
    while not is_over:
        is_asked = link.poll(POLL_INTERVAL_S)
        began = time.process_time()
        if is_asked and link.recv() == "submit":
            known = controller.submit(document)["lsn"]
            submit_s = time.process_time() - began
            link.send("submitted")
            continue
        is_over, lsn = is_asked, controller.ping()["lsn"]
        if lsn > known:
            known, follow_s = lsn, follow_s + time.process_time() - began
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    link.send(ControllerUse(submit_s, follow_s, peak_mib))


class Ranks:
    """All simulated ranks: what they read, and what it takes them."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job = job
        self._folder = folder
        _, self._history = resume(folder, "ranks")
        self._journals = [Journal(folder, f"rank-{rank}", after=self._history) for rank in range(job.num_ranks)]
        self._positions = [rank_positions(job.rows_per_step, rank, job.num_ranks) for rank in range(job.num_ranks)]
        self.slice_ms: list[float] = []
        self.read_ms: list[float] = []

    def take_step(self, step: int) -> None:
        """Every rank's rows of a step; together they are the step's rows."""
        plan, rows = self._history.plan(), 0
        for positions in self._positions:
            began = time.thread_time()
            refs = plan.rows(step, positions)
            self.slice_ms.append((time.thread_time() - began) * 1e3)
            rows += len(refs.row_n)
        assert rows == self.job.rows_per_step

    def follow(self) -> None:
        """Every rank reads what is new in the journal; the first one's fold is the plan of all."""
        for rank, journal in enumerate(self._journals):
            began = time.thread_time()
            entries = journal.poll()
            self.read_ms.append((time.thread_time() - began) * 1e3)
            for entry in entries if rank == 0 else ():
                self._history.apply(entry)

    def starts_s(self) -> list[float]:
        """CPU seconds that a rank takes to open the journal and to have its plan."""
        taken = []
        for rank in range(min(FOLDED_RANKS, self.job.num_ranks)):
            began = time.thread_time()
            resume(self._folder, f"late-{rank}")[1].plan().rows(self.job.num_steps, self._positions[rank])
            taken.append(time.thread_time() - began)
        return taken


def simulate(job: Job, folder: Path) -> tuple[Ranks, ControllerUse]:
    """Steps with reports, and one commit of a controller's policy on the way."""
    genesis = job.genesis()
    journal = Journal(folder, "leader")
    history, _ = open_run(journal, genesis, accept(job.policy(1.0), genesis))
    ranks = Ranks(job, folder)
    context = multiprocessing.get_context("spawn")
    link, other = context.Pipe()
    controller = context.Process(target=control, args=(folder, job.policy(0.9), other))
    with Leader(journal, history, start_step=0, lead_steps=8, prefetch_steps=2) as leader:
        controller.start()
        known = leader.announced_lsn
        for step in range(job.num_steps):
            if step == job.num_steps // 2:
                link.send("submit")
                assert link.recv() == "submitted"
            leader.begin_step(step)
            ranks.take_step(step)
            if (step + 1) % job.report_every == 0:
                leader.write(job.report(step))
            if leader.announced_lsn != known:
                known = leader.announced_lsn
                ranks.follow()
    link.send("end")
    use = link.recv()
    controller.join()
    return ranks, use


def show(job: Job, folder: Path, ranks: Ranks, use: ControllerUse) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.json"))}
    report_bytes = len(job.report(job.report_every - 1).model_dump_json())
    num_reports = job.num_steps // job.report_every
    slices = sorted(ranks.slice_ms)
    slice_p50, slice_p99 = statistics.median(slices), slices[len(slices) * 99 // 100]
    read_ms, read_mb = statistics.median(ranks.read_ms), _read_at_the_commit(folder) / 1e6
    sums_bytes = 8 * SUM_COLUMNS * job.num_domains
    follow_ms = use.follow_cpu_s * 1e3 / max(num_reports, 1)
    rows: list[tuple[str, str]] = [
        ("collectives a step (control word)", f"1 of {CONTROL_WORD_BYTES} bytes, beside the step's own"),
        (f"collectives a report (every {job.report_every} steps)", f"1 of {sums_bytes / 1e3:,.0f} kB"),
        ("messages a step from ranks to the controller", f"{1 / job.report_every:g}, for any number of ranks"),
        ("a report's entry", f"{report_bytes / 1e3:,.0f} kB"),
        ("plan, a rank's slice of a step", f"{slice_p50:.2f} ms, p99 {slice_p99:.2f} ms"),
        ("a rank at a commit: reads the entries since the last", f"{read_ms:.0f} ms, {read_mb:.1f} MB"),
        ("a rank that starts: journal and plan", f"{statistics.median(ranks.starts_s()):.2f} s"),
        ("controller, CPU for a policy of all domains", f"{use.submit_cpu_s:.2f} s"),
        ("controller, CPU a report", f"{follow_ms:.0f} ms"),
        ("controller, peak memory", f"{use.peak_mib:,.0f} MiB"),
        ("journal", f"{len(sizes)} entries, {sum(sizes.values()) / 1e6:.1f} MB"),
    ]  # fmt: skip
    print(f"\n{job.num_ranks:,} ranks, {job.num_domains:,} domains, {job.rows_per_step:,} rows a step, "
          f"{job.num_steps} steps; load {os.getloadavg()[0]:.1f}")  # fmt: skip
    for name, figure in rows:
        print(f"  {name:<56}{figure}")


def _read_at_the_commit(folder: Path) -> int:
    """Bytes of the entries from the first policy's commit to the second's."""
    first, second = [entry.lsn for entry in read_entries(folder) if entry.type == "COMMIT"]
    return sum(entry_path(folder, lsn).stat().st_size for lsn in range(first + 1, second + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=1000)
    parser.add_argument("--domains", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    job = Job(given.ranks, given.domains, 16 * given.ranks, given.steps, report_every=10)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "journal"
        ranks, use = simulate(job, folder)
        show(job, folder, ranks, use)


if __name__ == "__main__":
    main()
