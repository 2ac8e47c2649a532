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
from mixwright.launch.help_text import examples
from mixwright.launch.json_output import print_json
from mixwright.launch.mix_options import AsJson

if TYPE_CHECKING:
    from mixwright.launch.console import RunConsole
    from mixwright.launch.ensemble_runs import Perform
    from mixwright.pretrain.ensemble.config import EnsembleConfig, Runs

app = typer.Typer(
    help="Ensembles for fixed data: tune regularisation, train members, evaluate their mean, extrapolate, soup.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

app.add_typer(ensemble_eval.app)

Config = Annotated[Path, typer.Argument(help="an ensemble configuration, e.g. configs/ensemble.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="changes, as key.sub=value")]
Workers = Annotated[int, typer.Option(min=0, help="runs at a time, as Ray tasks; 0: one after the other, without Ray")]
Address = Annotated[str | None, typer.Option(help="a Ray cluster (default: RAY_ADDRESS, else a local Ray)")]
Budget = Annotated[float | None, typer.Option(min=0, help="begin no run after so long")]


@app.command(
    epilog=examples(
        "mixwright ensemble tune configs/ensemble/ensemble.yaml --workers 2",
        "mixwright ensemble tune configs/ensemble/ensemble.yaml --budget-minutes 60 --json",
    )
)
def tune(
    config: Config,
    overrides: Overrides = None,
    workers: Workers = 2,
    address: Address = None,
    budget_minutes: Budget = None,
    as_json: AsJson = False,
) -> None:
    """Find learning rate, weight decay and epochs by coordinate descent, up to a certificate.

    The certificate says that no neighbour on the grid has a lower validation loss. Decay applies to matrices only.
    """
    from mixwright.launch.console import RunConsole
    from mixwright.launch.ensemble_runs import tune as descend
    from mixwright.launch.ensemble_tables import show_tuning

    console = RunConsole(quiet=False, to_stderr=as_json)
    with _performing(config, overrides or [], workers, address, budget_minutes, console) as (settings, runs, perform):
        record = descend(settings, runs, perform, console.say)
    if as_json:
        print_json(record)
    else:
        show_tuning(record, settings, console)


@app.command(
    epilog=examples(
        "mixwright ensemble train configs/ensemble/ensemble.yaml --members 4",
        "mixwright ensemble train configs/ensemble/ensemble.yaml --members 8 --address 10.0.0.5:6379",
    )
)
def train(
    config: Config,
    overrides: Overrides = None,
    members: Annotated[int, typer.Option(min=1, help="number of members")] = 4,
    workers: Workers = 2,
    address: Address = None,
    budget_minutes: Budget = None,
    as_json: AsJson = False,
) -> None:
    """Train members that differ in their seeds; each is a run of its own, with journal and checkpoints."""
    from mixwright.launch.console import RunConsole
    from mixwright.launch.ensemble_runs import train_members
    from mixwright.launch.ensemble_tables import show_members

    console = RunConsole(quiet=False, to_stderr=as_json)
    with _performing(config, overrides or [], workers, address, budget_minutes, console) as (settings, runs, perform):
        results = train_members(settings, runs, members, perform)
    if as_json:
        print_json(results)
    else:
        show_members(results, console)


@contextmanager
def _performing(
    path: Path,
    overrides: list[str],
    workers: int,
    address: str | None,
    budget_minutes: float | None,
    console: RunConsole,
) -> Iterator[tuple[EnsembleConfig, Runs, Perform]]:
    """The configuration, its runs, and something that performs them."""
    from mixwright.data_mixing.store import TokenStore
    from mixwright.launch.ensemble_runs import performer
    from mixwright.launch.training_runs import run_map
    from mixwright.pretrain.ensemble.config import Runs, load_ensemble_config
    from mixwright.pretrain.start import ensure_store

    deadline = None if budget_minutes is None else time.monotonic() + 60 * budget_minutes
    settings, base = load_ensemble_config(path, overrides)
    ensure_store(base, console)
    runs = Runs(base, TokenStore.open(base.data.store), settings.warmup_share)
    with run_map(workers, settings.resources, address) as map_:
        yield settings, runs, performer(map_, settings, console.say, deadline)
