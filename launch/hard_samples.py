"""`mixwright mix hard-samples`: the rows of a run whose loss was highest or lowest, or that weighed least, as text.

Works from the run's folder and its token store alone. `hard_samples` is registered as a command by `mix.py`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mixwright.data_mixing.errors import ConfigError, nearest
from mixwright.launch.json_output import print_json
from mixwright.launch.mix_options import AsJson, Run

# Commands import what they need when they run: `mixwright --help` should not wait for pyarrow.
if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Group, RenderableType

    from mixwright.data_mixing.plan import Plan
    from mixwright.pretrain.hard_rows import LoggedRows
    from mixwright.pretrain.row_log import RowLog

Ranking = Literal["highest", "lowest", "down-weighted"]
COLUMNS = ("step", "position", "domain", "row", "epoch", "loss", "weight", "seen")


@dataclass(frozen=True)
class HardRow:
    """A row as it was read last. `loss` in nats per token, `weight` relative to uniform, `seen` times in the log."""

    step: int
    position: int
    domain: str
    row: int
    epoch: int
    loss: float
    weight: float
    seen: int
    text: str


def hard_samples(
    run: Run = None,
    by: Annotated[Ranking, typer.Option(help="by loss, or by weight")] = "highest",
    count: Annotated[int, typer.Option(min=1, help="rows to show")] = 10,
    domain: Annotated[str | None, typer.Option(help="only rows of this domain")] = None,
    first_step: Annotated[int | None, typer.Option(min=0, help="only what was read from this step on")] = None,
    last_step: Annotated[int | None, typer.Option(min=0, help="only what was read up to this step")] = None,
    characters: Annotated[int, typer.Option(min=1, help="of each text")] = 300,
    store: Annotated[
        Path | None, typer.Option(help="the run's token store, where it is not what data.store of its config.yaml says")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rows whose loss was highest or lowest, or that weighed least, with their text. Needs the run's row log."""
    from mixwright.launch.runs import find_run, open_history
    from mixwright.pretrain.row_log import read_row_log, row_log_folder

    run_dir = find_run(run)
    plan = open_history(run_dir)[1].plan()
    log = _between(read_row_log(row_log_folder(run_dir)), first_step, last_step)
    hard = _hard(log, plan, by, count, domain)
    rows = _with_text(hard, plan, store_folder(run_dir) if store is None else store, characters)
    if as_json:
        print_json(rows)
    elif rows:
        _print_table(rows, f"run {run_dir.name}: {by}, of {len(log):,} logged rows")
    else:
        where = "" if domain is None else f" of domain {domain!r}"
        missing = "weighed less than uniform" if by == "down-weighted" else "has a loss that is a number"
        typer.echo(f"none of the rows{where} among {len(log):,} logged ones {missing}")


def _between(log: RowLog, first_step: int | None, last_step: int | None) -> RowLog:
    """The part of the log in these steps, ends included; raises ConfigError when that is none of it."""
    first, last = int(log.step_n[0]), int(log.step_n[-1])
    wanted_first, wanted_last = first if first_step is None else first_step, last if last_step is None else last_step
    part = log.take((log.step_n >= wanted_first) & (log.step_n <= wanted_last))
    if len(part) == 0:
        raise ConfigError(
            f"--first-step, --last-step: no row was logged in steps {wanted_first} to {wanted_last}; "
            f"the log has steps {first} to {last}"
        )
    return part


def _hard(log: RowLog, plan: Plan, by: Ranking, count: int, domain: str | None) -> LoggedRows:
    from mixwright.pretrain.hard_rows import identify, last_readings, ranked

    names = [known.name for known in plan.genesis.domains]
    if domain is not None and domain not in names:
        raise ConfigError(f"--domain: the run has no domain {domain!r}{nearest(domain, names)}")
    rows = identify(log, plan)
    if domain is not None:
        rows = rows.take(rows.domain_n == names.index(domain))
    return ranked(last_readings(rows), by, count)


def store_folder(run_dir: Path) -> Path:
    """The run's token store, by its config.yaml; raises ConfigError."""
    from mixwright.data_mixing.config_file import load_config
    from mixwright.pretrain.config import PretrainConfig

    return load_config(PretrainConfig, run_dir / "config.yaml").data.store


def _with_text(rows: LoggedRows, plan: Plan, store_folder: Path, characters: int) -> list[HardRow]:
    """Rows with the beginning of their text; raises StoreChanged when the store is not the one of the run."""
    from mixwright.data_mixing.feeder import store_order
    from mixwright.data_mixing.store import TokenStore
    from mixwright.data_mixing.tokenizer import load_tokenizer

    store = TokenStore.open(store_folder)
    order_G, names = store_order(plan.genesis, store), [known.name for known in plan.genesis.domains]
    decode = load_tokenizer(store.tokenizer_folder).decode
    tokens_NW = store.gather(order_G[rows.domain_n], rows.row_n)
    log = rows.log
    return [
        HardRow(
            step=int(log.step_n[i]),
            position=int(log.position_n[i]),
            domain=names[rows.domain_n[i]],
            row=int(rows.row_n[i]),
            epoch=int(rows.epoch_n[i]),
            loss=float(log.loss_n[i]),
            weight=float(log.weight_n[i]),
            seen=int(rows.num_seen_n[i]),
            text=decode(tokens_W.tolist())[:characters],
        )
        for i, tokens_W in enumerate(tokens_NW)
    ]


def _print_table(rows: Sequence[HardRow], title: str) -> None:
    from rich.console import Console

    from mixwright.launch.mix_tables import FILE_WIDTH

    # Unlike the tables of `mix` this one wraps: the text is to be read.
    Console(highlight=False, width=None if sys.stdout.isatty() else FILE_WIDTH).print(_view(rows, title))


def _view(rows: Sequence[HardRow], title: str) -> Group:
    """A line of numbers and, below it, the text of each row, which a column would leave too little room for.

    Texts are of others: shown as text, never as markup, and with control characters spelt out.
    """
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    cells = [COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    header, *lines = ("  ".join(_aligned(line, widths)) for line in cells)
    parts: list[RenderableType] = [Text(spelt_out(title)), Text(header, style="bold")]
    for line, row in zip(lines, rows, strict=True):
        parts += [Text(line, style="bold"), Padding(Text(spelt_out(row.text), overflow="fold"), (0, 0, 1, 4))]
    return Group(*parts)


def _cells(row: HardRow) -> tuple[str, ...]:
    numbers = (str(row.row), str(row.epoch), f"{row.loss:.3f}", f"{row.weight:.3g}", str(row.seen))
    return (str(row.step), str(row.position), row.domain, *numbers)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Names to the left, numbers to the right."""
    columns = zip(COLUMNS, cells, widths, strict=True)
    return [cell.ljust(width) if name == "domain" else cell.rjust(width) for name, cell, width in columns]


def spelt_out(text: str) -> str:
    r"""`text` with characters that a terminal would obey, or not show, as `\n`, `\x1b`, `\u202e`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
