"""The weighting study's table: on the terminal, as Markdown, and as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean

from matplotlib import pyplot

from mixwright.launch.study_report import markdown, percent
from mixwright.launch.study_tables import show_tables
from mixwright.launch.weighting_study import BASELINE, WeightingStudy

HEADER = ("strategy", "seeds", "mean ppl", "difference in %", "steps to baseline", "effective samples", "throughput")


def show(study: WeightingStudy) -> None:
    """Print one table per kind of data."""
    show_tables(((data, HEADER, _rows(study, data)) for data in study.config.data), width=160)


def write_evidence(study: WeightingStudy, folder: Path) -> tuple[Path, Path]:
    """`weighting_study.md` and `weighting_study.png`; returns both."""
    folder.mkdir(parents=True, exist_ok=True)
    page, picture = folder / "weighting_study.md", folder / "weighting_study.png"
    _draw(study, picture)
    parts = [
        "# Instance weighting beside counting all samples alike",
        _preface(study),
        f"![differences]({picture.name})",
    ]
    for data in study.config.data:
        parts += [f"## {data}", markdown(list(HEADER), _rows(study, data))]
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page, picture


def _rows(study: WeightingStudy, data: str) -> list[list[str]]:
    return [_row(study, data, strategy) for strategy in (BASELINE, *study.strategies)]


def _row(study: WeightingStudy, data: str, strategy: str) -> list[str]:
    result = study.compare(data, strategy)
    if result is None:
        return [strategy, "0", "not run", *[""] * (len(HEADER) - 3)]
    is_base = strategy == BASELINE
    return [
        strategy,
        str(result.num_seeds),
        f"{result.mean:.2f}",
        "" if is_base else percent(result),
        "" if is_base else _steps(study.steps_to_baseline(data, strategy)),
        f"{study.effective(data, strategy):.2f}",
        "" if is_base else f"{study.throughput(data, strategy):.2f}x",
    ]


def _steps(found: list[int | None]) -> str:
    reached = [step for step in found if step is not None]
    if not reached:
        return "not reached"
    missed = "" if len(reached) == len(found) else f" ({len(reached)} of {len(found)})"
    return f"{mean(reached):.0f}{missed}"


def _preface(study: WeightingStudy) -> str:
    records = [record for found in study.records.values() for record in found.values()]
    config, seconds = study.proxy, sum(record.seconds for record in records)
    sizes = " or ".join(f"{size:,}" for size in sorted({record.num_parameters for record in records}))
    return (
        "Written by `python launch/study.py weighting`; how it is done and what it is not: docs/studies.md. Every run "
        f"has {config.num_steps} steps of {config.rows_per_step} rows of {', '.join(study.domains)}, all alike, and "
        f"{sizes} parameters. Perplexities are of plain cross-entropy on whole test rows, mean over domains and seeds; "
        "a difference is to `uniform` on the same data, negative is better, its standard error is paired by seed. "
        f"`steps to baseline` is the first validation (every {study.config.validate_every} steps) with the mean loss "
        "that `uniform` has at its end. Throughput is that of whole runs beside `uniform`'s, with validations; they "
        f"shared the machine. All runs together took {seconds / 60:.0f} core-minutes."
    )


def _draw(study: WeightingStudy, path: Path) -> None:
    """Differences in per cent with standard errors, one group of bars per kind of data."""
    figure, axes = pyplot.subplots(figsize=(9, 4.5), constrained_layout=True)
    width = 0.8 / max(len(study.strategies), 1)
    for number, strategy in enumerate(study.strategies):
        results = [(place, study.compare(data, strategy)) for place, data in enumerate(study.config.data)]
        found = [(place + (number + 0.5) * width - 0.4, result) for place, result in results if result is not None]
        height = [100 * result.relative for _, result in found]
        error = [0.0 if math.isnan(result.relative_error) else 100 * result.relative_error for _, result in found]
        axes.bar([at for at, _ in found], height, width, yerr=error, label=strategy, error_kw={"linewidth": 0.8})
    axes.axhline(0, color="0.2", linewidth=0.8)
    axes.set_xticks(range(len(study.config.data)), list(study.config.data))
    axes.set_ylabel("mean test perplexity,\ndifference to uniform in %")
    axes.set_title("Instance weights at equal tokens (negative is better; bars: paired standard error over seeds)")
    axes.grid(alpha=0.25, axis="y")
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
