"""What a run that faults happened to is compared with: the same run without them, and the plan of its own journal."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mixwright.data_mixing.entries import PolicyEntry, Report
from mixwright.data_mixing.history import CommittedPolicy, RunHistory
from mixwright.data_mixing.journal import Journal, read_entries
from mixwright.data_mixing.leader import open_run
from mixwright.data_mixing.plan import Plan, chain_digest
from mixwright.pretrain.rundir import journal_folder
from tests.drills.drill_run import NAME, DrillRun
from tests.pretrain.jobs import digests, finish, metrics, mixwright, start_job, write_config

OTHER_RANKS = 1e-3
"""Relative difference of final losses between numbers of ranks: sums are added in another order (docs/training.md)."""


@dataclass
class References:
    """Undisturbed runs, each made once: same configuration, same policies at the same steps, same number of ranks."""

    folder: Path
    _made: dict[str, Path] = field(default_factory=dict)

    def of(self, run: DrillRun, num_ranks: int = 1) -> Path:
        """Run folder of the undisturbed run that reads by exactly the commits of `run`."""
        tree, history = run.tree, run.history()
        tree["run"]["folder"] = ""
        commits = [_plain(commit).model_dump(mode="json") for commit in history.commits]
        key = json.dumps([tree, num_ranks, history.genesis.model_dump(mode="json"), commits], sort_keys=True)
        if key not in self._made:
            self._made[key] = self._make(run, history, num_ranks)
        return self._made[key]

    def _make(self, run: DrillRun, history: RunHistory, num_ranks: int) -> Path:
        folder = self.folder / f"undisturbed-{len(self._made)}"
        folder.mkdir(parents=True)
        tree = run.tree
        tree["run"]["folder"] = str(folder)
        tree["mixing"] |= {"service": "none", "policy": {"kind": "temperature", "temperature": 1.0}, "feed": "local"}
        _begin(folder / NAME / "journal", history)
        code, output = finish(start_job(write_config(folder, tree), num_ranks=num_ranks))
        assert code == 0, output[-4000:]
        return folder / NAME


def _begin(folder: Path, history: RunHistory) -> None:
    """The journal of a run that knows all its policies before its first step."""
    journal = Journal(folder, writer="leader")
    first, *later = history.commits
    open_run(journal, history.genesis, _plain(first))
    for commit in later:
        journal.append(_plain(commit))


def _plain(commit: CommittedPolicy) -> PolicyEntry:
    """What is read under a committed policy, wanted at its effective step and without how it came about."""
    nobody = {"marks": (), "root": None, "decision_lsn": None, "request_id": "", "author": "", "why": ""}
    at_step = {"at_step": commit.effective_step or None}
    return commit.policy.model_copy(update={"document": {}, **nobody, **at_step})


def assert_as_undisturbed(run: DrillRun, reference: Path, *, same_ranks: bool = True, rel: float = OTHER_RANKS) -> None:
    """Every step read the rows of the undisturbed run in its order, no row is lost or doubled, the losses are equal.

    `same_ranks`: bit for bit; else up to `rel`, since another number of ranks adds in another order.
    """
    audit(run.run_dir, run.num_steps)
    assert digests(run.run_dir) == digests(reference)
    assert [c.effective_step for c in run.history().commits] == [c.effective_step for c in _commits(reference)]
    expected = final_losses(reference)
    assert final_losses(run.run_dir) == (expected if same_ranks else pytest.approx(expected, rel=rel))


def final_losses(run_dir: Path) -> dict[str, float]:
    """Test loss of each domain (nats per token) after the last step."""
    losses: dict[str, float] = metrics(run_dir, "test")[-1]["loss"]
    return losses


def audit(run_dir: Path, num_steps: int) -> None:
    """The journal is sound, and what the ranks read is what it says: each row where and as often as planned."""
    checked = mixwright("mix", "log", "--verify", "--run", str(run_dir))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    history = read_history_of(run_dir)
    assert history.end is not None
    assert (history.end.step, history.end.reason) == (num_steps, "complete")
    plan = history.plan()
    digest, chain = 0, []
    for step in range(num_steps):
        digest = chain_digest(digest, plan.digest(step))
        chain.append(f"{digest:016x}")
    assert digests(run_dir) == chain
    assert history.end.digest == chain[-1]
    _check_rows(plan, num_steps)
    _check_reports(run_dir, plan, num_steps)


def _check_rows(plan: Plan, num_steps: int) -> None:
    """No row of the plan is lost or comes twice in an epoch: the draws of a domain are its rows, epoch by epoch."""
    read: dict[int, list[tuple[int, int]]] = {}
    for step in range(num_steps):
        rows = plan.rows(step)
        assert sorted(rows.position_n.tolist()) == list(range(plan.genesis.rows_per_step))
        for domain, epoch, row in zip(rows.domain_n.tolist(), rows.epoch_n.tolist(), rows.row_n.tolist(), strict=True):
            read.setdefault(domain, []).append((epoch, row))
    cursors = plan.cursors(num_steps)
    for index, domain in enumerate(plan.genesis.domains):
        drawn = read.get(index, [])
        assert len(drawn) == len(set(drawn)) == cursors[index]
        full, rest = divmod(len(drawn), domain.num_rows)
        per_epoch = [sum(epoch == number for epoch, _ in drawn) for number in range(full + 1)]
        assert per_epoch == [domain.num_rows] * full + [rest]


def _check_reports(run_dir: Path, plan: Plan, num_steps: int) -> None:
    """Each report's digest, of the rows that ranks really fed, is the plan's; the newest word on a step counts.

    No step is without a report: one is written before the checkpoint after which its steps are not done again.
    """
    owners: dict[int, int] = {}
    reports: dict[int, Report] = {}
    for entry in read_entries(journal_folder(run_dir)):
        if isinstance(entry.body, Report) and entry.body.kind == "train":
            reports[entry.lsn] = entry.body
            owners |= dict.fromkeys(range(entry.body.first_step, entry.body.last_step + 1), entry.lsn)
    for lsn in set(owners.values()):
        steps = range(reports[lsn].first_step, reports[lsn].last_step + 1)
        if all(owners[step] == lsn for step in steps):
            assert int(reports[lsn].digest, 16) == sum(map(plan.digest, steps)) % (1 << 64)
    assert sorted(owners) == list(range(num_steps))


def read_history_of(run_dir: Path) -> RunHistory:
    """The run folded from its first entry on, without snapshots."""
    history = RunHistory()
    for entry in read_entries(journal_folder(run_dir)):
        history.apply(entry)
    return history


def _commits(run_dir: Path) -> list[CommittedPolicy]:
    return read_history_of(run_dir).commits
