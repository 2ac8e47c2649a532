"""`mixwright mix fit KIND CONFIG`: spend short runs, end in a policy document that a job takes like any other.

`fit` is registered as a command by the command line (`app.command()(fit)`).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from pydantic import Field

from mixwright.data_mixing.config_file import StrictModel, load_config
from mixwright.data_mixing.errors import ConfigError, nearest
from mixwright.launch.json_output import print_json
from mixwright.launch.mix_options import AsJson

if TYPE_CHECKING:
    from mixwright.launch.proxy_tasks import Tell
    from mixwright.pretrain.proxy import ProxyRecord
    from mixwright.pretrain.sweeps.fits import Fitted, Problem


class FitConfig(StrictModel):
    """What `mix fit` reads. Paths are relative to the file.

    `domains`: names in the store (default: all). `target`: how much the loss of each domain counts (default: alike).
    `records`: folder of finished runs. `proxy`: model and length of one run (`ProxyConfig`). `options`: the kind's own.
    """

    store: Path
    records: Path
    domains: tuple[str, ...] = ()
    target: dict[str, float] | None = None
    seed: int = Field(default=0, ge=0, lt=1 << 60)
    proxy: dict[str, Any]
    options: dict[str, Any] = Field(default_factory=dict)


def fit(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="mixing_law, regmix, skill_it, doremi or doge")],
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="store, domains and proxy runs (YAML)")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="write the policy here (default: print it)")] = None,
    workers: Annotated[int, typer.Option(min=0, help="runs at a time as Ray tasks; 0: here, one by one")] = 2,
    address: Annotated[str | None, typer.Option(help="a Ray cluster (default: RAY_ADDRESS, else a local Ray)")] = None,
    as_json: AsJson = False,
) -> None:
    """Learn a mixture, or what a policy needs, from short runs. Finished runs are kept and used again."""
    from mixwright.launch.proxy_tasks import executor
    from mixwright.pretrain.sweeps.fits import begin_fit, drive

    settings = load_config(FitConfig, config)
    begun = begin_fit(kind, read_problem(settings, config), settings.options)
    with executor(config.parent / settings.records, workers, _progress(), address=address) as execute:
        (fitted,) = drive([begun], execute)
    _show(fitted)
    text = yaml.safe_dump(fitted.document, sort_keys=False)
    if out is not None:
        _write(out, text)
    if as_json:
        figures = {"runs": len(fitted.records), "tokens": fitted.tokens, "figures": fitted.figures}
        print_json({"policy": fitted.document, **figures, "written": out})
    elif out is None:
        typer.echo(text, nl=False)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def read_problem(settings: FitConfig, path: Path) -> Problem:
    """The configuration against its store. Raises ConfigError and DataError naming what does not fit."""
    from mixwright.data_mixing.config_file import validate
    from mixwright.data_mixing.store import TokenStore
    from mixwright.pretrain.proxy import ProxyConfig
    from mixwright.pretrain.sweeps.fits import Problem

    store = TokenStore.open((path.parent / settings.store).resolve())
    domains = settings.domains or store.names
    for name in domains:
        store.index(name)
    counts = settings.target or dict.fromkeys(domains, 1.0)
    for name, count in counts.items():
        if name not in domains:
            raise ConfigError(f"{path}: target.{name}: no such domain{nearest(name, domains)}")
        if count < 0:
            raise ConfigError(f"{path}: target.{name}: expected a number >= 0, found {count}")
    total = sum(counts.values())
    if total == 0:
        raise ConfigError(f"{path}: target: every number is 0; at least one must be positive")
    return Problem(
        store=store.folder,
        domains=tuple(domains),
        config=validate(ProxyConfig, settings.proxy, f"{path}: proxy"),
        seed=settings.seed,
        target=tuple(counts.get(name, 0.0) / total for name in domains),
    )


def _progress() -> Tell:
    began = time.monotonic()

    def tell(done: int, total: int, record: ProxyRecord) -> None:
        losses = " ".join(f"{name} {loss:.3f}" for name, loss in record.last.items())
        typer.echo(f"{time.monotonic() - began:7.1f} s  run {done} of {total}  validation {losses}", err=True)

    return tell


def _show(fitted: Fitted) -> None:
    seconds = sum(record.seconds for record in fitted.records)
    typer.echo(f"{len(fitted.records)} runs, {fitted.tokens:,} tokens, {seconds:.0f} core-seconds", err=True)
    for name, value in fitted.figures.items():
        typer.echo(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}", err=True)
