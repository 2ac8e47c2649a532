"""Two hours of a run at a high rate: `python -m tests.benchmarks.soak [--hours 2]` (`make soak`).

Leader, feeder, journal and metrics are real and in this process; losses come from a formula, so that a step takes
milliseconds. The controller is the actor of a private Ray, decides an online policy all the time, and is asked and
given policies meanwhile. Memory is looked at in each process; a slope is told with its standard error, over the second
half, because caches and pools of memory fill in the first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.answers import Answer
from mixwright.data_mixing.entries import DomainLoss, Genesis, Report
from mixwright.data_mixing.feeder import Feeder
from mixwright.data_mixing.journal import Journal, verify
from mixwright.data_mixing.leader import Leader, open_run
from mixwright.data_mixing.run_token import find_token
from mixwright.data_mixing.service import read_record
from mixwright.data_mixing.store import TokenStore
from mixwright.pretrain.rundir import sole_trainer
from tests.data_mixing.corpora_for_tests import random_rows, write_store
from tests.drills.drill_service import Service

ROWS, REPORT_EVERY, STEPS_PER_SECOND = 32, 10, 100
SUBMIT_EVERY_S, SAMPLE_EVERY_S = 60.0, 10.0
NUM_ROWS = {f"domain-{i}": 2000 * (i + 1) for i in range(6)}
ONLINE = {"kind": "odm", "round_steps": 500, "decide": "bridge"}


@dataclass
class Sample:
    """What is seen at an instant: MiB of the processes, MB of the files, steps done."""

    seconds: float
    step: int
    trainer_mib: float
    controller_mib: float
    host_mib: float
    journal_mb: float
    num_entries: int


@dataclass
class Soak:
    """A run under way, and what was measured of it."""

    run_dir: Path
    genesis: Genesis
    service: Service
    samples: list[Sample] = field(default_factory=list)
    latency_ms: dict[str, list[float]] = field(default_factory=lambda: {"ping": [], "status": [], "submit": []})

    def take_sample(self, began: float, step: int) -> None:
        """Add one."""
        files = [entry.stat().st_size for entry in os.scandir(self.run_dir / "journal") if entry.is_file()]
        self.samples.append(Sample(
            time.monotonic() - began, step, _mib(psutil.Process()), _mib(self.service.part("controller")),
            _mib(self.service.part("host")), sum(files) / 1e6, len(files),
        ))  # fmt: skip

    def ask(self, actor: Any, verb: str, **arguments: Any) -> Answer:
        """One verb of the actor, timed."""
        from mixwright.data_mixing.controller import call

        began = time.perf_counter()
        answer = call(actor, verb, arguments, 60.0)
        self.latency_ms[verb].append((time.perf_counter() - began) * 1e3)
        return answer


def _mib(process: psutil.Process | None) -> float:
    return float("nan") if process is None else process.memory_info().rss / 2**20


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
    yield find_controller(record.actor)
    ray.shutdown()


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
        _steps(run, leader, feeder, actor, metrics, hours * 3600)


def _steps(run: Soak, leader: Leader, feeder: Feeder, actor: Any, metrics: Any, seconds: float) -> None:
    began = time.monotonic()
    next_sample, next_submit, step = 0.0, SUBMIT_EVERY_S, 0
    while (now := time.monotonic() - began) < seconds:
        leader.begin_step(step)
        announced = leader.announced_lsn
        rows = feeder.next()
        metrics.write(json.dumps({"kind": "step", "step": step + 1, "digest": f"{rows.digest:016x}"}) + "\n")
        if (step + 1) % REPORT_EVERY == 0:
            leader.write(Report(
                kind="train", first_step=step + 1 - REPORT_EVERY, last_step=step, attempt=0, learning_rate=1e-3,
                domains=losses(run.genesis, step),
            ))  # fmt: skip
        feeder.follow(announced)
        step += 1
        if now >= next_sample:
            next_sample += SAMPLE_EVERY_S
            run.take_sample(began, step)
            run.ask(actor, "ping")
            run.ask(actor, "status")
        if now >= next_submit:
            next_submit += SUBMIT_EVERY_S
            run.ask(actor, "submit", document=ONLINE, request_id=f"soak-{step}", token=find_token(run.run_dir))
        time.sleep(max(began + step / STEPS_PER_SECOND - time.monotonic(), 0))


def slope(samples: Sequence[Sample], name: str) -> tuple[float, float]:
    """MiB an hour and its standard error, by least squares over the second half."""
    half = samples[len(samples) // 2 :]
    hours = np.array([sample.seconds / 3600 for sample in half])
    mib = np.array([getattr(sample, name) for sample in half])
    rate, start = np.polyfit(hours, mib, 1)
    residual = float(np.square(mib - rate * hours - start).sum() / max(len(half) - 2, 1))
    return float(rate), float(np.sqrt(residual / np.square(hours - hours.mean()).sum()))


def show(run: Soak) -> None:
    """Print what was measured."""
    first, last = run.samples[0], run.samples[-1]
    print(f"\n{last.step:,} steps in {last.seconds / 60:.0f} min, {last.num_entries:,} entries of the journal")
    for name in ("trainer_mib", "controller_mib", "host_mib"):
        rate, error = slope(run.samples, name)
        grown = f"{getattr(first, name):8.1f} to {getattr(last, name):.1f} MiB"
        a_step = rate / (3600 * last.step / last.seconds) * 2**20
        slope_told = f"{rate:+.2f} +- {error:.2f} MiB an hour, {a_step:+.1f} bytes a step"
        print(f"  {name.removesuffix('_mib'):<11}{grown}; second half {slope_told}")
    middle = run.samples[len(run.samples) // 2]
    for what, part in (("first", (first, middle)), ("second", (middle, last))):
        grown, steps = (part[1].journal_mb - part[0].journal_mb) * 1e6, part[1].step - part[0].step
        print(f"  journal, {what} half: {grown / max(steps, 1):.0f} bytes a step")
    metrics = (run.run_dir / "metrics.jsonl").stat().st_size
    print(f"  metrics: {metrics / last.step:.0f} bytes a step")
    for verb, taken in run.latency_ms.items():
        p50, p99 = np.percentile(taken, [50, 99]) if taken else (np.nan, np.nan)
        print(f"  controller, {verb}: p50 {p50:.1f} ms, p99 {p99:.1f} ms, worst {max(taken, default=np.nan):.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0)
    hours = parser.parse_args().hours
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
            soak(run, store, hours)
        finally:
            service.down()
        show(run)
        verify(service.run_dir / "journal")
        print("  the journal's audit finds nothing")


if __name__ == "__main__":
    main()
