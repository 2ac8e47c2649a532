"""How a command of ours ends."""

from __future__ import annotations

import sys

import typer

from mixwright.data_mixing.errors import MixingError


def run(app: typer.Typer) -> None:
    """Run a command; every expected failure is one line on standard error and its exit code."""
    try:
        app()
    except MixingError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
