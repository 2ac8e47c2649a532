"""Runs to test policies, the controller and the commands on, and the trainer's side of their journals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.domain import Cap, Domain
from mixwright.data_mixing.entries import DomainLoss, End, Genesis, Report
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.journal import Journal
from mixwright.data_mixing.leader import commit_body, open_run

SIZES = {"code": 1000, "wiki": 3000, "web-a": 100, "web-b": 300}
FIRST_POLICY = {"kind": "temperature", "temperature": 1}


def genesis(
    run: str = "exp", num_steps: int = 1000, caps: dict[str, Cap] | None = None, sizes: dict[str, int] = SIZES
) -> Genesis:
    """A run of `num_steps` steps of 8 rows."""
    domains = tuple(
        Domain(name=name, num_rows=size, fingerprint=name, cap=(caps or {}).get(name, Cap()))
        for name, size in sizes.items()
    )
    return Genesis(
        run=run, seed=7, sequence_length=64, rows_per_step=8, num_steps=num_steps, store_fingerprint="store",
        domains=domains,
    )  # fmt: skip


class TrainerSide:
    """What the trainer's leader writes into the journal of `run_dir`, by hand."""

    def __init__(self, run_dir: Path, run: Genesis | None = None, document: dict[str, Any] = FIRST_POLICY) -> None:
        self.run_dir = run_dir
        self.genesis = run or genesis(run_dir.name)
        self.journal = Journal(run_dir / "journal", writer="leader")
        self.history, _ = open_run(self.journal, self.genesis, accept(document, self.genesis))

    def commit(self, lsn: int, effective_step: int) -> None:
        """COMMIT of policy `lsn`."""
        self.read()
        self.journal.append(commit_body(self.history, lsn, self.history.policies[lsn], effective_step))
        self.read()

    def report(self, last_step: int) -> None:
        """REPORT of the ten steps up to `last_step`."""
        loss = DomainLoss(loss_sum=250.0, loss_square_sum=900.0, num_tokens=100, num_rows=2)
        self.journal.append(
            Report(kind="train", first_step=last_step - 9, last_step=last_step, domains={"code": loss}, attempt=0)
        )
        self.read()

    def end(self) -> None:
        """END after the last step."""
        self.journal.append(End(step=self.genesis.num_steps, reason="complete", digest="0"))
        self.read()

    def read(self) -> RunHistory:
        """The run as the trainer knows it now."""
        for entry in self.journal.poll():
            self.history.apply(entry)
        return self.history

    def types(self) -> list[str]:
        """Types of all entries, in order."""
        return [entry.type for entry in Journal(self.run_dir / "journal", writer="reader").poll()]
