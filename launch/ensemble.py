"""`mixwright ensemble`: tune the regularisation, train members, see what their mean predicts and where that ends.

Exit codes: 0 done, 1 a run failed, 2 bad input, 3 Ray cannot be had or the time budget is spent. The same command goes
on where it was interrupted; finished runs are read, not run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixwright.launch import ensemble_eval

if TYPE_CHECKING:
    from mixwright.launch.ensemble_runs import Perform
    from mixwright.pretrain.ensemble.config import EnsembleConfig, Runs

app = typer.Typer(
    help="Ensembles for fixed data: tune regularisation, train members, evaluate their mean, extrapolate, soup.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

app.command("eval")(ensemble_eval.evaluate)
app.command()(ensemble_eval.scaling)
app.command()(ensemble_eval.soup)

Config = Annotated[Path, typer.Argument(help="an ensemble configuration, e.g. configs/ensemble.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="changes, as key.sub=value")]
Workers = Annotated[int, typer.Option(min=0, help="runs at a time, as Ray tasks; 0: one after the other, without Ray")]
Address = Annotated[str | None, typer.Option(help="a Ray cluster (default: RAY_ADDRESS, else a local Ray)")]
Budget = Annotated[float | None, typer.Option(min=0, help="begin no run after so long")]


@app.command()
def tune(
    config: Config,
    overrides: Overrides = None,
    workers: Workers = 2,
    address: Address = None,
    budget_minutes: Budget = None,
) -> None:
    """Find learning rate, weight decay and epochs by coordinate descent, up to a certificate.

    The certificate says that no neighbour on the grid has a lower validation loss. Decay applies to matrices only.
    """
    from mixwright.launch.console import RunConsole
    from mixwright.launch.ensemble_runs import tune as descend
    from mixwright.launch.ensemble_tables import show_tuning

    with _performing(config, overrides or [], workers, address, budget_minutes) as (settings, runs, perform):
        record = descend(settings, runs, perform, typer.echo)
    show_tuning(record, settings, RunConsole(quiet=False))


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    members: Annotated[int, typer.Option(min=1, help="number of members")] = 4,
    workers: Workers = 2,
    address: Address = None,
    budget_minutes: Budget = None,
) -> None:
    """Train members that differ in their seeds; each is a run of its own, with journal and checkpoints."""
    from mixwright.launch.console import RunConsole
    from mixwright.launch.ensemble_runs import train_members
    from mixwright.launch.ensemble_tables import show_members

    with _performing(config, overrides or [], workers, address, budget_minutes) as (settings, runs, perform):
        results = train_members(settings, runs, members, perform)
    show_members(results, RunConsole(quiet=False))


@contextmanager
def _performing(
    path: Path, overrides: list[str], workers: int, address: str | None, budget_minutes: float | None
) -> Iterator[tuple[EnsembleConfig, Runs, Perform]]:
    """The configuration, its runs, and something that performs them."""
    from mixwright.data_mixing.store import TokenStore
    from mixwright.launch.console import RunConsole
    from mixwright.launch.ensemble_runs import performer
    from mixwright.launch.training_runs import run_map
    from mixwright.pretrain.ensemble.config import Runs, load_ensemble_config
    from mixwright.pretrain.start import ensure_store

    deadline = None if budget_minutes is None else time.monotonic() + 60 * budget_minutes
    settings, base = load_ensemble_config(path, overrides)
    ensure_store(base, RunConsole(quiet=False))
    runs = Runs(base, TokenStore.open(base.data.store), settings.warmup_share)
    with run_map(workers, settings.resources, address) as map_:
        yield settings, runs, performer(map_, settings, typer.echo, deadline)
