"""Options that several commands of `mixwright mix` have."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Annotated

import typer

ANSWER_TIMEOUT_S = 30.0

Run = Annotated[
    Path | None,
    typer.Option("--run", metavar="RUN_DIR", help="the run's folder (default: the only live one in ./runs)"),
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON value and nothing else")]
PolicyFile = Annotated[Path, typer.Argument(metavar="POLICY", help="a policy document (YAML)")]
Author = Annotated[str | None, typer.Option(help="who wants it, for the journal (default: your user name)")]
Why = Annotated[str | None, typer.Option(help="why, for the journal")]
Timeout = Annotated[float, typer.Option(help="seconds to wait for the answer")]


def user_name() -> str:
    """Who is at the keyboard, as far as the system knows."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""
