"""`mixwright mix simulate`: what a policy would do in a world whose best mixture is known. No model, no run folder.

`simulate` is registered as a command by the command line (`app.command()(simulate)`).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixwright.data_mixing.config_file import load_config, read_yaml
from mixwright.launch.json_output import print_json
from mixwright.launch.mix_options import AsJson

if TYPE_CHECKING:
    from mixwright.data_mixing.regret import Regret
    from mixwright.data_mixing.worlds import World


def simulate(
    policies: Annotated[list[Path], typer.Argument(metavar="POLICY...", help="policy documents (YAML)")],
    world: Annotated[Path, typer.Option("--world", help="a world (YAML); configs/worlds has some")],
    seeds: Annotated[int, typer.Option(min=1, help="runs of each policy, each in another world of the kind")] = 20,
    as_json: AsJson = False,
) -> None:
    """Regret of policies in a synthetic world, beside reading all domains alike. Takes seconds."""
    from mixwright.data_mixing.regret import best_fixed_regret, compare
    from mixwright.data_mixing.worlds import World

    settings = load_config(World, world)
    documents = _documents(policies)
    began = time.perf_counter()
    results = compare(documents, settings, seeds)
    seconds, best_fixed = time.perf_counter() - began, best_fixed_regret(settings, seeds)
    if as_json:
        print_json({"world": world.stem, "best_fixed": best_fixed, "policies": results})
        return
    _show(world.stem, settings, results, best_fixed, seconds)


def _documents(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """The documents by file name; a name that occurs twice gets its folder."""
    documents: dict[str, dict[str, Any]] = {}
    for path in paths:
        name = path.stem if path.stem not in documents else str(path)
        documents[name] = read_yaml(path)
    return documents


def _show(name: str, world: World, results: list[Regret], best_fixed: float, seconds: float) -> None:
    from mixwright.launch.mix_tables import console, table

    columns = ["regret", "against stratified", "perturbed", "validations", "decisions", "held"]
    rows = [_row(result) for result in results]
    if world.garbage:
        columns.append("garbage read")
        rows = [[*row, f"{result.garbage_share:.1%}"] for row, result in zip(rows, results, strict=True)]
    title = (
        f"{name}: {world.law} law, {world.num_domains} domains, {world.num_steps} steps, {results[0].num_seeds} seeds"
    )
    console().print(table(title, "policy", columns, rows))
    rounds = sum(result.decisions + 1 for result in results) * results[0].num_seeds
    typer.echo(
        f"regret: nats of mean validation loss above the best dynamic mixture, mean ± standard error; "
        f"the best fixed mixture has {best_fixed:.4f}\n{rounds:.0f} rounds in {seconds:.1f} s"
    )


def _row(result: Regret) -> list[str]:
    return [
        result.policy,
        f"{result.regret:.4f} ± {result.regret_error:.4f}",
        f"{result.against_stratified:+.4f} ± {result.against_stratified_error:.4f}",
        f"{result.perturbed:.0%}",
        f"{result.validations:.0f}",
        f"{result.decisions:.0f}",
        f"{result.held:.0f}",
    ]
