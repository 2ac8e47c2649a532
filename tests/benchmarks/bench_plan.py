"""How long plan and journal take: `python -m tests.benchmarks.bench_plan`.

Times are medians of repeated calls in one process and thread; `rank slice` is what each rank does in each step.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.apportion import Apportionment, integer_proportions
from mixwright.data_mixing.domain import Domain
from mixwright.data_mixing.entries import Commit, DomainLoss, EntryBody, Genesis, PolicyEntry, Report, Segment
from mixwright.data_mixing.entry_file import NO_HASH, entry_path, sealed
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.journal import Journal, read_entries, verify
from mixwright.data_mixing.permutation import permute
from mixwright.data_mixing.plan import CommittedPolicy, Plan, rank_positions
from mixwright.data_mixing.snapshot import resume, write_when_due

SETTINGS = [(24, 1024, 64), (1000, 4096, 512), (10_000, 16_000, 1000)]
NUM_ENTRIES = 10_000


def times_ms(call: Callable[[int], object], repeats: int) -> list[float]:
    """Milliseconds of `call(0)`, `call(1)`, ..."""
    taken = []
    for index in range(repeats):
        started = time.perf_counter()
        call(index)
        taken.append((time.perf_counter() - started) * 1e3)
    return taken


def median_ms(call: Callable[[int], object], repeats: int = 50) -> float:
    return statistics.median(times_ms(call, repeats))


def genesis(num_domains: int, rows_per_step: int) -> Genesis:
    domains = tuple(Domain(name=f"d{i}", num_rows=10_000 + 37 * i, fingerprint="") for i in range(num_domains))
    return Genesis(
        run="bench", seed=1, sequence_length=1024, rows_per_step=rows_per_step, num_steps=10**6,
        store_fingerprint="", domains=domains,
    )  # fmt: skip


def zipf_policy(num_domains: int, exponent: float = 1.0) -> PolicyEntry:
    proportions = integer_proportions(np.arange(1.0, num_domains + 1) ** -exponent)
    return PolicyEntry(document={}, program=(Segment(start_step=0, proportions=tuple(proportions.tolist())),))


def plan_table() -> None:
    columns = ["slice in order", "slice random", "whole batch", "digest", "counts", "build", "commit"]
    print("   domains    rows  ranks | " + " ".join(f"{column:>14}" for column in columns) + "  (ms)")
    for num_domains, rows_per_step, num_ranks in SETTINGS:
        figures = plan_figures(num_domains, rows_per_step, num_ranks)
        shown = " ".join(f"{figure:>14.2f}" for figure in figures)
        print(f"{num_domains:>10} {rows_per_step:>7} {num_ranks:>6} | {shown}")


def plan_figures(num_domains: int, rows_per_step: int, num_ranks: int) -> list[float]:
    entry, changed = zipf_policy(num_domains), zipf_policy(num_domains, 0.9)
    plan = Plan(genesis(num_domains, rows_per_step), [CommittedPolicy(0, 1, entry)])
    mine = rank_positions(rows_per_step, 3, num_ranks)
    share = np.array(entry.program[0].proportions)
    apportionment = Apportionment(share, np.zeros_like(share))
    return [
        median_ms(lambda step: plan.rows(step, mine)),
        median_ms(lambda step: plan.rows((step * 7919) % 10_000, mine)),
        median_ms(plan.rows, 15),
        median_ms(plan.digest, 15),
        median_ms(lambda step: apportionment.counts(step * rows_per_step)),
        median_ms(lambda _: Apportionment(share, np.zeros_like(share))),
        median_ms(lambda step: plan.extended(CommittedPolicy(50 + step, 2, changed)).rows(50 + step, mine), 15),
    ]


def permutation_table() -> None:
    print("\npermute, million images per second (batches of 16,384)")
    for size in (2**20, 10**6, 10**9 + 7):
        print(f"{size:>14,} elements {permutations_per_us(np.arange(16_384) % size, size):8.1f}")


def permutations_per_us(index_n: NDArray[np.int64], size: int) -> float:
    return len(index_n) / median_ms(lambda _: permute(index_n, size, 7), 20) / 1e3


def report(step: int, num_domains: int = 24) -> Report:
    loss = DomainLoss(loss_sum=1234.5678901, loss_square_sum=9876.54321, num_tokens=40_960, num_rows=40)
    return Report(kind="train", first_step=step, last_step=step, domains={f"d{i}": loss for i in range(num_domains)},
                  digest="0123456789abcdef", attempt=0)  # fmt: skip


def write_long_journal(folder: Path) -> None:
    """A journal of 24 domains: a commit every 100 entries, reports between; written without waiting for the disk."""
    history, prev = RunHistory(), NO_HASH

    def add(body: EntryBody) -> None:
        nonlocal prev
        entry, raw = sealed(history.last_lsn + 1, body, "leader", 0.0, prev)
        entry_path(folder, entry.lsn).write_bytes(raw)
        history.apply(entry)
        prev = entry.hash

    add(genesis(24, 1024))
    while history.last_lsn < NUM_ENTRIES - 1:
        if history.last_lsn % 100 == 0:
            step, entry = 10 * history.num_commits, zipf_policy(24, 1 + history.num_commits % 7 / 10)
            add(entry)
            plan = history.plan().extended(CommittedPolicy(step, history.last_lsn, entry))
            add(commit_of(history.last_lsn, step, plan))
        add(report(history.last_lsn))
        write_when_due(folder, history)


def commit_of(lsn: int, step: int, plan: Plan) -> Commit:
    return Commit(policy_lsn=lsn, effective_step=step, plan_digest=plan.state_digest(step))


def journal_table() -> None:
    with tempfile.TemporaryDirectory() as name:
        journal = Journal(Path(name), "leader")
        journal.append(genesis(24, 1024))
        taken = sorted(times_ms(lambda step: journal.append(report(step)), 300))
        journal.poll()
        polled = statistics.median(times_ms(lambda _: [journal.poll() for _ in range(1000)], 20))
    print(f"\njournal: append p50 {taken[150]:.1f} ms, p99 {taken[297]:.1f} ms; poll without news {polled:.1f} us")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_long_journal(folder)
        seconds = {
            "read all": median_ms(lambda _: read_entries(folder), 3) / 1e3,
            "audit (verify)": median_ms(lambda _: verify(folder), 3) / 1e3,
            "open from snapshot": median_ms(lambda _: resume(folder, "rank-0"), 5) / 1e3,
        }
        resumed = resume(folder, "rank-0")[1]
        print(f"{NUM_ENTRIES:,} entries of 24 domains: " + ", ".join(f"{k} {v:.2f} s" for k, v in seconds.items()))
        print(f"  {resumed.num_commits} commits, first batch after opening {first_batch_ms(resumed):.1f} ms")


def first_batch_ms(history: RunHistory) -> float:
    return times_ms(lambda _: history.plan().rows(10 * history.num_commits + 5), 1)[0]


if __name__ == "__main__":
    plan_table()
    permutation_table()
    journal_table()
