"""What a run tells of itself: the SFT weight in every convention, figures before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixwright.pretrain.ensemble.member import EXPORT
from mixwright.pretrain.metrics import read_metrics
from mixwright.pretrain.progress import Watcher
from mixwright.pretrain.rpo.config import RpoConfig
from mixwright.pretrain.rpo.evaluate import SAMPLES
from mixwright.pretrain.rpo.groups import BASE
from mixwright.pretrain.rpo.objective import equivalents, sft_term
from mixwright.pretrain.rpo.preferences import Preferences

SHOWN = (
    ("preference loss", ("loss", "preference")),
    ("accuracy", ("rewards", "accuracy")),
    ("AUC", ("rewards", "auc")),
    ("margin", ("rewards", "margin")),
    ("log p chosen", ("logp", "chosen")),
    ("log p rejected", ("logp", "rejected")),
    ("entropy per token", ("entropy_per_token",)),
    ("KL to the reference", ("divergence", "kl")),
    ("its standard error", ("divergence", "kl_stderr")),
)
"""Rows of the closing table, and where they are in an evaluation."""


def show_conventions(config: RpoConfig, preferences: Preferences, watcher: Watcher) -> None:
    """The SFT weight as each convention would write it: 0.005 means different things in different libraries."""
    term = sft_term(config.objective)
    if term is None:
        watcher.say(f"objective: {config.objective.loss}, beta {config.objective.beta:g}, no SFT term")
        return
    lengths = preferences.base.lengths if preferences.base is not None else preferences.train.lengths[:, 1]
    mean_length = float(lengths.mean())
    base = "samples of the reference" if term.place == BASE else "chosen completions"
    title = f"SFT term on {base}, mean length {mean_length:.1f} tokens, beta {config.objective.beta:g}"
    rows = [[name, f"{value:.6g}"] for name, value in equivalents(config.objective, mean_length).items()]
    watcher.table(title, ["convention", "value"], rows)


def show_results(config: RpoConfig, watcher: Watcher) -> None:
    """Held-out figures before and after, and where everything is."""
    found = [record for record in read_metrics(config.run_dir) if record["kind"] == "evaluation"]
    if found:
        before, after = found[0], found[-1]
        header = ["held-out pairs", f"before (step {before['step']})", f"after (step {after['step']})"]
        rows = [[name, _number(before, path), _number(after, path)] for name, path in SHOWN]
        watcher.table("before and after", header, [row for row in rows if row[1:] != ["-", "-"]])
    if (config.run_dir / SAMPLES).is_file():
        watcher.say(f"samples: {config.run_dir / SAMPLES}")
    watcher.say(f"model:   {config.run_dir / EXPORT}  (transformers: AutoModelForCausalLM.from_pretrained)")


def _number(record: Mapping[str, Any], path: tuple[str, ...]) -> str:
    value: Any = record
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return f"{value:,.4f}" if isinstance(value, int | float) else "-"
