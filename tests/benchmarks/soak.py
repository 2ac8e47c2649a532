"""Two hours of a run at a high rate: `python -m tests.benchmarks.soak [--hours 2]` (`make soak`).

Leader, feeder, journal and metrics are real and in this process; losses come from a formula, so that a step takes
milliseconds. The controller is the actor of a private Ray; it decides an online policy, and is asked and given policies
meanwhile. Memory is what each process has of its own (RssAnon): pages of the token store that it has read are the
kernel's cache and are told apart.

A history keeps every policy, because it is the record; nothing else may grow. So that the two can be told apart,
decisions are held in every other phase. What grows in a held phase, once it has settled, grows with time; what is added
from the end of one to the end of the next, beyond that, is the record of the policies between. Each is the median over
phases, with its distribution-free confidence: a leak is in every phase, a heap takes a step now and then. Both must be
shown to be below their limits, which are stated: exit status 1 when they are not.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.answers import Answer
from mixwright.data_mixing.entries import DomainLoss, Genesis, Report
from mixwright.data_mixing.feeder import Feeder
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.journal import Journal, verify
from mixwright.data_mixing.leader import Leader, open_run
from mixwright.data_mixing.run_token import find_token
from mixwright.data_mixing.service import read_record
from mixwright.data_mixing.store import TokenStore
from mixwright.pretrain.rundir import sole_trainer
from tests.data_mixing.corpora_for_tests import random_rows, write_store
from tests.drills.drill_service import Service

ROWS, REPORT_EVERY, STEPS_PER_SECOND = 32, 10, 100
SUBMIT_EVERY_S, SAMPLE_EVERY_S, TELL_EVERY_S = 60.0, 10.0, 300.0
NUM_ROWS = {f"domain-{i}": 2000 * (i + 1) for i in range(6)}
ONLINE = {"kind": "odm", "round_steps": 500, "decide": "bridge"}
PROCESSES = ("trainer", "controller", "host")
NUM_PHASES, NUM_WARM_UP = 24, 2
"""The first phases are left out. Eleven held ones remain, and ten times from one to the next: their intervals need
neither the least nor the greatest."""
SETTLES = 0.6
"""Part of a held phase in which the heap takes the step of the first looks at the journal that are a minute apart."""
MAX_MIB_AN_HOUR = 4.0
"""At 100 steps a second: 12 bytes a step, which a run of a million steps would not notice."""
MAX_KB_A_COMMIT = 32.0
MAX_GROWTH_OF_RATES = 1.1
"""Bytes of journal and metrics a step, of the second half to the first."""
CONFIDENCE = 0.95


@dataclass
class Sample:
    """What is seen at an instant: MiB of each process of its own, MiB of mapped files, MB on disk, steps, commits."""

    seconds: float
    step: int
    num_commits: int
    mib: dict[str, float]
    trainer_files_mib: float
    journal_mb: float
    metrics_mb: float
    num_entries: int


Interval = tuple[float, float, float]
"""Low, median, high."""


@dataclass(frozen=True)
class Growth:
    """Memory of a process: MiB an hour and kB a commit, each as (low, median, high)."""

    slope: Interval
    commit_kb: Interval

    @property
    def verdict(self) -> str:
        """`flat` is shown, `GROWS` is shown, or neither."""
        if self.slope[0] > MAX_MIB_AN_HOUR or self.commit_kb[0] > MAX_KB_A_COMMIT:
            return "GROWS"
        is_flat = self.slope[2] <= MAX_MIB_AN_HOUR and self.commit_kb[2] <= MAX_KB_A_COMMIT
        return "flat" if is_flat else "NOT SHOWN to be flat: too short or too noisy"


@dataclass
class Soak:
    """A run under way, and what was measured of it."""

    run_dir: Path
    genesis: Genesis
    service: Service
    samples: list[Sample] = field(default_factory=list)
    latency_ms: dict[str, list[float]] = field(
        default_factory=lambda: {"ping": [], "status": [], "submit": [], "pause": []}
    )

    def take_sample(self, began: float, step: int, num_commits: int) -> None:
        """Add one."""
        # Entries alone: a temporary file may be gone between the listing and the question.
        files = [entry.stat().st_size for entry in os.scandir(self.run_dir / "journal") if entry.name.endswith(".json")]
        parts = {"trainer": psutil.Process(), **{p: self.service.part(p) for p in ("controller", "host")}}
        self.samples.append(Sample(
            time.monotonic() - began, step, num_commits, {name: _mib(part, "RssAnon") for name, part in parts.items()},
            _mib(parts["trainer"], "RssFile"), sum(files) / 1e6,
            (self.run_dir / "metrics.jsonl").stat().st_size / 1e6, len(files),
        ))  # fmt: skip

    def ask(self, actor: Any, verb: str, **arguments: Any) -> Answer:
        """One verb of the actor, timed."""
        from mixwright.data_mixing.controller import call

        began = time.perf_counter()
        answer = call(actor, verb, arguments, 60.0)
        self.latency_ms[verb].append((time.perf_counter() - began) * 1e3)
        return answer


def _mib(process: psutil.Process | None, field: str) -> float:
    """One figure of a process's memory; NaN when it is gone."""
    if process is None:
        return float("nan")
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def losses(genesis: Genesis, step: int) -> dict[str, DomainLoss]:
    """What ranks would have measured: falls at a rate of its own for each domain."""
    found = {}
    for index, domain in enumerate(genesis.domains):
        loss = 3.0 + 2.0 * float(np.exp(-step / 20_000 / (index + 1)))
        found[domain.name] = DomainLoss(loss_sum=100 * loss, loss_square_sum=100 * loss**2, num_tokens=100, num_rows=4)
    return found


@contextlib.contextmanager
def attached_actor(run_dir: Path) -> Iterator[Any]:
    """The controller's actor, of the service's private Ray."""
    from mixwright.launch import ray_environment

    record = read_record(run_dir)
    assert record is not None
    assert record.token_path is not None
    ray_environment.apply(ray_environment.private_ray(record.token_path))
    import ray

    from mixwright.data_mixing.controller import attach_ray, find_controller

    attach_ray(record.address, 60.0)
    try:
        yield find_controller(record.actor)
    finally:
        ray.shutdown()  # or Ray's own hook hides what went wrong: it asks the service, which is down by then


def soak(run: Soak, store: TokenStore, hours: float) -> None:
    """Steps at a high rate until the time is over."""
    journal = Journal(run.run_dir / "journal", "leader")
    history, _ = open_run(journal, run.genesis, accept(ONLINE, run.genesis))
    run.service.up()
    with (
        sole_trainer(run.run_dir),  # a service without a trainer ends
        attached_actor(run.run_dir) as actor,
        Leader(journal, history, start_step=0, lead_steps=8, prefetch_steps=2) as leader,
        Feeder(run.run_dir / "journal", store, rank=0, num_ranks=1, start_step=0, prefetch_steps=2) as feeder,
        (run.run_dir / "metrics.jsonl").open("w") as metrics,
    ):
        trainer = Trainer(run, history, leader, feeder, metrics)
        _go(run, trainer, actor, hours * 3600)


@dataclass
class Trainer:
    """What rank 0 of a job does in a step, without a model."""

    run: Soak
    history: RunHistory
    leader: Leader
    feeder: Feeder
    metrics: Any
    step: int = 0
    reported: int = 0

    def take_step(self) -> None:
        """Read the rows of a step, log it, report when that is due: now and then, and at every mark of the policy."""
        self.leader.begin_step(self.step)
        announced = self.leader.announced_lsn
        rows = self.feeder.next()
        self.metrics.write(json.dumps({"kind": "step", "step": self.step + 1, "digest": f"{rows.digest:016x}"}) + "\n")
        if self.step + 1 - self.reported >= REPORT_EVERY or self.feeder.plan.mark(self.step + 1):
            self.leader.write(Report(
                kind="train", first_step=self.reported, last_step=self.step, attempt=0, learning_rate=1e-3,
                domains=losses(self.run.genesis, self.step),
            ))  # fmt: skip
            self.reported = self.step + 1
        self.feeder.follow(announced)
        self.step += 1


def _go(run: Soak, trainer: Trainer, actor: Any, seconds: float) -> None:
    token, phase_s = find_token(run.run_dir), seconds / NUM_PHASES
    began = time.monotonic()
    next_sample, next_submit, next_line, phase = 0.0, SUBMIT_EVERY_S, TELL_EVERY_S, 0
    while (now := time.monotonic() - began) < seconds:
        trainer.take_step()
        if now >= next_sample:
            next_sample += SAMPLE_EVERY_S
            trainer.metrics.flush()
            run.take_sample(began, trainer.step, trainer.history.num_commits)
            run.ask(actor, "ping")
            run.ask(actor, "status")
        if now >= next_submit:
            next_submit += SUBMIT_EVERY_S
            run.ask(actor, "submit", document=ONLINE, request_id=f"soak-{trainer.step}", token=token)
        if now >= next_line:
            next_line += TELL_EVERY_S
            print(progress(run.samples[-1], seconds - now), flush=True)
        if now >= (phase + 1) * phase_s:
            phase += 1
            run.ask(actor, "pause", held=phase % 2 == 1, request_id=f"phase-{phase}", token=token)
        time.sleep(max(began + trainer.step / STEPS_PER_SECOND - time.monotonic(), 0))


def progress(sample: Sample, seconds_left: float) -> str:
    """One line on the way: how far, how long still, and the memory of each process."""
    memory = ", ".join(f"{name} {mib:.1f}" for name, mib in sample.mib.items())
    return f"{sample.step:,} steps, about {seconds_left / 60:.0f} min left; MiB: {memory}"


def growth(samples: Sequence[Sample], process: str, seconds: float) -> Growth:
    """What `process` gains in held phases by time, and from one to the next by commits, of a soak of `seconds`."""
    phase_s = seconds / NUM_PHASES
    slopes, ends = [], []
    for phase in range(1, NUM_PHASES, 2):
        begin, end = (phase + SETTLES) * phase_s, (phase + 1) * phase_s
        settled = [sample for sample in samples if begin <= sample.seconds < end]
        if phase < NUM_WARM_UP or len(settled) < 2:
            continue
        mib = [sample.mib[process] for sample in settled]
        slopes.append(float(np.polyfit([sample.seconds / 3600 for sample in settled], mib, 1)[0]))
        ends.append(settled[-1])
    by_time = median_interval(slopes)
    record = [_kb_a_commit(one, other, process, by_time[1]) for one, other in itertools.pairwise(ends)]
    return Growth(by_time, median_interval(record))


def _kb_a_commit(one: Sample, other: Sample, process: str, slope: float) -> float:
    """What a commit adds between two samples beyond `slope` MiB an hour."""
    gained = other.mib[process] - one.mib[process] - slope * (other.seconds - one.seconds) / 3600
    return gained * 2**20 / 1e3 / max(other.num_commits - one.num_commits, 1)


def median_interval(values: Sequence[float]) -> Interval:
    """The median, between the two order statistics that hold it with CONFIDENCE; infinite for too few values."""
    ordered, outside = sorted(values), 0.0
    for left_out in range(len(ordered) // 2 + 1):
        outside += 2 * math.comb(len(ordered), left_out) / 2 ** len(ordered)
        if outside > 1 - CONFIDENCE:
            break
    middle = float(np.median(ordered)) if ordered else math.nan
    if not left_out:
        return -math.inf, middle, math.inf
    return ordered[left_out - 1], middle, ordered[-left_out]


def show(run: Soak) -> bool:
    """Print what was measured; whether memory and files are within their limits."""
    first, last = run.samples[0], run.samples[-1]
    middle = run.samples[len(run.samples) // 2]
    rate = last.step / last.seconds
    print(f"\n{last.step:,} steps in {last.seconds / 60:.0f} min ({rate:.0f} a second), "
          f"{last.num_entries:,} entries of the journal, {last.num_commits:,} commits")  # fmt: skip
    print(f"memory of its own, medians over phases ({CONFIDENCE:.0%} confidence); limits: {MAX_MIB_AN_HOUR:g} MiB an "
          f"hour, {MAX_KB_A_COMMIT:g} kB a commit")  # fmt: skip
    verdicts = [
        show_growth(process, first, last, growth(run.samples, process, last.seconds), rate) for process in PROCESSES
    ]
    print(f"  token store's pages in the trainer: {first.trainer_files_mib:.1f} to {last.trainer_files_mib:.1f} MiB")
    bounded = [show_rate(what, first, middle, last) for what in ("journal", "metrics")]
    for verb, taken in run.latency_ms.items():
        p50, p95, p99 = np.percentile(taken, [50, 95, 99]) if taken else (np.nan, np.nan, np.nan)
        worst = max(taken, default=np.nan)
        print(f"  controller, {verb}: p50 {p50:.1f}, p95 {p95:.1f}, p99 {p99:.1f}, worst {worst:.1f} ms ({len(taken)})")
    return all(verdict == "flat" for verdict in verdicts) and all(bounded)


def show_growth(process: str, first: Sample, last: Sample, found: Growth, rate: float) -> str:
    """One line, and its verdict."""
    a_step = found.slope[1] * 2**20 / 3600 / rate
    print(f"  {process:<11}{first.mib[process]:7.1f} to {last.mib[process]:.1f} MiB; {_shown(found.slope)} MiB an hour "
          f"({a_step:+.1f} bytes a step), {_shown(found.commit_kb)} kB a commit: {found.verdict}")  # fmt: skip
    return found.verdict


def _shown(interval: Interval) -> str:
    low, middle, high = interval
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def show_rate(what: str, first: Sample, middle: Sample, last: Sample) -> bool:
    """Bytes a step of the run's files, in its halves; whether they are the same."""
    rates = []
    for begin, end in ((first, middle), (middle, last)):
        grown = getattr(end, f"{what}_mb") - getattr(begin, f"{what}_mb")
        rates.append(1e6 * grown / max(end.step - begin.step, 1))
    is_bounded = rates[1] <= MAX_GROWTH_OF_RATES * rates[0]
    verdict = "bounded" if is_bounded else f"GROWS: at most {MAX_GROWTH_OF_RATES:g} times as much is expected"
    print(f"  {what}: {rates[0]:.0f} bytes a step in the first half, {rates[1]:.0f} in the second: {verdict}")
    return is_bounded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--samples", type=Path, help="write every sample to this file, a line of JSON each")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        store = TokenStore.open(
            write_store(folder / "store", random_rows(1, NUM_ROWS), rows_per_batch=512, rows_per_file=4096)
        )
        genesis = Genesis(
            run="soak", seed=9, sequence_length=store.manifest.sequence_length, rows_per_step=ROWS, num_steps=10**8,
            store_fingerprint=store.fingerprint, domains=store.domains(),
        )  # fmt: skip
        service = Service(folder / "soak")
        run = Soak(service.run_dir, genesis, service)
        try:
            soak(run, store, arguments.hours)
        finally:
            service.down()
            if arguments.samples:
                arguments.samples.write_text("".join(json.dumps(asdict(sample)) + "\n" for sample in run.samples))
        is_within_limits = show(run)
        verify(service.run_dir / "journal")
        print("  the journal's audit finds nothing")
    raise SystemExit(0 if is_within_limits else 1)


if __name__ == "__main__":
    main()
