"""What a person sees of a run: one live line while it trains, plain lines elsewhere, tables at the end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mixwright.pretrain.progress import Progress

PLAIN_INTERVAL_S = 10.0
"""How often a progress line is printed where no terminal can redraw it."""


class RunConsole:
    """Prints on the leader, silent elsewhere; to standard error where standard output is for JSON.

    Domain names and reasons are shown as text, never as markup.
    """

    def __init__(self, quiet: bool, to_stderr: bool = False) -> None:
        self._console = Console(quiet=quiet, stderr=to_stderr, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._last_plain = 0.0
        self._rates: deque[tuple[float, int]] = deque(maxlen=30)

    def say(self, text: str) -> None:
        """One plain line."""
        self._console.print(Text(text))

    def progress(self, progress: Progress) -> None:
        """Redraw the live line, or print it now and then when the output is no terminal."""
        self._rates.append((time.monotonic(), progress.step))
        line = Text(self._line(progress), overflow="ellipsis", no_wrap=True)
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, refresh_per_second=8, transient=True)
                self._live.start()
            self._live.update(line)
        elif time.monotonic() - self._last_plain >= PLAIN_INTERVAL_S or progress.step == progress.num_steps:
            self._last_plain = time.monotonic()
            self._console.print(line)

    def close(self) -> None:
        """End the live line; printing goes on below it."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(title=escape(title), title_justify="left")
        for index, name in enumerate(header):
            table.add_column(escape(name), justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*map(escape, row))
        self._console.print(table)

    def _line(self, progress: Progress) -> str:
        seconds_per_step = self._seconds_per_step()
        remaining = (progress.num_steps - progress.step) * seconds_per_step
        speed = progress.tokens_per_step / seconds_per_step if seconds_per_step else 0.0
        policy = "" if progress.policy_lsn is None else f"  policy {progress.policy_lsn}"
        return (
            f"step {progress.step}/{progress.num_steps}  loss {_number(progress.loss)}  "
            f"[{shown_losses(progress.domain_losses)}]  {speed:,.0f} tok/s  ETA {duration(remaining)}{policy}"
        )

    def _seconds_per_step(self) -> float:
        (first_time, first_step), (last_time, last_step) = self._rates[0], self._rates[-1]
        return (last_time - first_time) / (last_step - first_step) if last_step > first_step else 0.0


def shown_losses(losses: Mapping[str, float], most: int = 6) -> str:
    """The first few losses by name, and how many there are besides."""
    shown = [f"{name} {loss:.2f}" for name, loss in list(losses.items())[:most]]
    return " ".join(shown) + (f" +{len(losses) - most}" if len(losses) > most else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def duration(seconds: float) -> str:
    """Seconds as `4:05` or `1:04:05`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
