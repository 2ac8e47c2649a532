"""How a command of ours ends."""

from __future__ import annotations

import sys
import time

import typer

from mixwright.data_mixing.errors import MixingError

LEADER_SPEAKS_S = 2.0
"""Launchers end all ranks once one has ended: the others give the leader so long to say why."""

SAME_ON_ALL_RANKS = (2, 3)
"""Exit codes of errors in configuration and data, which every rank meets."""


def rank_failed(error: MixingError, rank: int) -> int:
    """One line on standard error, from the leader alone where all ranks fail alike; returns the exit code."""
    if rank == 0 or error.exit_code not in SAME_ON_ALL_RANKS:
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(LEADER_SPEAKS_S)
    return error.exit_code


def run(app: typer.Typer) -> None:
    """Run a command; every expected failure is one line on standard error and its exit code."""
    try:
        app()
    except MixingError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
