"""Where a run stands, as plain data: what `mix status` shows and what the controller answers."""

from __future__ import annotations

from typing import Any, Literal

from mixwright.data_mixing.config_file import StrictModel
from mixwright.data_mixing.entries import PolicyEntry
from mixwright.data_mixing.entry_file import Entry
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.plan import Plan


class DomainStatus(StrictModel):
    """One domain: its proportion in the mixture in force, what was read of it, its newest mean loss (nats/token)."""

    name: str
    proportion: float
    num_tokens: int
    epochs: float
    loss: float | None


class PolicyStatus(StrictModel):
    """A policy that is in force or waits. `effective_step` is None while it waits."""

    lsn: int
    kind: str
    effective_step: int | None
    at_step: int | None
    author: str
    why: str


class RunStatus(StrictModel):
    """`next_step` is the first step that is not reported as trained; reports come every few steps."""

    run: str
    state: Literal["waiting", "running", "complete", "exhausted"]
    next_step: int
    num_steps: int
    last_lsn: int
    policy: PolicyStatus | None
    pending: tuple[PolicyStatus, ...]
    domains: tuple[DomainStatus, ...]
    controller: str
    checkpoint: str


def run_status(history: RunHistory, plan: Plan | None = None) -> RunStatus:
    """The status that a history tells. Raises JournalError when the run has no GENESIS entry.

    `plan` is that of the history's commits, where the caller has it; the history's own audits every commit.
    """
    genesis, next_step = history.genesis, history.last_step + 1
    shown_step = min(next_step, genesis.num_steps - 1)
    in_force = next((c for c in reversed(history.commits) if c.effective_step <= shown_step), None)
    lease = history.leases.get("controller")
    return RunStatus(
        run=genesis.run,
        state=_state(history),
        next_step=next_step,
        num_steps=genesis.num_steps,
        last_lsn=history.last_lsn,
        policy=_policy_status(in_force.lsn, in_force.policy, in_force.effective_step) if in_force else None,
        pending=_upcoming(history, shown_step),
        domains=_domains(history, plan or history.plan(), next_step, shown_step) if in_force else (),
        controller=f"{lease.holder} (lease {lease.epoch})" if lease else "",
        checkpoint=history.checkpoints[-1].tag if history.checkpoints else "",
    )


def entry_record(entry: Entry) -> dict[str, Any]:
    """A journal entry as plain data."""
    body = entry.body.model_dump(mode="json")
    return {"lsn": entry.lsn, "type": entry.type, "time": entry.time, "writer": entry.writer, "body": body}


def _state(history: RunHistory) -> Literal["waiting", "running", "complete", "exhausted"]:
    if history.end is not None:
        return history.end.reason
    return "running" if history.commits else "waiting"


def _upcoming(history: RunHistory, step: int) -> tuple[PolicyStatus, ...]:
    """Policies that are committed for a later step, then those that wait for a commit."""
    committed = [_policy_status(c.lsn, c.policy, c.effective_step) for c in history.commits if c.effective_step > step]
    return (*committed, *(_policy_status(lsn, policy, None) for lsn, policy in history.pending()))


def _policy_status(lsn: int, policy: PolicyEntry, effective_step: int | None) -> PolicyStatus:
    return PolicyStatus(
        lsn=lsn,
        kind=str(policy.document.get("kind", "?")),
        effective_step=effective_step,
        at_step=policy.at_step,
        author=policy.author,
        why=policy.why,
    )


def _domains(history: RunHistory, plan: Plan, next_step: int, shown_step: int) -> tuple[DomainStatus, ...]:
    genesis = history.genesis
    newest = next((report.domains for report in reversed(history.reports) if report.kind == "train"), {})
    losses = {name: loss.loss_sum / loss.num_tokens for name, loss in newest.items() if loss.num_tokens}
    rows = zip(genesis.domains, plan.proportions(shown_step), plan.cursors(next_step), strict=True)
    return tuple(
        DomainStatus(
            name=domain.name,
            proportion=float(proportion),
            num_tokens=int(num_rows) * genesis.sequence_length,
            epochs=int(num_rows) / domain.num_rows,
            loss=losses.get(domain.name),
        )
        for domain, proportion, num_rows in rows
    )
