"""Studies: what a method does to a model, beside the others, at equal tokens."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixwright.launch.ending import run

if TYPE_CHECKING:
    from mixwright.launch.proxy_tasks import Tell
    from mixwright.pretrain.proxy import ProxyRecord

CONFIG = Path(__file__).parent.parent / "configs" / "studies" / "mixing.yaml"
WEIGHTING_CONFIG = CONFIG.with_name("weighting.yaml")
ENSEMBLE_CONFIG = CONFIG.with_name("ensemble.yaml")
OVEROPTIMISATION_CONFIG = CONFIG.with_name("overoptimisation.yaml")
EVIDENCE = Path("docs") / "evidence"

app = typer.Typer(help="Compare methods on small models.", no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _studies() -> None:
    """Compare methods on small models."""


@app.command()
def mixing(
    config: Annotated[Path, typer.Option(help="the study")] = CONFIG,
    settings: Annotated[str, typer.Option(help="names, separated by commas (default: all)")] = "",
    policies: Annotated[str, typer.Option(help="names, separated by commas, or `all`")] = "",
    seeds: Annotated[int | None, typer.Option(min=1, help="number of seeds")] = None,
    budget_minutes: Annotated[float | None, typer.Option(min=0, help="begin no run after so long")] = None,
    workers: Annotated[int, typer.Option(min=0, help="runs at a time as Ray tasks; 0: here, one by one")] = 2,
    address: Annotated[str | None, typer.Option(help="a Ray cluster (default: RAY_ADDRESS, else a local Ray)")] = None,
    evidence: Annotated[Path, typer.Option(help="folder of the table and the picture")] = EVIDENCE,
) -> None:
    """Every mixing policy at equal tokens: test perplexity beside stratified sampling, paired by seed.

    Finished runs are kept and read again, so a study that was interrupted goes on.
    """
    from mixwright.launch.mixing_study import Study, load_study, prepare_corpora, with_texts_at_hand
    from mixwright.launch.proxy_tasks import executor
    from mixwright.launch.ray_tasks import OutOfTime
    from mixwright.launch.study_report import show, write_evidence

    began = time.monotonic()
    study_config = with_texts_at_hand(load_study(config))
    if seeds is not None:
        study_config = study_config.model_copy(update={"seeds": seeds})
    names = list(study_config.policies) if policies == "all" else _names(policies)
    chosen = study_config.choose(_names(settings), names)
    prepare_corpora(study_config, chosen[0])
    study = Study(study_config, *chosen)
    deadline = None if budget_minutes is None else began + 60 * budget_minutes
    try:
        with executor(
            study_config.folder / "runs", workers, _progress(began), address=address, deadline=deadline
        ) as execute:
            study.fit(execute)
            study.compare(execute)
    except OutOfTime as error:
        typer.echo(f"{error}; what follows is what there is", err=True)
    show(study)
    for path in write_evidence(study, evidence):
        typer.echo(f"written: {path}")


@app.command()
def weighting(
    config: Annotated[Path, typer.Option(help="the study")] = WEIGHTING_CONFIG,
    strategies: Annotated[str, typer.Option(help="names, separated by commas (default: all)")] = "",
    seeds: Annotated[int | None, typer.Option(min=1, help="number of seeds")] = None,
    budget_minutes: Annotated[float | None, typer.Option(min=0, help="begin no run after so long")] = None,
    workers: Annotated[int, typer.Option(min=0, help="runs at a time as Ray tasks; 0: here, one by one")] = 2,
    address: Annotated[str | None, typer.Option(help="a Ray cluster (default: RAY_ADDRESS, else a local Ray)")] = None,
    evidence: Annotated[Path, typer.Option(help="folder of the table and the picture")] = EVIDENCE,
) -> None:
    """Instance weights on clean, noised and repeating text: test perplexity beside counting all samples alike.

    Finished runs are kept and read again, so a study that was interrupted goes on.
    """
    from mixwright.launch.proxy_tasks import executor
    from mixwright.launch.ray_tasks import OutOfTime
    from mixwright.launch.weighting_report import show, write_evidence
    from mixwright.launch.weighting_study import load_weighting_study

    began = time.monotonic()
    study = load_weighting_study(config, _names(strategies), seeds)
    deadline = None if budget_minutes is None else began + 60 * budget_minutes
    runs = study.base.folder / "runs"
    try:
        with executor(runs, workers, _progress(began), address=address, deadline=deadline) as execute:
            study.perform(execute)
    except OutOfTime as error:
        typer.echo(f"{error}; what follows is what there is", err=True)
    show(study)
    for path in write_evidence(study, evidence):
        typer.echo(f"written: {path}")


@app.command()
def ensemble(
    config: Annotated[Path, typer.Option(help="the study")] = ENSEMBLE_CONFIG,
    arms: Annotated[str, typer.Option(help="students, separated by commas (default: default_arms)")] = "",
    widths: Annotated[str, typer.Option(help="ensembles of models of these widths too, separated by commas")] = "",
    budget_minutes: Annotated[float | None, typer.Option(min=0, help="begin no run after so long")] = None,
    workers: Annotated[int, typer.Option(min=0, help="runs at a time as Ray tasks; 0: one by one")] = 2,
    address: Annotated[str | None, typer.Option(help="a Ray cluster (default: RAY_ADDRESS, else a local Ray)")] = None,
    evidence: Annotated[Path, typer.Option(help="folder of the table and the picture")] = EVIDENCE,
) -> None:
    """Little text, much computing: tuned decay, ensembles, and students of them at equal steps, beside controls.

    Finished runs are kept and read again, so a study that was interrupted goes on.
    """
    from mixwright.launch.ensemble_findings import find
    from mixwright.launch.ensemble_report import show, write_evidence
    from mixwright.launch.ensemble_runs import performer
    from mixwright.launch.ensemble_study import load_ensemble_study
    from mixwright.launch.ensemble_widths import write_widths
    from mixwright.launch.ray_tasks import OutOfTime
    from mixwright.launch.training_runs import run_map

    deadline = None if budget_minutes is None else time.monotonic() + 60 * budget_minutes
    study = load_ensemble_study(config, typer.echo)
    chosen = study.choose(_names(arms))
    wider = [study.at_width(_whole(width)) for width in _names(widths)]
    try:
        with run_map(workers, study.ensemble.resources, address) as map_:
            perform = performer(map_, study.ensemble, typer.echo, deadline)
            study.perform(perform, chosen)
            for one in wider:
                one.perform_ensemble(perform)
    except OutOfTime as error:
        typer.echo(f"{error}; what follows is what there is", err=True)
    findings = find(study)
    show(findings)
    written = [*write_evidence(findings, evidence)]
    if wider:
        written += write_widths([findings, *map(find, wider)], evidence)
    for path in written:
        typer.echo(f"written: {path}")


@app.command()
def overoptimisation(
    config: Annotated[Path, typer.Option(help="the study")] = OVEROPTIMISATION_CONFIG,
    arms: Annotated[str, typer.Option(help="names, separated by commas (default: all)")] = "",
    seeds: Annotated[int | None, typer.Option(min=1, help="number of seeds, of each part's first ones")] = None,
    budget_minutes: Annotated[float | None, typer.Option(min=0, help="begin no trial after so long")] = None,
    workers: Annotated[int, typer.Option(min=0, help="trials at a time as Ray tasks; 0: here, one by one")] = 2,
    address: Annotated[str | None, typer.Option(help="a Ray cluster (default: RAY_ADDRESS, else a local Ray)")] = None,
    evidence: Annotated[Path, typer.Option(help="folder of the table and the picture")] = EVIDENCE,
) -> None:
    """DPO and RPO until long after their best: gold reward, divergence and coverage over training, by eta.

    Finished trials are kept and read again, so a study that was interrupted goes on.
    """
    from mixwright.launch.overoptimisation_report import show, write_evidence
    from mixwright.launch.overoptimisation_study import load_overoptimisation_study, trial_map
    from mixwright.launch.ray_tasks import OutOfTime

    deadline = None if budget_minutes is None else time.monotonic() + 60 * budget_minutes
    study = load_overoptimisation_study(config, _names(arms), seeds, typer.echo)
    try:
        with trial_map(study, workers, address) as map_:
            study.perform(map_, typer.echo, deadline)
    except OutOfTime as error:
        typer.echo(f"{error}; what follows is what there is", err=True)
    show(study)
    for path in write_evidence(study, evidence):
        typer.echo(f"written: {path}")


def _whole(text: str) -> int:
    from mixwright.data_mixing.errors import ConfigError

    if not text.isdigit() or not int(text):
        raise ConfigError(f"--widths {text!r}: expected whole numbers, separated by commas")
    return int(text)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _progress(began: float) -> Tell:
    def tell(done: int, total: int, record: ProxyRecord) -> None:
        losses = " ".join(f"{name} {loss:.3f}" for name, loss in record.test.items())
        minutes = (time.monotonic() - began) / 60
        what = f"{record.run.policy['kind']:12s} seed {record.run.seed:4d}  {record.seconds:5.1f} s"
        typer.echo(f"{minutes:6.1f} min  {done:3d}/{total}  {what}  {losses}")

    return tell


def main() -> None:
    """Run the command; every expected failure is one line and its exit code."""
    run(app)


if __name__ == "__main__":
    main()
