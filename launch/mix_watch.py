"""`mixwright mix status --watch`: a run as it goes on, from its journal alone, until it is over or Ctrl-C."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.live import Live

from mixwright.data_mixing.answers import printable
from mixwright.data_mixing.entries import Report
from mixwright.data_mixing.entry_file import Entry
from mixwright.data_mixing.run_figures import RunFollower
from mixwright.data_mixing.run_status import entry_record
from mixwright.launch.json_output import plain, print_json
from mixwright.launch.mix_tables import summary
from mixwright.launch.watch_view import change_line, watch_view

Show = Callable[[list[Entry]], None]
"""Shows the run as it stands, given the entries since the last time."""


def watch(run_dir: Path, every_s: float, as_json: bool) -> None:
    """Show the run as it changes: a screen on a terminal, else a line (or a JSON object) per change."""
    follower = RunFollower(run_dir / "journal")
    if as_json:
        _follow(follower, every_s, _json_lines(follower))
    elif sys.stdout.isatty():
        _draw(follower, every_s)
    else:
        _follow(follower, every_s, _lines(follower))


def _follow(follower: RunFollower, every_s: float, show: Show) -> None:
    """Look at the journal every so often, until the run is over."""
    show([])
    while follower.history.end is None:
        time.sleep(every_s)
        show(follower.poll())


def _draw(follower: RunFollower, every_s: float) -> None:
    console = Console(highlight=False)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        # Drawn without news too: the clock goes on, and the terminal may have another size.
        _follow(
            follower,
            every_s,
            lambda _: live.update(watch_view(follower.figures(), console, time.time()), refresh=True),
        )


def _lines(follower: RunFollower) -> Show:
    """A line per entry, and how the run stands at the beginning and after training reports."""
    began = False

    def show(entries: list[Entry]) -> None:
        nonlocal began
        for entry in entries:
            clock = time.strftime("%H:%M:%S", time.localtime(entry.time))
            print(printable(f"{clock}  entry {entry.lsn} {entry.type}: {summary(entry.body)}"), flush=True)
        if not began or any(isinstance(entry.body, Report) and entry.body.kind == "train" for entry in entries):
            print(change_line(follower.figures()), flush=True)
        began = True

    return show


def _json_lines(follower: RunFollower) -> Show:
    """An object at the beginning and whenever there are entries: the figures and those entries."""
    began = False

    def show(entries: list[Entry]) -> None:
        nonlocal began
        if entries or not began:
            print_json({**plain(follower.figures()), "entries": [entry_record(entry) for entry in entries]})
        began = True

    return show
