"""What `mixwright mix` shows, as tables and lines. Names and remarks of users are shown as text, never as markup."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mixwright.data_mixing.answers import printable
from mixwright.data_mixing.entries import (
    Cancel,
    Checkpoint,
    Commit,
    Decision,
    End,
    EntryBody,
    Genesis,
    Lease,
    Pass,
    Pause,
    PolicyEntry,
    Reject,
    Report,
)
from mixwright.data_mixing.entry_file import Entry
from mixwright.data_mixing.forecast import Forecast, MixtureChange, describe
from mixwright.data_mixing.plan import RowRefs
from mixwright.data_mixing.run_status import PolicyStatus, RunStatus
from mixwright.data_mixing.trace import RowUse

MOST_DOMAINS = 40
"""A table shows this many domains, those with the largest proportions; `--json` has all."""
FILE_WIDTH = 160


def console() -> Console:
    """Where tables go: as wide as the terminal, or as a file should be."""
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else FILE_WIDTH)


def table(title: str, left: str, right: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table with one left-aligned column and numbers to its right."""
    result = Table(title=escape(title), title_justify="left")
    result.add_column(left)
    for column in right:
        result.add_column(column, justify="right")
    for row in rows:
        result.add_row(*map(escape, row))
    return result


def status_view(status: RunStatus, service: str) -> RenderableType:
    """A run at a glance."""
    lines = [
        f"run {status.run}: {status.state}, step {status.next_step} of {status.num_steps}, journal entry "
        f"{status.last_lsn}, checkpoint {status.checkpoint or 'none'}",
        f"policy in force: {policy_line(status.policy) if status.policy else 'none'}",
        *(f"coming: {policy_line(policy)}" for policy in status.pending),
        f"controller: {status.controller or 'none so far'}",
        f"service: {service}",
    ]
    shown = sorted(status.domains, key=lambda domain: -domain.proportion)[:MOST_DOMAINS]
    rows = [
        [
            d.name,
            percent(d.proportion),
            f"{d.num_tokens:,}",
            f"{d.epochs:.2f}",
            "-" if d.loss is None else f"{d.loss:.3f}",
        ]
        for d in shown
    ]
    columns = ("mixture", "tokens read", "epochs", "loss")
    return Group(Text("\n".join(lines)), table("", "domain", columns, rows), Text(_hidden(len(status.domains))))


def policy_line(policy: PolicyStatus) -> str:
    """A policy as `entry 7: static from step 120 by ann (anneal)`."""
    if policy.effective_step is not None:
        when = f"from step {policy.effective_step}"
    else:
        when = "as soon as possible" if policy.at_step is None else f"wants step {policy.at_step}"
    return f"entry {policy.lsn}: {policy.kind}, {when}{_by(policy.author, policy.why)}"


def change_view(changes: Sequence[MixtureChange], step: int) -> RenderableType:
    """Mixture in force, new mixture, difference."""
    shown = sorted(changes, key=lambda change: -max(change.after, change.before))[:MOST_DOMAINS]
    rows = [[c.name, percent(c.before), percent(c.after), f"{100 * (c.after - c.before):+.2f}"] for c in shown]
    title = f"mixture at step {step}"
    return Group(table(title, "domain", ("in force", "new", "points"), rows), Text(_hidden(len(changes))))


def forecast_view(forecast: Forecast) -> RenderableType:
    """What is read up to a step, and which domain runs out when."""
    shown = sorted(forecast.domains, key=lambda domain: -domain.proportion)[:MOST_DOMAINS]
    rows = [
        [
            d.name,
            percent(d.proportion),
            f"{d.num_tokens:,}",
            f"{d.epochs:.2f}",
            str(d.exhaustion.step) if d.exhaustion else "-",
        ]
        for d in shown
    ]
    title = f"steps {forecast.from_step} to {forecast.until_step - 1}"
    columns = ("share of tokens", "tokens", "epochs at the end", "cap reached at step")
    lines = [describe(domain.exhaustion) for domain in forecast.domains if domain.exhaustion]
    if forecast.stop_step is not None:
        lines.append(f"the run ends at step {forecast.stop_step}")
    return Group(table(title, "domain", columns, rows), Text("\n".join([*lines, _hidden(len(forecast.domains))])))


def log_view(entries: Sequence[Entry]) -> RenderableType:
    """Journal entries, one a line."""
    result = Table()
    for column in ("entry", "time", "type"):
        result.add_column(column, no_wrap=True)
    result.add_column("writer", no_wrap=True, overflow="ellipsis", max_width=24)
    result.add_column("what", overflow="fold")
    for entry in entries:
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.time))
        cells = (str(entry.lsn), clock, entry.type, entry.writer, summary(entry.body))
        result.add_row(*(escape(printable(cell)) for cell in cells))
    return result


def summary(body: EntryBody) -> str:
    """An entry's body as a line."""
    match body:
        case Genesis():
            return (
                f"run {body.run}: {body.num_steps} steps of {body.rows_per_step} rows of "
                f"{body.sequence_length} tokens, {len(body.domains)} domains, seed {body.seed}"
            )
        case PolicyEntry():
            shadow = "shadow " * body.shadow
            wanted = "" if body.at_step is None else f" for step {body.at_step}"
            kind = body.document.get("kind", "?")
            return f"{shadow}{kind}{wanted}, {len(body.program)} segment(s){_by(body.author, body.why)}"
        case Reject():
            return f"{body.reason}{_by(body.author, '')}"
        case Cancel():
            return f"policy {body.policy_lsn}{_by(body.author, body.why)}"
        case Commit():
            return f"policy {body.policy_lsn} from step {body.effective_step} on"
        case Decision() | Pass() | Pause():
            return _decision_summary(body)
        case Report():
            tokens = sum(domain.num_tokens for domain in body.domains.values())
            mean = sum(domain.loss_sum for domain in body.domains.values()) / max(tokens, 1)
            return (
                f"{body.kind} steps {body.first_step} to {body.last_step}: {mean:.4f} nats/token over {tokens:,} tokens"
            )
        case Checkpoint():
            return f"{body.tag} after {body.step} steps"
        case Lease():
            return f"{body.role} is {body.holder} (lease {body.epoch})"
        case End():
            return f"{body.reason} after {body.step} steps"


def _decision_summary(body: Decision | Pass | Pause) -> str:
    if isinstance(body, Pause):
        return f"{'decisions are held' if body.held else 'decisions go on'}{_by(body.author, body.why)}"
    if isinstance(body, Pass):
        return f"policy {body.policy_lsn} at step {body.step}: {body.reason}"
    shares = zip(body.window.get("arms", ()), body.shares, strict=False)
    mixture = ", ".join(f"{name} {percent(share)}" for name, share in shares)
    reason = f" ({body.reason})" if body.reason else ""
    return f"{'shadow ' * body.shadow}policy {body.policy_lsn} at step {body.step}: {body.action}{reason} {mixture}"


def rows_view(names: Sequence[str], refs: RowRefs, title: str, limit: int) -> RenderableType:
    """Rows of a step, in order of position."""
    numbers = zip(refs.position_n, refs.domain_n, refs.epoch_n, refs.row_n, strict=True)
    rows = [[str(position), names[domain], str(epoch), str(row)] for position, domain, epoch, row in numbers]
    result = Table(title=escape(title), title_justify="left")
    for column, justify in (("position", "right"), ("domain", "left"), ("epoch", "right"), ("row", "right")):
        result.add_column(column, justify="right" if justify == "right" else "left")
    for row in rows[:limit]:
        result.add_row(*map(escape, row))
    more = f"{len(rows) - limit} more rows; see --limit" if len(rows) > limit else ""
    return Group(result, Text(more))


def uses_view(uses: Sequence[RowUse], title: str) -> RenderableType:
    """Steps that read a row."""
    return table(title, "step", ("position", "epoch"), [[str(u.step), str(u.position), str(u.epoch)] for u in uses])


def percent(proportion: float) -> str:
    """A proportion as a percentage that does not hide a small share."""
    return f"{100 * proportion:.2f} %" if proportion == 0 or proportion >= 5e-5 else "< 0.01 %"


def _by(author: str, why: str) -> str:
    return (f" by {author}" if author else "") + (f" ({why})" if why else "")


def _hidden(num_domains: int) -> str:
    more = num_domains - MOST_DOMAINS
    return f"{more} domains with smaller proportions are not shown; see --json" if more > 0 else ""
