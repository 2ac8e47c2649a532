"""Two or more runs beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mixwright.launch.dashboard.panels import POINTS
from mixwright.launch.dashboard.run_view import RunView
from mixwright.launch.dashboard.series import Buckets, plain

SETTINGS = ("seed", "num_steps", "rows_per_step", "sequence_length", "store_fingerprint")


def compare(views: Sequence[RunView]) -> dict[str, Any]:
    """Mean losses over steps, newest losses and tokens by domain, policies, and settings that differ."""
    runs = []
    for view in views:
        with view.lock:
            runs.append(_run(view))
    names = list(dict.fromkeys(name for run in runs for name in run["domains"]))
    found = {key: [run["settings"].get(key) for run in runs] for key in SETTINGS}
    different = {key: values for key, values in found.items() if len(set(map(str, values))) > 1}
    return {"runs": runs, "domains": names, "different": different}


def _run(view: RunView) -> dict[str, Any]:
    journal = view.journal
    history = journal.history
    if not history.has_genesis:
        preference = view.metrics.figures.get("train/loss/preference")
        train = _overall(preference) if preference else {"steps": [], "mean": []}
        return {"name": view.name, "settings": {}, "train": train, "validation": {"steps": [], "mean": []},
                "domains": {}, "policies": []}  # fmt: skip
    genesis = history.genesis
    kinds: dict[str, int] = {}
    for commit in history.commits:
        kind = str(commit.policy.document.get("kind", "?"))
        kinds[kind] = kinds.get(kind, 0) + 1
    return {
        "name": view.name,
        "settings": {key: getattr(genesis, key) for key in SETTINGS},
        "train": _overall(journal.train),
        "validation": _overall(journal.validation),
        "domains": _domains(view),
        "policies": sorted(kinds.items(), key=lambda item: -item[1]),
    }


def _overall(buckets: Buckets) -> dict[str, Any]:
    """Mean over all columns by weight."""
    curve = buckets.curve(POINTS)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_P = np.nansum(curve.mean_PC * curve.weight_PC, axis=1) / curve.weight_PC.sum(axis=1)
    return {"steps": curve.step_P.tolist(), "mean": plain(mean_P)}


def _domains(view: RunView) -> dict[str, Any]:
    """Newest training and validation loss, and tokens read, by domain."""
    journal = view.journal
    train, validation = (_newest(buckets) for buckets in (journal.train, journal.validation))
    plan, genesis = journal.plan, journal.history.genesis
    rows_G = plan.cursors(journal.history.last_step + 1) if plan is not None else np.zeros(len(genesis.domains))
    return {
        domain.name: {"train": train[index], "validation": validation[index],
                      "tokens": int(rows_G[index]) * genesis.sequence_length}
        for index, domain in enumerate(genesis.domains)
    }  # fmt: skip


def _newest(buckets: Buckets) -> list[float | None]:
    """The last value of every column, wherever on the curve it stands."""
    curve = buckets.curve(POINTS)
    values_C: list[float | None] = [None] * curve.mean_PC.shape[1]
    for mean_C in curve.mean_PC[-10:]:
        values_C = [new if new is not None else old for new, old in zip(plain(mean_C), values_C, strict=True)]
    return values_C
