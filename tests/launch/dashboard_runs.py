"""Runs to look at with the dashboard: hostile texts, an online policy's real decisions, weights, a row log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.errors import PolicyRejected
from mixwright.data_mixing.journal import Journal
from mixwright.data_mixing.leader import commit_body
from mixwright.data_mixing.prepare import prepare
from mixwright.data_mixing.store import TokenStore
from mixwright.launch.dashboard.panels import PANELS
from mixwright.launch.dashboard.run_view import RunView
from mixwright.pretrain.row_log import RowLossLog, row_log_folder
from mixwright.pretrain.rundir import write_resolved_config
from tests.data_mixing.corpora_for_tests import corpora_config, write_jsonl
from tests.data_mixing.live_run import ROWS, ControllerThread, LiveRun
from tests.data_mixing.test_rounds import history_of
from tests.pretrain.tiny import tiny_config

PWN = '<script>window.pwned=1</script><img src=x onerror="window.pwned=1"><svg onload="window.pwned=1">'
HOSTILE = f"{PWN} \x1b[31mred \u202edir \u200f\u2066 [bold]x[/bold] {{{{7*7}}}} javascript:window.pwned=1"
"""What somebody else may write into a document or a reason."""

NUM_STEPS = 120
AIOLI = {"kind": "aioli", "variant": "paper", "sweeps": 1, "sweep_steps": 2, "round_steps": 20, "one_hot_factor": 0.75}


def hostile_store(folder: Path) -> Path:
    """A token store of three domains whose documents are full of markup, made by the real preparation."""
    domains: dict[str, Any] = {}
    for index, name in enumerate(("code", "web", "wiki")):
        texts = [f"{index}-{i} {HOSTILE} word {i * 7 % 13} and {i * 5 % 11}" for i in range(90 - 20 * index)]
        domains[name] = {"paths": [str(write_jsonl(folder / f"{name}.jsonl", texts))]}
    prepare(corpora_config(folder / "store", domains), folder)
    return folder / "store"


def write_run(folder: Path, store_folder: Path, name: str = "live", num_steps: int = NUM_STEPS) -> Path:
    """A run that trained `num_steps` steps under a deciding `aioli`, with a refused policy, a shadow and a rollback."""
    config = tiny_config(folder, store_folder, run__name=name)
    run_dir = config.run_dir
    run_dir.mkdir(parents=True)
    write_resolved_config(run_dir, config)
    live = LiveRun(run_dir / "journal", TokenStore.open(store_folder), NUM_STEPS, AIOLI, report_every=5)
    with ControllerThread(live.folder) as controller:
        live.run(end_step=20)
        for document in ({"kind": "static", "mixture": {HOSTILE: 1}, "author": HOSTILE}, {"kind": HOSTILE}):
            try:
                controller.call("submit", document)
            except PolicyRejected:
                continue
            raise AssertionError("a policy for no domain was taken")
        controller.call("submit", {"kind": "odm", "round_steps": 15, "shadow": True, "author": "ben", "why": PWN})
        live.run(20, num_steps)
    _commit_by_hand(run_dir, num_steps)
    write_metrics(run_dir, num_steps)
    with RowLossLog(row_log_folder(run_dir), rank=0, attempt=0) as log:
        for step in range(num_steps):
            positions = np.arange(ROWS)
            log.add(step, positions, 2 + positions / 10 + step / 1000, positions / positions.mean())
    return run_dir


def _commit_by_hand(run_dir: Path, num_steps: int) -> None:
    """A policy with weights and a cap, in force near the end, whose reason is hostile."""
    journal, history = Journal(run_dir / "journal", writer="leader"), history_of(run_dir / "journal")
    document = {"kind": "static", "mixture": {"code": 3, "web": 1}, "author": "ann", "why": PWN,
                "caps": {"code": {"max_epochs": 1000}}, "loss_weighting": {"r": 0.4}}  # fmt: skip
    lsn = journal.append(accept(document, history.genesis, history=history)).lsn
    history = history_of(run_dir / "journal")
    step = max(num_steps - 10, max(commit.effective_step for commit in history.commits) + 1)
    journal.append(commit_body(history, lsn, history.policies[lsn], step))


def write_metrics(run_dir: Path, num_steps: int, first_step: int = 0) -> None:
    """Step and weight records, appended."""
    edges = [0.25, 0.5, 1.0, 2.0]
    with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for step in range(first_step + 1, num_steps + 1):
            values = {"lr": 1e-3, "grad_norm": 1 + 1 / step, "step_seconds": 0.5, "wait_seconds": 0.001, "policy": 2}
            file.write(json.dumps({"kind": "step", "step": step, **values}) + "\n")
            if step % 5 == 0:
                shares = {"code": 0.5, "web": 0.3, PWN: 0.2}
                weights = {"effective_sample_size": 0.8, "weight_share": shares, "token_share": shares,
                           "correlation": None, "histogram": {"edges": edges, "counts": [1, 2, 5, 3, 1]}}  # fmt: skip
                file.write(json.dumps({"kind": "weights", "step": step, **weights}) + "\n")


def write_preference_run(run_dir: Path, num_steps: int = 30) -> Path:
    """The metrics of a preference run, which keeps no journal."""
    run_dir.mkdir(parents=True)
    with (run_dir / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, num_steps + 1):
            step_values = {"lr": 1e-4, "grad_norm": 1.0, "step_seconds": 0.2}
            file.write(json.dumps({"kind": "step", "step": step, **step_values}) + "\n")
            figures = {
                "loss": {"preference": 0.7 - step / 100, "sft": 0.0},
                "rewards": {"chosen": step / 50, "rejected": -step / 50, "margin": step / 25, "accuracy": 0.5},
                "logp": {"chosen": -20.0, "rejected": -25.0},
            }
            file.write(json.dumps({"kind": "train", "step": step, **figures}) + "\n")
            if step % 10 == 0:
                evaluation = {**figures, "divergence": {"kl": step / 10, PWN: 1.0}}
                file.write(json.dumps({"kind": "evaluation", "step": step, **evaluation}) + "\n")
        file.write(json.dumps({"kind": "end", "step": num_steps, "peak_memory_bytes": 1 << 30}) + "\n")
    return run_dir


def view_of(run_dir: Path) -> RunView:
    """The run's files read to their end, without a server."""
    view = RunView(run_dir)
    while view.advance():
        pass
    return view


def built(view: RunView, name: str) -> Any:
    return json.loads(view.panel(name, PANELS[name])[1])
