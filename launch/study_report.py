"""The mixing study's table: on the terminal, as Markdown, and as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

from mixwright.launch.mixing_study import BASELINE, Study
from mixwright.launch.study_tables import show_tables
from mixwright.pretrain.sweeps.comparison import Comparison

matplotlib.use("Agg")  # no display on a training node

from matplotlib import pyplot

HEADER = ("policy", "seeds", "mean ppl", "difference", "± s.e.", "in %", "extra runs", "extra tokens")

LINEAR_PERCENT = 4.0


def show(study: Study) -> None:
    """Print one table per setting."""
    tables = _tables(study).items()
    show_tables((_title(study, setting), _columns(study, setting), rows) for setting, rows in tables)


def write_evidence(study: Study, folder: Path) -> tuple[Path, Path]:
    """`mixing_study.md` and `mixing_study.png`; returns both."""
    folder.mkdir(parents=True, exist_ok=True)
    page, picture = folder / "mixing_study.md", folder / "mixing_study.png"
    _draw(study, picture)
    page.write_text(_page(study, picture.name), encoding="utf-8")
    return page, picture


def _tables(study: Study) -> dict[str, list[list[str]]]:
    return {
        setting: [_row(study, setting, policy, result) for policy, result in study.table(setting).items()]
        for setting in study.settings
    }


def _columns(study: Study, setting: str) -> list[str]:
    domains = study.settings[setting].domains
    return [*HEADER, *(f"ppl {name}" for name in domains), *(f"share {name}" for name in domains)]


def _row(study: Study, setting: str, policy: str, result: Comparison | None) -> list[str]:
    domains = study.settings[setting].domains
    if result is None:
        return [policy, "0", "not run", *[""] * (len(HEADER) - 3 + 2 * len(domains))]
    fitted = study.outcomes[setting, policy].fitted
    config = study.config.proxy
    tokens = config.num_steps * config.rows_per_step
    is_base = policy == BASELINE
    return [
        policy,
        str(result.num_seeds),
        f"{result.mean:.2f}",
        "" if is_base else f"{result.difference:+.2f}",
        "" if is_base or math.isnan(result.standard_error) else f"{result.standard_error:.2f}",
        "" if is_base else f"{result.relative:+.2%}",
        str(len(fitted.records)) if fitted else "0",
        f"{sum(sum(r.rows.values()) for r in fitted.records) / tokens:.1f} x" if fitted else "0",
        *(f"{result.perplexity[name]:.2f}" for name in domains),
        *(f"{result.shares[name]:.3f}" for name in domains),
    ]


def _title(study: Study, setting: str) -> str:
    note = study.settings[setting].note
    return f"{setting}: {note}" if note else setting


def _page(study: Study, picture: str) -> str:
    parts = [
        "# Mixing policies beside stratified sampling",
        _preface(study),
        f"![differences]({picture})",
        _summary(study),
    ]
    for setting, rows in _tables(study).items():
        parts.append(f"## {_title(study, setting)}")
        parts.append(markdown(_columns(study, setting), rows))
        parts.append(_figures(study, setting))
    return "\n\n".join(part for part in parts if part) + "\n"


def _preface(study: Study) -> str:
    config = study.config.proxy
    sizes = {r.num_parameters for o in study.outcomes.values() for r in o.records.values()}
    lengths = {r.tokens for o in study.outcomes.values() for r in o.records.values()}
    seconds = sum(r.seconds for o in study.outcomes.values() for r in o.records.values())
    seconds += sum(r.seconds for o in study.outcomes.values() if o.fitted for r in o.fitted.records)
    return (
        "Written by `python launch/study.py mixing`; how it is done and what it is not: docs/studies.md. Every "
        f"compared run has {config.num_steps} steps of {config.rows_per_step} rows "
        f"({' or '.join(f'{n:,}' for n in sorted(lengths))} tokens) and "
        f"{' or '.join(f'{n:,}' for n in sorted(sizes))} parameters. Perplexities are of plain cross-entropy on fixed "
        "test rows, averaged over seeds; `mean ppl` is the mean over the domains (without garbage); a difference is to "
        "stratified, negative is better, its standard error is paired by seed. Extra runs are those that a method "
        f"spends beforehand, their tokens in multiples of one compared run. All runs together took {seconds / 60:.0f} "
        "core-minutes, measured while they shared the machine."
    )


def _summary(study: Study) -> str:
    """Differences in per cent, policies by settings."""
    tables = {setting: study.table(setting) for setting in study.settings}
    rows = [[p, *(percent(tables[s][p]) for s in study.settings), *_wins(study, p)] for p in study.policies]
    return markdown(["mean ppl, difference in %", *study.settings, "better in", "worst"], rows)


def _wins(study: Study, policy: str) -> tuple[str, str]:
    """In how many settings of real text the policy is better, and its worst difference there."""
    real = [s for s, setting in study.settings.items() if not setting.garbage]
    found = [result.relative for s in real if (result := study.table(s)[policy]) is not None]
    return f"{sum(r < 0 for r in found)} of {len(found)}", f"{max(found):+.2%}" if found else ""


def percent(result: Comparison | None) -> str:
    """Relative difference with its standard error; empty for what was not run."""
    if result is None:
        return ""
    error = "" if math.isnan(result.relative_error) else f" ± {result.relative_error:.2%}"
    return f"{result.relative:+.2%}{error}"


def _figures(study: Study, setting: str) -> str:
    """What the fits say of themselves."""
    lines = []
    for policy in study.policies:
        fitted = study.outcomes[setting, policy].fitted
        if fitted is not None:
            lines += [f"- {policy}, {name}: {_plain(value)}" for name, value in fitted.figures.items()]
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, dict):
        return "; ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    return str(value)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, numbers to the right of the first column."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _draw(study: Study, path: Path) -> None:
    """Differences in per cent with standard errors, one group of bars per setting."""
    figure, axes = pyplot.subplots(figsize=(12, 5), constrained_layout=True)
    width = 0.8 / max(len(study.policies), 1)
    for number, policy in enumerate(study.policies):
        results = [study.table(setting)[policy] for setting in study.settings]
        at = [place + (number + 0.5) * width - 0.4 for place, result in enumerate(results) if result is not None]
        found = [result for result in results if result is not None]
        height = [100 * result.relative for result in found]
        error = [0.0 if math.isnan(r.relative_error) else 100 * r.relative_error for r in found]
        axes.bar(at, height, width, yerr=error, label=policy, error_kw={"linewidth": 0.8})
    axes.axhline(0, color="0.2", linewidth=0.8)
    axes.set_xticks(range(len(study.settings)), list(study.settings))
    # Some methods fail by tens of per cent; linear where most of the answer lies, logarithmic beyond.
    axes.set_yscale("symlog", linthresh=LINEAR_PERCENT, linscale=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylabel(f"mean test perplexity, difference to stratified in %\n(logarithmic beyond {LINEAR_PERCENT:g} %)")
    axes.set_title("Mixing policies at equal tokens (negative is better; bars: paired standard error over seeds)")
    axes.grid(alpha=0.25, axis="y")
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
