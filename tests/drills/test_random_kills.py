"""Kills without end: the run that is killed at random moments reads what the run that is never killed reads."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.drills.drill_run import DrillRun
from tests.drills.drill_service import Service
from tests.drills.random_kills import (
    STEPS_PER_CYCLE,
    RandomKills,
    assert_each_policy_counts_once,
    blows,
    record,
)
from tests.drills.undisturbed import References, assert_as_undisturbed, final_losses

LOSS_AGREES = 0.02
"""Thousands of steps after a stretch on two ranks: differences in rounding have grown by then."""
pytestmark = [pytest.mark.drill, pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(0)]


def test_random_kills(
    make_run: Callable[..., DrillRun], references: References, record_property: Callable[[str, Any], None]
) -> None:
    """DRILL_CYCLES times (default 3), seeded by DRILL_SEED: kill -9 of a rank, the leader, the launcher, the
    controller, Ray's GCS or raylet, the service's host, or all at once, while training or starting; policies are
    submitted meanwhile.

    Promised: no row lost, doubled or out of order; each policy counts once; no step later than HANG_S; nothing is
    repaired by hand. Kills move commits, so the undisturbed run has the policies at the steps where this journal says.
    """
    seed, cycles = int(os.environ.get("DRILL_SEED", "1")), int(os.environ.get("DRILL_CYCLES", "3"))
    run = make_run(
        policies=(), training__num_steps=STEPS_PER_CYCLE * cycles + 100, mixing__service="auto", optimizer__lr=2e-3
    )
    kills, outcomes, began = RandomKills(run, print), [], time.monotonic()
    try:
        drawn = blows(seed, cycles + 1)
        for number, (blow, following) in enumerate(itertools.pairwise(drawn), 1):
            outcomes.append(outcome := kills.cycle(blow, following.num_ranks))
            print(f"{time.monotonic() - began:6.0f} s  cycle {number:3}: {outcome}", flush=True)
        kills.finish()
    finally:
        for submission in kills.submissions:
            submission.give_up()
        Service(run.run_dir).down()
    assert_each_policy_counts_once(run, kills.submissions)
    assert_as_undisturbed(run, references.of(run), same_ranks=False, rel=LOSS_AGREES)
    found, expected = final_losses(run.run_dir), final_losses(references.of(run))
    difference = max(abs(found[name] / expected[name] - 1) for name in expected)
    figures = record(outcomes) | {"policies": len(kills.submissions)}
    figures["loss_difference"] = f"{difference:.1e}"
    for name, value in figures.items():
        record_property(name, f"{value:.1f}" if isinstance(value, float) else value)
    print(figures)
