"""Examples below the `--help` of a command; a test types every one of them."""

from __future__ import annotations

from rich.markup import escape

HEADING = "Examples:"


def examples(*commands: str) -> str:
    """An epilog with these command lines, each on its own line."""
    # typer makes a line of each paragraph, and reads rich markup in it.
    return "\n\n".join([HEADING, *(escape(command) for command in commands)])
