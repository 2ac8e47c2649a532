"""Journals to test on, and a writer process that can be killed."""

import sys
from pathlib import Path

from mixwright.data_mixing.entries import Commit, DomainLoss, Genesis, PolicyEntry, Report
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.journal import Journal
from tests.data_mixing.plan_cases import CommittedPolicy, genesis, policy


def small_run() -> Genesis:
    return genesis([50, 60, 70], rows_per_step=16, num_steps=100)


def report(step: int, num_domains: int = 3) -> Report:
    loss = DomainLoss(loss_sum=1.25 * step, loss_square_sum=0.1, num_tokens=8, num_rows=1)
    domains = {f"d{i}": loss for i in range(num_domains)}
    return Report(kind="train", first_step=step, last_step=step, domains=domains, digest="ff", attempt=0)


def begun(folder: Path, writer: str = "leader") -> Journal:
    """A journal with its first entry."""
    journal = Journal(folder, writer)
    journal.append(small_run())
    return journal


def caught_up(journal: Journal, history: RunHistory) -> RunHistory:
    for entry in journal.poll():
        history.apply(entry)
    return history


def commit(journal: Journal, history: RunHistory, entry: PolicyEntry, effective_step: int) -> None:
    """Append a policy and its commit with the right fingerprint."""
    lsn = journal.append(entry).lsn
    caught_up(journal, history)
    plan = history.plan().extended(CommittedPolicy(effective_step, lsn, entry))
    digest = plan.state_digest(effective_step)
    journal.append(Commit(policy_lsn=lsn, effective_step=effective_step, plan_digest=digest))
    caught_up(journal, history)


def committed_run(folder: Path, num_commits: int) -> tuple[Journal, RunHistory]:
    """A journal in which every third step a new policy takes effect."""
    journal, history = begun(folder), RunHistory()
    caught_up(journal, history)
    for index in range(num_commits):
        commit(journal, history, policy([1 + index % 5, 1 + index % 3, 1]), 3 * index)
    return journal, history


def append_reports(folder: Path, writer: str, first: int, count: int) -> None:
    """When told to: append `count` reports, saying each entry's number once it is on disk."""
    print("ready", flush=True)
    sys.stdin.readline()
    journal = Journal(folder, writer)
    for step in range(first, first + count):
        print(journal.append(report(step)).lsn, flush=True)


if __name__ == "__main__":
    append_reports(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
