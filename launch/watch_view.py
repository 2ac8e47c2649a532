"""A run as one screen: what was asked for beside what was read, losses, caps, the newest commits.

Names and remarks of users are shown as text, never as markup.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mixwright.data_mixing.answers import printable
from mixwright.data_mixing.run_figures import DomainFigures, NewCommit, RunFigures
from mixwright.launch.console import duration, shown_losses
from mixwright.launch.mix_tables import percent, policy_line

COMMITS = 5
LINES_AROUND = 11
"""Lines of the screen besides the domains' and the commits'."""
FEWEST_DOMAINS = 3
WIDE, WIDEST_BAR = 84, 32
"""From so many columns on there is room for bars."""
BAR, HALF, MARK = "━", "╸", "┃"
PLAIN_BAR, PLAIN_MARK = "=", "|"


def watch_view(figures: RunFigures, console: Console, now: float) -> RenderableType:
    """The screen, as large as the console; `now` in seconds since 1970."""
    commits = figures.commits[-COMMITS:]
    most = max(console.height - LINES_AROUND - len(commits), FEWEST_DOMAINS)
    ranked = sorted(figures.domains, key=lambda domain: -domain.requested)
    hidden = len(ranked) - most
    parts: list[RenderableType] = [
        _progress(figures, console),
        Text(_pace_line(figures, now)),
        *(Text(printable(line)) for line in _policy_lines(figures)),
        _domains(ranked[:most], figures, console),
    ]
    if hidden > 0:
        parts.append(Text(f"{hidden} domains with smaller proportions are not shown", style="dim"))
    return Group(*parts, Text("newest commits", style="bold"), *(Text(_commit_line(commit)) for commit in commits))


def change_line(figures: RunFigures) -> str:
    """The run as one line, for where no screen can be drawn."""
    status = figures.status
    ranked = sorted(figures.domains, key=lambda domain: -domain.requested)
    losses = shown_losses({domain.name: domain.loss for domain in ranked if domain.loss is not None})
    parts = [f"step {status.next_step}/{status.num_steps}", status.state]
    parts += [f"policy {status.policy.lsn}"] if status.policy else []
    parts += [f"loss {figures.loss:.3f} [{losses}]"] if figures.loss is not None else []
    parts += [f"{figures.tokens_per_s:,.0f} tok/s"] if figures.tokens_per_s is not None else []
    return printable("  ".join(parts))


def share_bar(requested: float, realised: float | None, scale: float, width: int, plain: bool) -> Text:
    """A bar of the realised share with a mark at the requested one; `scale` is the share of a whole bar."""
    cells = 0.0 if realised is None or scale <= 0 else min(realised / scale, 1.0) * width
    full, mark = int(cells), 0 if scale <= 0 else min(int(requested / scale * width), width - 1)
    bar = (PLAIN_BAR if plain else BAR) * full + (HALF if not plain and cells - full >= 0.5 else "")
    text = Text(bar[:width].ljust(width), style="cyan", no_wrap=True)
    marked = text[:mark] + Text(PLAIN_MARK if plain else MARK, style="bold magenta") + text[mark + 1 :]
    return marked if requested > 0 else text


def _progress(figures: RunFigures, console: Console) -> Text:
    status = figures.status
    share = status.next_step / status.num_steps
    line = Text(f"run {printable(status.run)}: {status.state}, step {status.next_step} of {status.num_steps}  ", "bold")
    return line + share_bar(0.0, share, 1.0, 20, console.options.ascii_only) + Text(f" {share:.1%}")


def _pace_line(figures: RunFigures, now: float) -> str:
    parts = [f"loss {figures.loss:.4f}" if figures.loss is not None else "no report yet"]
    if figures.tokens_per_s is not None:
        parts.append(f"{figures.tokens_per_s:,.0f} tokens/s")
    if figures.seconds_left is not None and figures.status.state == "running":
        parts.append(f"{duration(figures.seconds_left)} left at this pace")
    age = max(now - figures.entry_time, 0.0)
    newest = f"entry {figures.status.last_lsn}"
    parts.append(f"{newest} {duration(age)} ago" if figures.status.state == "running" else newest)
    return "  ·  ".join(parts)


def _policy_lines(figures: RunFigures) -> list[str]:
    status = figures.status
    lines = [f"in force: {policy_line(status.policy)}" if status.policy else "no policy is committed yet"]
    waiting = [f"to come: {policy_line(policy)}" for policy in status.pending]
    return [*lines, *waiting[:2], *([f"and {len(waiting) - 2} more to come"] if len(waiting) > 2 else [])]


def _domains(domains: Sequence[DomainFigures], figures: RunFigures, console: Console) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    is_wide = console.width >= WIDE
    table.add_column("domain", no_wrap=True, overflow="ellipsis")
    for column in ("requested", "realised", *([""] if is_wide else []), "loss", "epochs", "cap in"):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    width = min(console.width - WIDE + 12, WIDEST_BAR)
    scale = max((max(domain.requested, domain.realised or 0.0) for domain in domains), default=0.0)
    for domain in domains:
        bar = [share_bar(domain.requested, domain.realised, scale, width, console.options.ascii_only)]
        table.add_row(
            Text(printable(domain.name)),
            percent(domain.requested),
            "-" if domain.realised is None else percent(domain.realised),
            *(bar if is_wide else []),
            _loss(domain),
            f"{domain.epochs:.2f}",
            _countdown(domain, figures),
        )
    return table


def _loss(domain: DomainFigures) -> str:
    if domain.loss is None:
        return "-"
    return f"{domain.loss:.3f}" + (f" ±{domain.loss_error:.3f}" if domain.loss_error is not None else "")


def _countdown(domain: DomainFigures, figures: RunFigures) -> str:
    """How far the domain is from its cap: in steps, or what happened there."""
    if domain.exhaustion is None:
        return "-"
    left = domain.exhaustion.step - figures.status.next_step
    return f"{left:,} steps" if left > 0 else f"since step {domain.exhaustion.step}"


def _commit_line(commit: NewCommit) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(commit.time))
    return f"{clock}  policy {commit.policy_lsn} from step {commit.effective_step} on"
