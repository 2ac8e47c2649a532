"""The `mixwright` command. Its exit codes are in `ending.py`."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from mixwright.launch import (
    config_commands,
    data,
    distill_commands,
    doctor,
    ensemble,
    generate,
    mix,
    rpo_commands,
    study,
    submit,
)
from mixwright.launch.dashboard import command as dashboard
from mixwright.launch.ending import EXIT_CODES, run
from mixwright.launch.help_text import examples

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog=examples(
        "mixwright doctor",
        "mixwright data prepare configs/quickstart_corpora.yaml",
        "mixwright mix status --watch",
        "mixwright --install-completion",
    )
    + f"\n\n{EXIT_CODES}",
)
app.add_typer(data.app, name="data")
app.add_typer(mix.app, name="mix")
app.add_typer(config_commands.app, name="config")
app.add_typer(ensemble.app, name="ensemble")
app.add_typer(distill_commands.app, name="distill")
app.add_typer(rpo_commands.app, name="rpo")
app.command(
    epilog=examples(
        'mixwright generate runs/exp --prompt "Once upon a time" --num 3',
        "mixwright generate runs/exp runs/student --ensemble runs/members --tokens 50 --temperature 0.7",
        "mixwright generate runs/exp --json",
    )
)(generate.generate)
app.command(
    epilog=examples(
        "mixwright doctor", "mixwright doctor --folder /shared/runs --address 10.0.0.5:6379", "mixwright doctor --json"
    )
)(doctor.doctor)
app.command(
    epilog=examples(
        "mixwright dashboard runs/exp",
        "mixwright dashboard runs/exp runs/baseline --port 8700",
        "mixwright dashboard runs/exp --allow-submit",
    )
)(dashboard.dashboard)
app.add_typer(study.app, name="study")
app.add_typer(submit.app, name="submit")


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mixwright {version('mixwright')}")
        raise typer.Exit


@app.callback()
def _mixwright(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """LLM pretraining data and losses: prepare corpora, steer the mixture of a running job, look at what it did."""


def main() -> None:
    """Run the command; every expected failure is one line on standard error and its exit code."""
    run(app)


if __name__ == "__main__":
    main()
