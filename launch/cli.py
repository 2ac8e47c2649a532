"""The `mixwright` command. Exit codes: 0 ok, 2 bad input or rejected, 3 unavailable."""

from __future__ import annotations

import typer

from mixwright.launch import config_commands, data, distill_commands, ensemble, generate, mix, study
from mixwright.launch.ending import run

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="LLM pretraining data and losses: prepare corpora, steer the mixture of a running job, look at what it did.",
)
app.add_typer(data.app, name="data")
app.add_typer(mix.app, name="mix")
app.add_typer(config_commands.app, name="config")
app.add_typer(ensemble.app, name="ensemble")
app.add_typer(distill_commands.app, name="distill")
app.command()(generate.generate)
app.add_typer(study.app, name="study")


def main() -> None:
    """Run the command; every expected failure is one line on standard error and its exit code."""
    run(app)


if __name__ == "__main__":
    main()
