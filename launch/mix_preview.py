"""What a policy would do if it were submitted now: `mix submit --dry-run` and the dashboard's preview."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.deciding import cost_remarks
from mixwright.data_mixing.forecast import Forecast, MixtureChange, expected_plan, forecast, mixture_change, remarks
from mixwright.data_mixing.history import RunHistory


@dataclass(frozen=True)
class Preview:
    """`step` is an estimate of the effective step; `forecast` goes from there to the run's end."""

    step: int
    changes: list[MixtureChange]
    forecast: Forecast
    remarks: list[str]


def preview_of(history: RunHistory, document: dict[str, Any]) -> Preview:
    """The mixture beside the one in force, the forecast, and remarks. Raises PolicyRejected as a submission would."""
    genesis, lsn = history.genesis, history.last_lsn + 1
    before = expected_plan(genesis, history)
    policy = accept(document, genesis, history=history)
    after = expected_plan(genesis, history, (lsn, policy))
    step = next(commit.effective_step for commit in after.commits if commit.lsn == lsn)
    return Preview(
        step=step,
        changes=mixture_change(before, after, step),
        forecast=forecast(after, step, genesis.num_steps),
        remarks=remarks(after, lsn) + cost_remarks(policy, genesis),
    )
