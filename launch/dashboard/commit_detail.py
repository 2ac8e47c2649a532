"""What one commit changed, by whom and why; what one entry of the journal holds."""

from __future__ import annotations

from typing import Any

from mixwright.data_mixing.entry_file import read_entry
from mixwright.data_mixing.errors import ConfigError, MixingError, nearest
from mixwright.data_mixing.run_status import entry_record
from mixwright.launch.dashboard.panels import weighting_words
from mixwright.launch.dashboard.run_view import RunView
from mixwright.launch.dashboard.series import plain

MOST_CHANGES = 10


def commit_detail(view: RunView, lsn: int) -> dict[str, Any]:
    """The policy of entry `lsn`, and the shares right before its effective step and at it. Raises ConfigError."""
    with view.lock:
        history, plan = view.journal.history, view.journal.plan
        commit = next((commit for commit in reversed(history.commits) if commit.lsn == lsn), None)
    if commit is None or plan is None:
        known = (str(commit.lsn) for commit in history.commits[-100:])
        raise ConfigError(f"policy {lsn} was not committed{nearest(str(lsn), known)}")
    step, policy = commit.effective_step, commit.policy
    after_G = plan.proportions(step)
    try:
        before_G = plan.proportions(step - 1) if step > 0 else after_G * 0
    except MixingError:  # nothing was in force before
        before_G = after_G * 0
    names = [domain.name for domain in history.genesis.domains]
    order = sorted(range(len(names)), key=lambda index: -abs(after_G[index] - before_G[index]))[:MOST_CHANGES]
    changes = [[names[i], *plain([before_G[i], after_G[i]], 4)] for i in order if after_G[i] != before_G[i]]
    weighting = weighting_words(policy.loss_weighting) if policy.loss_weighting else ""
    return {"lsn": lsn, "step": step, "kind": str(policy.document.get("kind", "?")), "author": policy.author,
            "why": policy.why, "changes": changes, "more": int((after_G != before_G).sum()) - len(changes),
            "weighting": weighting, "decision": policy.decision_lsn}  # fmt: skip


def entry_detail(view: RunView, lsn: int) -> dict[str, Any]:
    """The entry as it stands in the journal. Raises ConfigError when there is none of this number."""
    last = view.journal.history.last_lsn
    entry = read_entry(view.run_dir / "journal", lsn, None) if 0 <= lsn <= last else None
    if entry is None:
        raise ConfigError(f"entry {lsn} does not exist; the journal has entries 0 to {last}")
    return entry_record(entry)
