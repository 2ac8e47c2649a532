"""What each panel shows, as plain data. G domains, P points; every list of numbers is along one of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mixwright.data_mixing.domain import Cap
from mixwright.data_mixing.errors import MixingError
from mixwright.data_mixing.loss_weighting import LossWeighting
from mixwright.data_mixing.plan import Exhaustion, Plan
from mixwright.data_mixing.run_status import run_status
from mixwright.launch.dashboard.journal_view import LANES, DecisionNote, Event, JournalView
from mixwright.launch.dashboard.run_view import RunView
from mixwright.launch.dashboard.series import Buckets, Curve, plain

POINTS = 480
MAX_NUMBERS = 12_000
"""Of one table of curves: with many domains each has fewer points, so that an answer stays small."""
Z_95 = 1.96
Tree = dict[str, Any]


def summary(view: RunView) -> Tree:
    """Where the run stands, by domain too."""
    tree: Tree = {
        "name": view.name,
        "folder": str(view.run_dir),
        "reading": view.is_reading,
        "left": view.num_left,
        "problem": view.journal.problem,
        "service": {"state": view.service[0], "message": view.service[1]},
        "updated": view.journal.newest_time,
        "now": time.time(),
        "seconds_per_step": view.metrics.seconds_per_step(),
        "tests": [{"step": test["step"], "perplexity": test.get("perplexity")} for test in view.metrics.tests],
    }
    if not view.journal.history.has_genesis:
        last = max([view.metrics.steps.last_step, *(b.last_step for b in view.metrics.figures.values())])
        state = "complete" if view.metrics.end else ("running" if last >= 0 else "waiting")
        return {**tree, "kind": "figures", "state": state, "next_step": max(last, 0), "num_steps": None, "domains": []}
    return {**tree, "kind": "pretraining", **_status(view.journal)}


def _status(journal: JournalView) -> Tree:
    genesis, plan = journal.history.genesis, journal.plan
    if plan is None or plan.commits != tuple(journal.history.commits):
        # While the journal is still being read there is no plan of all commits yet.
        names = [{"name": domain.name} for domain in genesis.domains]
        now = journal.history.last_step + 1
        return {"run": genesis.run, "state": "waiting", "next_step": now, "num_steps": genesis.num_steps,
                "tokens_per_step": genesis.rows_per_step * genesis.sequence_length, "domains": names}  # fmt: skip
    status = run_status(journal.history, plan)
    tree = status.model_dump(mode="json")
    step = min(status.next_step, genesis.num_steps - 1)
    ends = {event.domain: event for event in journal.exhaustions}
    caps = _caps(journal, plan, step) if status.domains else {}
    validation = _newest(journal.validation)
    for index, domain in enumerate(tree["domains"]):
        cap = caps[domain["name"]]
        domain["max_epochs"], domain["on_exhaust"] = cap.max_epochs, cap.on_exhaust
        domain["num_rows"] = genesis.domains[index].num_rows
        domain["exhausted"] = _exhausted(ends.get(domain["name"]), status.next_step)
        domain["validation_loss"] = validation[index] if validation else None
    return {**tree, "tokens_per_step": genesis.rows_per_step * genesis.sequence_length, "seed": genesis.seed,
            "rows_per_step": genesis.rows_per_step, "sequence_length": genesis.sequence_length,
            "held": journal.history.is_held}  # fmt: skip


def _caps(journal: JournalView, plan: Plan, step: int) -> Mapping[str, Cap]:
    own = journal.history.policies[plan.policy_lsn(step)].caps
    return {domain.name: own.get(domain.name, domain.cap) for domain in journal.history.genesis.domains}


def _exhausted(event: Exhaustion | None, now: int) -> Tree | None:
    return None if event is None else {"step": event.step, "in": max(event.step - now, 0), "action": event.action}


def _newest(buckets: Buckets) -> list[float | None] | None:
    curve = buckets.curve(POINTS)
    return plain(curve.mean_PC[-1]) if len(curve.step_P) else None


def mixture(view: RunView) -> Tree:
    """Requested and realised shares over steps, the gap in rows, and where commits are."""
    journal = view.journal
    points = points_of(journal)
    requested, realised = journal.requested.curve(points), journal.realised.curve(points)
    commits = [
        [commit.effective_step, commit.lsn, str(commit.policy.document.get("kind", "?")), commit.policy.author]
        for commit in journal.history.commits
    ]
    return {
        "steps": realised.step_P.tolist(),
        "realised": plain(realised.mean_PC.T, 4),
        "requested_steps": requested.step_P.tolist(),
        "requested": plain(requested.mean_PC.T, 4),
        "largest_gap_rows": _largest_gap(requested, realised),
        "bucket_steps": journal.realised.width,
        "names": [domain.name for domain in journal.history.genesis.domains] if journal.history.has_genesis else [],
        "commits": commits,
    }


def points_of(journal: JournalView) -> int:
    """Points of a curve of each domain."""
    num_domains = len(journal.history.genesis.domains) if journal.history.has_genesis else 1
    return max(min(POINTS, MAX_NUMBERS // num_domains), 60)


def _largest_gap(requested: Curve, realised: Curve) -> float | None:
    """Largest difference of rows asked for and rows read up to any point; None while one of both is behind."""
    if len(requested.step_P) == 0 or not np.array_equal(requested.step_P, realised.step_P):
        return None
    difference_PG = realised.mean_PC * realised.weight_PC - requested.mean_PC * requested.weight_PC
    gap = float(np.abs(np.nancumsum(difference_PG, axis=0)).max())
    return round(gap, 2) if math.isfinite(gap) else None


def losses(view: RunView) -> Tree:
    """Training and validation loss by domain: mean, half of the 95 % interval of the mean, and over all domains."""
    names = [domain.name for domain in view.journal.history.genesis.domains] if view.journal.history.has_genesis else []
    return {
        "names": names,
        "train": _loss_curves(view.journal.train, points_of(view.journal)),
        "validation": _loss_curves(view.journal.validation, points_of(view.journal)),
    }


def _loss_curves(buckets: Buckets, points: int) -> Tree:
    curve = buckets.curve(points)
    with np.errstate(invalid="ignore", divide="ignore"):
        overall_P = np.nansum(curve.mean_PC * curve.weight_PC, axis=1) / curve.weight_PC.sum(axis=1)
    return {
        "steps": curve.step_P.tolist(),
        "mean": plain(curve.mean_PC.T),
        "half": plain(Z_95 * curve.stderr_PC.T, 3),
        "overall": plain(overall_P),
    }


def timeline(view: RunView) -> Tree:
    """Where everything happened: step and lane of every event; texts come page by page (`events`)."""
    events = view.journal.events
    counts = dict.fromkeys(LANES, 0)
    for event in events:
        counts[event.lane] += 1
    return {
        "lanes": LANES,
        "counts": counts,
        "steps": [event.step for event in events],
        "lane": [LANES.index(event.lane) for event in events],
        "lsn": [event.lsn for event in events],
        "now": view.journal.history.last_step + 1,
    }


def events(view: RunView, before: int | None, lanes: Sequence[str], count: int) -> Tree:
    """A page of events, newest first: those before entry `before`, of these lanes."""
    found: list[Event] = []
    with view.lock:
        for event in reversed(view.journal.events):
            if (before is None or event.lsn < before) and event.lane in lanes:
                found.append(event)
                if len(found) > count:
                    break
    return {"events": [asdict(event) for event in found[:count]], "more": len(found) > count}


def policy(view: RunView) -> Tree:
    """The decisions of online policies: shares, scores and rewards by arm over time, matrices."""
    history = view.journal.history
    roots = []
    for lsn, notes in view.journal.decisions.items():
        document = history.policies[lsn].document if lsn in history.policies else {}
        shadow = lsn in history.policies and history.policies[lsn].shadow
        roots.append({"lsn": lsn, "kind": str(document.get("kind", "?")), "shadow": shadow, **_decisions(list(notes))})
    return {"policies": sorted(roots, key=lambda root: (root["shadow"], -root["decisions"][-1]["step"]))}


def _decisions(notes: list[DecisionNote]) -> Tree:
    arms = next((note.arms for note in reversed(notes) if note.arms), ())
    vectors, matrices = _figures(notes, len(arms))
    heads = [
        {"lsn": note.lsn, "step": note.step, "number": note.decision, "action": note.action, "reason": note.reason}
        for note in notes
    ]
    shares = [note.shares if len(note.shares) == len(arms) else [None] * len(arms) for note in notes]
    return {"arms": arms, "decisions": heads, "shares": shares, "vectors": vectors, "matrices": matrices}


def _figures(notes: list[DecisionNote], num_arms: int) -> tuple[Tree, Tree]:
    """Diagnostics with one number per arm, and with one per pair of arms, of each decision (null: it has none)."""
    names = dict.fromkeys(name for note in notes for name in note.diagnostics)
    vectors: Tree = {}
    matrices: Tree = {}
    for name in names:
        values = [_array(note.diagnostics.get(name)) for note in notes]
        for shape, found in (((num_arms,), vectors), ((num_arms, num_arms), matrices)):
            if any(value is not None and value.shape == shape for value in values):
                found[name] = [plain(v) if v is not None and v.shape == shape else None for v in values]
    return vectors, matrices


def _array(value: Any) -> np.ndarray | None:
    """Numbers as an array; None for what is no rectangle of numbers (a policy's figures are its own)."""
    if not isinstance(value, (list, tuple)):
        return None
    try:
        return np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        return None


def weighting(view: RunView) -> Tree:
    """Instance weights: effective sample size, histogram over steps, what each domain weighs beside its tokens."""
    figures = view.metrics.weights
    scalars, counts = figures.scalars.curve(POINTS), figures.counts.curve(120)
    weight, tokens = _newest(figures.weight_share), _newest(figures.token_share)
    return {
        "steps": scalars.step_P.tolist(),
        "effective": _band(scalars, 0),
        "correlation": plain(scalars.mean_PC[:, 1]),
        "edges": figures.edges,
        "histogram_steps": counts.step_P.tolist(),
        "histogram": plain(counts.mean_PC, 4) if figures.edges else [],
        "names": figures.names,
        "weight_share": weight or [],
        "token_share": tokens or [],
        "in_force": _weighting_in_force(view),
    }


def _weighting_in_force(view: RunView) -> str:
    """The instance weighting at the next step as one line, '' when there is none."""
    plan, history = view.journal.plan, view.journal.history
    if plan is None or not plan.commits:
        return ""
    try:
        found = plan.weighting(min(history.last_step + 1, history.genesis.num_steps - 1))
    except MixingError:
        return ""
    if found is None or found[1].strategy == "uniform":
        return ""
    return f"{weighting_words(found[1])} (from step {found[0]})"


def weighting_words(weighting: LossWeighting) -> str:
    """Strategy and whatever is not the default, as one line."""
    usual = LossWeighting().model_dump(mode="json")
    given = {key: value for key, value in weighting.model_dump(mode="json").items() if value != usual[key]}
    return ", ".join(f"{key} {value}" for key, value in {"strategy": weighting.strategy, **given}.items())


def throughput(view: RunView) -> Tree:
    """Speed, waiting for data, learning rate, gradient norm, memory."""
    curve, history = view.metrics.steps.curve(POINTS), view.journal.history
    seconds_P = curve.mean_PC[:, 0]
    tokens = history.genesis.rows_per_step * history.genesis.sequence_length if history.has_genesis else None
    with np.errstate(divide="ignore", invalid="ignore"):
        waiting_P = curve.mean_PC[:, 1] / seconds_P
        rate = None if tokens is None else {
            "mean": plain(tokens / seconds_P), "low": plain(tokens / curve.high_PC[:, 0]),
            "high": plain(tokens / curve.low_PC[:, 0]),
        }  # fmt: skip
    return {
        "steps": curve.step_P.tolist(),
        "seconds": _band(curve, 0),
        "wait_seconds": _band(curve, 1),
        "waiting": plain(waiting_P, 4),
        "tokens_per_second": rate,
        "lr": plain(curve.mean_PC[:, 2]),
        "grad_norm": _band(curve, 3),
        "peak_memory_bytes": (view.metrics.end or {}).get("peak_memory_bytes"),
    }


def _band(curve: Curve, column: int) -> Tree:
    """Mean and extremes of one column."""
    parts = {"mean": curve.mean_PC, "low": curve.low_PC, "high": curve.high_PC}
    return {name: plain(part_PC[:, column]) for name, part_PC in parts.items()}


def figures(view: RunView) -> Tree:
    """All figures of a run that keeps no journal, such as a preference run, by name."""
    curves = {}
    for name, buckets in view.metrics.figures.items():
        curve = buckets.curve(POINTS)
        curves[name] = {"steps": curve.step_P.tolist(), **_band(curve, 0)}
    return {"curves": curves}


PANELS: dict[str, Callable[[RunView], Tree]] = {
    "summary": summary, "mixture": mixture, "losses": losses, "timeline": timeline, "policy": policy,
    "weighting": weighting, "throughput": throughput, "figures": figures,
}  # fmt: skip
