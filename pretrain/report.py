"""The report of a run, from journal and metrics alone: pictures and tables in `report.png` and `report.html`."""

from __future__ import annotations

import base64
import html
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display on a training node


from matplotlib import pyplot
from matplotlib.axes import Axes

from mixwright.data_mixing.history import RunHistory
from mixwright.pretrain.metrics import read_metrics

MAX_SHOWN = 8
"""Domains drawn with a colour of their own; the rest are drawn together."""


MIN_ROWS_PER_BIN = 128
"""A realised share is drawn over at least this many rows: a step's own share is a coarse fraction."""


@dataclass(frozen=True)
class Curves:
    """What is drawn, domains by falling number of rows read.

    `requested` [S, K] holds from each of `steps` [S] on; `realised` [J, K] is the share between two `edges` [J+1].
    """

    names: list[str]
    train: dict[str, tuple[list[int], list[float]]]
    validation: dict[str, tuple[list[int], list[float]]]
    steps: np.ndarray
    requested: np.ndarray
    edges: np.ndarray
    realised: np.ndarray
    commits: list[tuple[int, str]]
    rows: np.ndarray


def write_report(run_dir: Path, history: RunHistory, num_steps_done: int) -> tuple[Path, Path]:
    """Write `report.html` and `report.png` into the run folder; returns both paths."""
    records = read_metrics(run_dir)
    curves = collect(records, history, num_steps_done)
    png = run_dir / "report.png"
    _draw(curves, history.genesis.run, png)
    page = run_dir / "report.html"
    page.write_text(_page(curves, history, records, png.read_bytes()), encoding="utf-8")
    return page, png


def collect(records: Sequence[Mapping[str, Any]], history: RunHistory, num_steps_done: int) -> Curves:
    """Losses from the metrics; requested and realised mixture recomputed from the journal's plan."""
    genesis, plan = history.genesis, history.plan()
    names = [domain.name for domain in genesis.domains]
    rows = plan.cursors(num_steps_done)
    order = np.argsort(-rows, kind="stable")
    steps = np.unique(np.linspace(0, max(num_steps_done - 1, 0), 400).astype(int))
    edges = _bin_edges(num_steps_done, genesis.rows_per_step, [commit.effective_step for commit in history.commits])
    cursors = np.array([plan.cursors(int(edge)) for edge in edges])
    realised = np.diff(cursors, axis=0) / (np.diff(edges) * genesis.rows_per_step)[:, None]
    return Curves(
        names=[names[i] for i in order],
        train=_series(records, "train", names),
        validation=_series(records, "validation", names),
        steps=steps,
        requested=np.array([plan.proportions(int(step)) for step in steps])[:, order],
        edges=edges,
        realised=realised[:, order],
        commits=[(commit.effective_step, _commit_label(commit.lsn, commit.policy)) for commit in history.commits],
        rows=rows[order],
    )


def _bin_edges(num_steps: int, rows_per_step: int, commits: Sequence[int]) -> np.ndarray:
    """Steps that bound the bins; a commit always bounds one, so that no bin mixes two policies."""
    width = max(-(-num_steps // 40), -(-MIN_ROWS_PER_BIN // rows_per_step))
    bounds = sorted({0, num_steps, *(step for step in commits if step < num_steps)})
    bins = [np.linspace(a, b, max((b - a) // width, 1) + 1).astype(int) for a, b in itertools.pairwise(bounds)]
    return np.unique(np.concatenate([np.zeros(1, int), *bins]))


def _series(records: Sequence[Mapping[str, Any]], kind: str, names: Sequence[str]) -> dict[str, Any]:
    series: dict[str, Any] = {name: ([], []) for name in names}
    for record in records:
        if record["kind"] == kind:
            for name, value in record["loss"].items():
                series[name][0].append(record["step"])
                series[name][1].append(value)
    return series


def _commit_label(lsn: int, policy: Any) -> str:
    label = f"policy {lsn}: {policy.document.get('kind', '?')}"
    by = f" by {policy.author}" if policy.author else ""
    why = f" ({policy.why})" if policy.why else ""
    return label + by + why


def _draw(curves: Curves, run: str, path: Path) -> None:
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 8.5), constrained_layout=True)
    colours = {name: f"C{i}" if i < MAX_SHOWN else "0.7" for i, name in enumerate(curves.names)}
    _draw_losses(axes[0, 0], curves.train, colours, "training loss (nats per token)")
    _draw_losses(axes[0, 1], curves.validation, colours, "held-out loss (nats per token)", marker="o")
    _draw_mixture(axes[1, 0], curves, colours)
    _draw_rows(axes[1, 1], curves, colours)
    figure.suptitle(f"mixwright run {run}".replace("$", r"\$"))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_losses(
    axes: Axes, series: Mapping[str, Any], colours: Mapping[str, str], title: str, marker: str | None = None
) -> None:
    for name, colour in colours.items():
        steps, values = series[name]
        if steps:
            axes.plot(steps, values, color=colour, marker=marker, markersize=3, linewidth=1.3, label=_plain(name))
    axes.set(title=title, xlabel="optimizer step")
    axes.grid(alpha=0.25)
    if axes.lines:
        axes.legend(fontsize=8, ncols=2)


def _draw_mixture(axes: Axes, curves: Curves, colours: Mapping[str, str]) -> None:
    middles = (curves.edges[1:] + curves.edges[:-1]) / 2
    for index, colour in enumerate(colours.values()):
        axes.step(curves.steps, curves.requested[:, index], where="post", color=colour, linewidth=1.2)
        axes.plot(middles, curves.realised[:, index], "o", color=colour, markersize=4, alpha=0.7)
    for step, _ in curves.commits:
        axes.axvline(step, color="0.3", linewidth=0.8, linestyle=":")
    axes.set(title="mixture: requested (lines), realised (dots), commits (dotted)", xlabel="optimizer step")
    axes.set_ylabel("share of tokens")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)


def _draw_rows(axes: Axes, curves: Curves, colours: Mapping[str, str]) -> None:
    shown = list(colours)[: 4 * MAX_SHOWN]
    axes.barh([_plain(n) for n in shown], curves.rows[: len(shown)], color=[colours[name] for name in shown])
    axes.invert_yaxis()
    axes.set(title="rows read per domain", xlabel="rows")
    axes.grid(alpha=0.25, axis="x")


def _plain(name: str) -> str:
    """A name as text for matplotlib, where `$` starts mathematics and a leading `_` hides a label."""
    return name.replace("$", r"\$").replace("_", "\u2009_", 1) if name.startswith("_") else name.replace("$", r"\$")


def _page(curves: Curves, history: RunHistory, records: Sequence[Mapping[str, Any]], png: bytes) -> str:
    genesis = history.genesis
    tests = [record for record in records if record["kind"] == "test"]
    parts = [
        f"<h1>mixwright run {html.escape(genesis.run)}</h1>",
        f"<p>seed {genesis.seed}, {genesis.rows_per_step} rows of {genesis.sequence_length} tokens a step, "
        f"{curves.edges[-1]} of {genesis.num_steps} steps done.</p>",
        f'<img alt="losses and mixture" src="data:image/png;base64,{base64.b64encode(png).decode()}">',
        "<h2>Test perplexity per domain</h2>",
        _table(
            ["domain", *(f"after step {record['step']}" for record in tests)], _perplexity_rows(curves.names, tests)
        ),
        "<h2>Tokens and epochs per domain</h2>",
        _table(["domain", "rows read", "tokens", "epochs"], _token_rows(curves, history)),
        "<h2>Policies</h2>",
        _table(["effective from step", "policy"], [[str(step), label] for step, label in curves.commits]),
    ]
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color-scheme:light dark}"
        "img{max-width:100%}table{border-collapse:collapse}td,th{padding:.2em .9em;border-bottom:1px solid #8886;"
        "text-align:right}td:first-child,th:first-child{text-align:left}"
    )
    title = html.escape(genesis.run)
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
    return head + "\n".join(parts) + "</html>\n"


def _perplexity_rows(names: Sequence[str], tests: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [
        [name, *(f"{record['perplexity'][name]:.2f}" if name in record["perplexity"] else "-" for record in tests)]
        for name in names
    ]


def _token_rows(curves: Curves, history: RunHistory) -> list[list[str]]:
    available = {domain.name: domain.num_rows for domain in history.genesis.domains}
    length = history.genesis.sequence_length
    return [
        [name, f"{int(rows):,}", f"{int(rows) * length:,}", f"{rows / available[name]:.2f}"]
        for name, rows in zip(curves.names, curves.rows, strict=True)
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in header) + "</tr>"]
    cells += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "<table>" + "".join(cells) + "</table>"
