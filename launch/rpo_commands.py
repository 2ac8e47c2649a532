"""`mixwright rpo`: what comes before the first step of a preference-optimisation run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Align a model with preferences (DPO, RPO and others): training itself is `python launch/rpo.py`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _rpo() -> None:
    """Align a model with preferences (DPO, RPO and others): training itself is `python launch/rpo.py`."""


@app.command()
def prepare(
    config: Annotated[Path, typer.Argument(help="a run, e.g. configs/rpo/example.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="changes, as key.sub=value")] = None,
    show: Annotated[int, typer.Option(min=0, help="print so many pairs as the model will read them")] = 0,
) -> None:
    """Tokenise the pairs, saying how many are dropped or cut and why; goes on where it was interrupted.

    Reference log-probabilities are computed by all ranks together when training starts.
    """
    from rich.console import Console
    from rich.text import Text

    from mixwright.launch.console import RunConsole
    from mixwright.pretrain.rpo.config import load_rpo_config
    from mixwright.pretrain.rpo.start import prepare as prepare_run
    from mixwright.pretrain.rpo.start import with_model_folder

    run = with_model_folder(load_rpo_config(config, overrides or []))
    prepared = prepare_run(run, RunConsole(quiet=False))
    console = Console(highlight=False, soft_wrap=True)
    for index in range(min(show, len(prepared.train))):
        names = ("prompt", "chosen", "rejected")
        for name, text in zip(names, prepared.train.texts(index), strict=True):
            # What is in the data is text, never markup.
            console.print(Text(f"{name} {index}: {text!r}"))


@app.command()
def example(
    path: Annotated[Path, typer.Argument(help="the JSONL file to write")] = Path("runs/example-pairs.jsonl"),
    seed: Annotated[int, typer.Option(min=0, help="of which documentation is rejected")] = 0,
) -> None:
    """Write preference pairs out of the standard library's documentation, to try configs/rpo/example.yaml with."""
    from mixwright.pretrain.rpo.example_pairs import write_example_pairs

    typer.echo(f"{path}: {write_example_pairs(path, seed):,} pairs")
