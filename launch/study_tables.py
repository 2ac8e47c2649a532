"""Tables of studies on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

Titled = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""Title, header and rows; the first column holds names, the others figures."""


def show_tables(tables: Iterable[Titled], lines: Iterable[str] = (), width: int = 200) -> None:
    """Print tables, each as wide as it is, and lines below them."""
    console = Console(width=width, soft_wrap=True)
    for title, header, rows in tables:
        table = Table(title=title, title_justify="left")
        for column, name in enumerate(header):
            table.add_column(name, justify="left" if column == 0 else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in lines:
        console.print(line, markup=False)
