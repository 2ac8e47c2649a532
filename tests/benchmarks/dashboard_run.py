"""A large run that nobody trained, for measuring the dashboard: journal of the real entry types, and metrics.

The chain, the plan and every fingerprint in a COMMIT are real, so that all readers accept it; losses follow formulas.
Entries are written without flushing each to disk, which `Journal.append` would do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.domain import Cap, Domain
from mixwright.data_mixing.entries import (
    Checkpoint,
    Commit,
    Decision,
    DomainLoss,
    End,
    EntryBody,
    Genesis,
    Lease,
    PolicyEntry,
    Reject,
    Report,
)
from mixwright.data_mixing.entry_file import NO_HASH, entry_path, sealed
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.mixture import segments, shares
from mixwright.data_mixing.plan import CommittedPolicy, Plan

FAMILIES = ("web", "code", "books", "maths", "wiki")
REPORT_EVERY, VALIDATE_EVERY, CHECKPOINT_EVERY = 10, 500, 5000
SECONDS_PER_STEP = 0.42


@dataclass(frozen=True)
class Size:
    """How much there is to read."""

    num_steps: int = 100_000
    num_domains: int = 50
    num_commits: int = 2_000
    decide_every: int = 1_000

    @property
    def steps_per_commit(self) -> int:
        return max(self.num_steps // self.num_commits, 1)


class LargeRun:
    """Writes `run_dir/journal` and `run_dir/metrics.jsonl` step by step; `write` goes on from where it is."""

    def __init__(self, run_dir: Path, size: Size) -> None:
        self.run_dir, self.size, self.history = run_dir, size, RunHistory()
        self.step, self._prev, self._chance = 0, NO_HASH, np.random.default_rng(1)
        self._metrics: TextIO | None = None
        (run_dir / "journal").mkdir(parents=True)
        self._append(self._genesis())
        self._append(Lease(role="trainer", holder="trainer@node-0", epoch=0))
        first = accept({"kind": "temperature", "temperature": 2.0, "why": "by size, flattened"}, self.genesis)
        self._changes = dict(self._planned_changes())
        # All commits at once: a stretch whose end is known costs a tenth of one that might last for ever.
        commits = [CommittedPolicy(step, 0, policy) for step, policy in [(0, first), *self._changes.items()]]
        self._plan = Plan(self.genesis, commits)
        self._append(first)
        self._append(Commit(policy_lsn=2, effective_step=0, plan_digest=self._plan.state_digest(0)))
        self._append(Lease(role="controller", holder="controller@node-0", epoch=0))
        document = {"kind": "aioli", "shadow": True, "author": "ann", "why": "what would it read?"}
        self._append(accept(document, self.genesis, history=self.history))
        self._shadow = self.history.last_lsn

    @property
    def genesis(self) -> Genesis:
        return self.history.genesis

    def _genesis(self) -> Genesis:
        names = [f"{FAMILIES[i % len(FAMILIES)]}-{i // len(FAMILIES):02d}" for i in range(self.size.num_domains)]
        rows = [20_000 + 17_000 * (i * 7 % self.size.num_domains) for i in range(self.size.num_domains)]
        # Every fourth domain runs out, some of them soon.
        caps = [Cap(max_epochs=40.0 + 3 * i) if i % 4 == 0 else Cap() for i in range(self.size.num_domains)]
        domains = tuple(
            Domain(name=name, num_rows=number, fingerprint=name, cap=cap)
            for name, number, cap in zip(names, rows, caps, strict=True)
        )
        return Genesis(run=self.run_dir.name, seed=3, sequence_length=2048, rows_per_step=512,
                       num_steps=self.size.num_steps, store_fingerprint="none", domains=domains)  # fmt: skip

    def write(self, until_step: int) -> None:
        """Train up to `until_step`."""
        with (self.run_dir / "metrics.jsonl").open("a", encoding="utf-8") as self._metrics:
            while self.step < until_step:
                self._one_step()
        if self.step == self.size.num_steps:
            self._append(End(step=self.step, reason="complete", digest="0"))

    def _one_step(self) -> None:
        step = self.step
        if step in self._changes:
            self._change(step)
        self.step = step + 1
        slow = 3.0 if step % 997 == 0 else 1.0
        noise = float(self._chance.random())
        self._write("step", lr=3e-4 * (1 + math.cos(math.pi * step / self.size.num_steps)) / 2, grad_norm=0.5 + noise,
                    step_seconds=SECONDS_PER_STEP * slow * (1 + 0.05 * noise), wait_seconds=1e-4 * noise * slow,
                    run_digest=f"{step:016x}", policy=self.history.commits[-1].lsn)  # fmt: skip
        if self.step % REPORT_EVERY == 0:
            self._report("train", self.step - REPORT_EVERY, step)
        if self.step % VALIDATE_EVERY == 0:
            self._report("validation", step, step)
        if self.step % self.size.decide_every == 0:
            self._decide()
        if self.step % CHECKPOINT_EVERY == 0:
            self._append(Checkpoint(step=self.step, tag=f"step-{self.step:08d}", digest="0"))

    def _planned_changes(self) -> Iterator[tuple[int, PolicyEntry]]:
        """Effective step and policy of every change: the mixture moves a little each time."""
        for number in range(1, self.size.num_commits):
            step = number * self.size.steps_per_commit
            share_G = self._chance.dirichlet(np.full(self.size.num_domains, 20.0))
            mixture = {d.name: round(float(s), 5) for d, s in zip(self.genesis.domains, share_G, strict=True)}
            document = {"kind": "static", "mixture": mixture, "at_step": step}
            program = segments([(0, shares(mixture, self.genesis.domains, "mixture"))])
            who = ("ann", "ben", "cem")[number % 3]
            yield step, PolicyEntry(document=document, program=program, at_step=step, author=who, why=f"trial {number}")

    def _change(self, step: int) -> None:
        """The next policy and its commit; now and then one that is refused."""
        self._append(self._changes[step])
        lsn, digest = self.history.last_lsn, self._plan.state_digest(step)
        self._append(Commit(policy_lsn=lsn, effective_step=step, plan_digest=digest))
        if step // self.size.steps_per_commit % 40 == 0:
            reason = "mixture.wkii: no such domain; did you mean 'wiki-00'?"
            self._append(Reject(document={"kind": "static", "mixture": {"wkii": 1}}, reason=reason, author="ben"))

    def _report(self, kind: Any, first_step: int, last_step: int) -> None:
        names = [domain.name for domain in self.genesis.domains]
        plan = self._plan
        rows_G = plan.cursors(last_step + 1) - plan.cursors(first_step) if kind == "train" else np.full(len(names), 4)
        floor_G = 1.5 + 0.04 * np.arange(len(names))
        loss_G = floor_G + 6 / np.sqrt(1 + last_step / 50) + 0.02 * self._chance.standard_normal(len(names))
        tokens_G = rows_G * self.genesis.sequence_length
        losses = {
            name: DomainLoss(loss_sum=float(t * x), loss_square_sum=float(t * (x * x + 2.0)), num_tokens=int(t),
                             num_rows=int(r))
            for name, r, t, x in zip(names, rows_G, tokens_G, loss_G, strict=True) if t
        }  # fmt: skip
        self._append(Report(kind=kind, first_step=first_step, last_step=last_step, domains=losses, attempt=0,
                            learning_rate=1e-4 if kind == "train" else None))  # fmt: skip
        means = {name: loss.loss_sum / loss.num_tokens for name, loss in losses.items()}
        self._write(kind, loss=means, loss_stderr=means, perplexity=means, tokens=means)
        if kind == "train":
            share = {name: float(t) / float(tokens_G.sum()) for name, t in zip(names, tokens_G, strict=True)}
            counts = (512 * self._chance.dirichlet(np.arange(1, 13))).astype(int).tolist()
            edges = [0.0625, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0, 16.0]
            self._write("weights", effective_sample_size=0.7 + 0.1 * float(self._chance.random()), weight_share=share,
                        token_share=share, correlation=0.1, histogram={"edges": edges, "counts": counts})  # fmt: skip

    def _decide(self) -> None:
        names = FAMILIES[: max(2, min(len(FAMILIES), self.size.num_domains))]
        gains = (self._chance.standard_normal((len(names), len(names))) * 0.1).tolist()
        shares = tuple(self._chance.dirichlet(np.full(len(names), 30.0)).tolist())
        number = self.step // self.size.decide_every - 1
        diagnostics = {"gains": gains, "score": self._chance.standard_normal(len(names)).tolist(), "skipped": 0}
        proposal = {"shares": shares, "state": {}, "diagnostics": diagnostics, "held": ""}
        self._append(Decision(policy_lsn=self._shadow, step=self.step, decision=number, window={"arms": names},
                              state={}, proposal=proposal, shares=shares, stretches=({"num_steps": 1},),
                              action="propose", shadow=True))  # fmt: skip

    def _write(self, kind: str, **values: Any) -> None:
        assert self._metrics is not None
        self._metrics.write(json.dumps({"kind": kind, "step": self.step, **values}) + "\n")

    def _append(self, body: EntryBody) -> None:
        clock = 1.7e9 + self.step * SECONDS_PER_STEP
        entry, raw = sealed(self.history.last_lsn + 1, body, "generator", clock, self._prev)
        path = entry_path(self.run_dir / "journal", entry.lsn)
        path.with_suffix(".part").write_bytes(raw)
        path.with_suffix(".part").rename(path)
        self._prev = entry.hash
        self.history.apply(entry)
