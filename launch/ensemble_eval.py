"""`mixwright ensemble eval`, `scaling` and `soup`: what members predict together, where that ends, their mean."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixwright.launch.help_text import examples
from mixwright.launch.json_output import print_json
from mixwright.launch.mix_options import AsJson

if TYPE_CHECKING:
    from mixwright.kernels.ensemble_kl import Pooling
    from mixwright.launch.console import RunConsole
    from mixwright.pretrain.ensemble.curve import EnsembleEvaluation
    from mixwright.pretrain.ensemble.member import Member

Paths = Annotated[list[Path], typer.Argument(help="run folders or exports, or a folder of members (member-0, ...)")]
Store = Annotated[Path, typer.Option(help="the token store whose held-out rows are scored")]
PoolingOption = Annotated[str, typer.Option(help="logits: mean of logits; arithmetic: mean of probabilities")]
Rows = Annotated[int, typer.Option(min=1, help="test rows of each domain")]
CalibrationRows = Annotated[int, typer.Option(min=1, help="validation rows of each domain, for temperatures")]


app = typer.Typer()


@app.command(
    "eval",
    epilog=examples(
        "mixwright ensemble eval runs/ensemble/members --store runs/store",
        "mixwright ensemble eval runs/exp runs/other/export --store runs/store --pooling arithmetic --rows 64 --json",
    ),
)
def evaluate(
    paths: Paths,
    store: Store,
    k: Annotated[int | None, typer.Option(min=1, help="the first k members (default: all)")] = None,
    pooling: PoolingOption = "logits",
    rows: Rows = 256,
    calibration_rows: CalibrationRows = 256,
    domains: Annotated[str, typer.Option(help="names, separated by commas (default: all)")] = "",
    subsets: Annotated[int, typer.Option(min=1, help="subsets of one size at most; of more, so many are drawn")] = 64,
    out: Annotated[Path, typer.Option(help="folder of the evaluation")] = Path("runs/ensemble-evaluation"),
    as_json: AsJson = False,
) -> None:
    """Loss of the ensemble by its number of members, at temperature 1 and at the one fitted on validation rows."""
    from mixwright.data_mixing.store import TokenStore
    from mixwright.launch.console import RunConsole
    from mixwright.pretrain.ensemble.curve import evaluate_ensemble, save_evaluation

    evaluation = evaluate_ensemble(
        find_members(paths, k),
        TokenStore.open(store),
        folder=out / "spool",
        pooling=pooling_named(pooling),
        rows_per_domain=rows,
        calibration_rows_per_domain=calibration_rows,
        max_subsets=subsets,
        domains=[name.strip() for name in domains.split(",") if name.strip()],
    )
    path = save_evaluation(evaluation, out)
    if as_json:
        curves = {"temperature_1": evaluation.curve(fitted=False), "fitted": evaluation.curve(fitted=True)}
        print_json({"written": path, "pooling": evaluation.pooling, **curves})
        return
    console = RunConsole(quiet=False)
    for fitted in (False, True):
        show_curve(evaluation, fitted, console)
    console.say(f"written: {path}")


@app.command(
    epilog=examples(
        "mixwright ensemble scaling runs/ensemble-evaluation",
        "mixwright ensemble scaling runs/small runs/middle runs/large --standard 2.1e8=3.75 --standard 4.2e8=3.6 "
        "--tokens 2.1e8 --json",
    )
)
def scaling(
    evaluations: Annotated[list[Path], typer.Argument(help="folders of `mixwright ensemble eval`")],
    standard: Annotated[list[str] | None, typer.Option(help="TOKENS=LOSS of the standard recipe, repeated")] = None,
    tokens: Annotated[float | None, typer.Option(min=1, help="unique training tokens of the ensembles")] = None,
    temperature_1: Annotated[bool, typer.Option(help="losses at temperature 1, not at the fitted one")] = False,
    out: Annotated[Path, typer.Option(help="picture")] = Path("ensemble_scaling.png"),
    as_json: AsJson = False,
) -> None:
    """Fit L = E + A / K^alpha over members, and over parameters given three ensembles; how much text that is worth."""
    from mixwright.launch.console import RunConsole
    from mixwright.launch.ensemble_pictures import draw_scaling
    from mixwright.launch.ensemble_scaling import Scaling, show_scaling
    from mixwright.pretrain.ensemble.curve import load_evaluation

    found = Scaling.of(
        [load_evaluation(path) for path in evaluations], fitted=not temperature_1, standard=_points(standard or []),
        tokens=tokens,
    )  # fmt: skip
    draw_scaling(found, out)
    if as_json:
        laws = {"laws": found.laws, "predictions": found.predictions, "over_parameters": found.over_parameters}
        print_json({**laws, "standard": found.standard, "written": out})
        return
    console = RunConsole(quiet=False)
    show_scaling(found, console)
    console.say(f"written: {out}")


@app.command(
    epilog=examples(
        "mixwright ensemble soup runs/branch-a runs/branch-b --store runs/store --out runs/soup",
        "mixwright ensemble soup runs/branch-a runs/branch-b --store runs/store --out runs/soup --uniform --json",
    )
)
def soup(
    paths: Paths,
    store: Store,
    out: Annotated[Path, typer.Option(help="folder of the new model")],
    greedy: Annotated[bool, typer.Option("--greedy/--uniform", help="which soup")] = True,
    rows: Annotated[int, typer.Option(min=1, help="validation rows of each domain")] = 256,
    assume_one_origin: Annotated[
        bool, typer.Option(help="for models that do not say what they were trained from")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Average the parameters of branches of one checkpoint; members of different seeds are refused."""
    from mixwright.data_mixing.store import TokenStore
    from mixwright.launch.console import RunConsole
    from mixwright.pretrain.ensemble.curve import validation_loss
    from mixwright.pretrain.ensemble.soup import check_soup, greedy_soup, uniform_soup, write_soup

    members = find_members(paths, None)
    check_soup(members, assume_one_origin=assume_one_origin)
    score = validation_loss(members[0], TokenStore.open(store), rows)
    found = (greedy_soup if greedy else uniform_soup)(members, score)
    write_soup(found, members[0], out)
    if as_json:
        print_json({"taken": found.taken, "loss": found.loss, "singles": found.singles, "written": out})
        return
    console = RunConsole(quiet=False)
    table = [[name, f"{loss:.4f}", "yes" if name in found.taken else ""] for name, loss in found.singles]
    console.table("validation loss (nats per token)", ["member", "alone", "in the soup"], table)
    console.say(f"soup of {len(found.taken)}: {found.loss:.4f}, best single {found.singles[0][1]:.4f}")
    console.say(f"written: {out}")


def find_members(paths: list[Path], k: int | None) -> list[Member]:
    """The members that paths name; a folder of members stands for all of them. Raises EnsembleError."""
    from mixwright.pretrain.ensemble.member import inspect_member
    from mixwright.pretrain.errors import EnsembleError

    folders = [folder for path in paths for folder in (_members_in(path) or [path])]
    if k is not None and k > len(folders):
        raise EnsembleError(f"--k {k}: only {len(folders)} members were trained or named; train more, or ask for fewer")
    return [inspect_member(folder) for folder in folders[:k]]


def show_curve(evaluation: EnsembleEvaluation, fitted: bool, console: RunConsole) -> None:
    """The table of losses by the number of members."""
    at = "at the temperature fitted on validation rows" if fitted else "at temperature 1"
    rows = [
        [
            str(point.k),
            str(point.num_subsets),
            f"{point.loss:.4f} ± {point.error:.4f}",
            f"{point.gain:+.4f} ± {point.gain_error:.4f}" if point.k > 1 else "",
            f"{point.step:+.4f} ± {point.step_error:.4f}" if point.k > 1 else "",
            f"{point.temperature:.3f}",
        ]
        for point in evaluation.curve(fitted=fitted)
    ]
    header = ["K", "subsets", "test loss", "below one member", "below K - 1", "temperature"]
    console.table(f"mean {evaluation.pooling}, {at} (nats per token, errors over rows)", header, rows)


def _members_in(path: Path) -> list[Path]:
    """member-0, member-1, ... of a folder, in the order of their numbers."""
    found = {}
    for folder in path.glob("member-*") if path.is_dir() else ():
        number = re.fullmatch(r"member-(\d+)", folder.name)
        if number and folder.is_dir():
            found[int(number[1])] = folder
    return [found[number] for number in sorted(found)]


def pooling_named(name: str) -> Pooling:
    """The pooling of that name. Raises ConfigError."""
    from mixwright.data_mixing.errors import ConfigError, nearest
    from mixwright.pretrain.ensemble.pooling import POOLINGS

    if name not in POOLINGS:
        raise ConfigError(f"--pooling {name}: expected {' or '.join(POOLINGS)}{nearest(name, POOLINGS)}")
    return POOLINGS[POOLINGS.index(name)]


def _points(texts: list[str]) -> dict[float, float]:
    """Losses by tokens, from TOKENS=LOSS."""
    from mixwright.data_mixing.errors import ConfigError

    points = {}
    for text in texts:
        left, separator, right = text.partition("=")
        try:
            if not separator:
                raise ValueError
            points[float(left)] = float(right)
        except ValueError:
            raise ConfigError(f"--standard {text!r}: expected TOKENS=LOSS, e.g. 2.1e8=3.75") from None
    return points
