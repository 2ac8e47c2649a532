"""`mixwright config check|show`: look at a run's configuration without starting anything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml

from mixwright.pretrain.config import load_pretrain_config

app = typer.Typer(no_args_is_help=True, help="Check and show run configurations.")

ConfigFile = Annotated[Path, typer.Argument(metavar="FILE", help="a run configuration, e.g. configs/quickstart.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="change single settings")]


@app.command()
def check(file: ConfigFile, overrides: Overrides = None) -> None:
    """Say whether FILE is a valid run configuration; exit code 2 and the reasons when it is not."""
    load_pretrain_config(file, overrides or [])
    typer.echo(f"{file}: ok")


@app.command()
def show(file: ConfigFile, overrides: Overrides = None) -> None:
    """Print the configuration as a run would use it, defaults included."""
    config = load_pretrain_config(file, overrides or [])
    typer.echo(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), nl=False)
