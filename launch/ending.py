"""How a command of ours ends: the exit codes, in one place.

| code | meaning |
|---|---|
| 0 | done |
| 1 | what was asked for was done and did not go well: a run failed, a decision differs, a check of `doctor` fails |
| 2 | bad input, or refused: the message says what was expected |
| 3 | the service, Ray or the time that it needs cannot be had |
| 70 | a rank broke: a traceback, which is a fault, or the ranks lost each other |
| 75 | training was interrupted after a checkpoint: the same command goes on |
| 130 | ended by Ctrl-C |
"""

from __future__ import annotations

import sys

import typer

from mixwright.data_mixing.answers import printable
from mixwright.data_mixing.errors import MixingError

MAX_LINES, MAX_LINE_CHARACTERS = 50, 2000
"""Of one error: a configuration may be wrong in a thousand places."""
EXIT_NOT_WELL, EXIT_REFUSED, EXIT_CTRL_C = 1, 2, 130
EXIT_CODES = (
    "Exit codes: 0 done; 1 it did not go well (a run failed, a check fails); 2 bad input or refused; "
    "3 the service cannot be had; 75 training was interrupted after a checkpoint; 130 Ctrl-C."
)


def run(app: typer.Typer) -> None:
    """Run a command; every expected failure is one line on standard error and its exit code."""
    try:
        app()
    except MixingError as error:
        print(f"error: {_shown(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)


def _shown(text: str) -> str:
    """A message as a terminal may have it: what a file spells out in it obeys nobody and fills no screen."""
    lines = text.splitlines() or [""]
    kept = [line if len(line) <= MAX_LINE_CHARACTERS else f"{line[:MAX_LINE_CHARACTERS]}..." for line in lines]
    rest = [f"... and {len(kept) - MAX_LINES} more"] if len(kept) > MAX_LINES else []
    return "\n".join(map(printable, [*kept[:MAX_LINES], *rest]))
