"""`mixwright config check|show`: look at a run's configuration without starting anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
import yaml

from mixwright.data_mixing.config_file import StrictModel, read_yaml
from mixwright.launch.help_text import examples
from mixwright.launch.json_output import print_json
from mixwright.launch.mix_options import AsJson
from mixwright.pretrain.config import load_pretrain_config
from mixwright.pretrain.distill.config import load_distill_config
from mixwright.pretrain.rpo.config import load_rpo_config

app = typer.Typer(no_args_is_help=True, help="Check and show run configurations.")

ConfigFile = Annotated[Path, typer.Argument(metavar="FILE", help="a run configuration, e.g. configs/quickstart.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="change single settings")]


@app.command(
    epilog=examples(
        "mixwright config check configs/quickstart.yaml",
        "mixwright config check configs/quickstart.yaml optimizer.lr=3e-4 training.num_steps=500",
    )
)
def check(file: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say whether FILE is a valid run configuration; exit code 2 and the reasons when it is not."""
    _load(file, overrides or [])
    if as_json:
        print_json({"file": file, "ok": True})
    else:
        typer.echo(f"{file}: ok")


@app.command(
    epilog=examples(
        "mixwright config show configs/quickstart.yaml",
        "mixwright config show configs/quickstart.yaml optimizer.lr=3e-4 --json",
    )
)
def show(file: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print the configuration as a run would use it, defaults included."""
    config = _load(file, overrides or [])
    if as_json:
        print_json(config)
    else:
        typer.echo(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), nl=False)


def _load(file: Path, overrides: Sequence[str]) -> StrictModel:
    """The configuration of whichever stage has such sections. Raises ConfigError."""
    tree = read_yaml(file)
    training = tree.get("training")
    if "objective" in tree or (isinstance(training, dict) and "pairs_per_step" in training):
        return load_rpo_config(file, overrides)
    if "teachers" in tree:
        return load_distill_config(file, overrides)[0]
    return load_pretrain_config(file, overrides)
