"""The wall clock of a run is set to another time while it trains."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from mixwright.data_mixing.journal import Entry, read_entries
from mixwright.data_mixing.run_figures import RunFollower
from tests.data_mixing.live_run import wait_until
from tests.drills.drill_run import DrillRun
from tests.drills.drill_service import STEP_S, Service, Submission, end, longest_step_s, slow_run
from tests.drills.preloaded import build_library
from tests.drills.undisturbed import References

pytestmark = [pytest.mark.drill, pytest.mark.ray, pytest.mark.long]

HOUR_S, DAY_S = 3600, 86400


@dataclass(frozen=True)
class WallClock:
    """The clock of the processes that are started with `environment`."""

    library: Path
    file: Path

    @property
    def environment(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self.library), "DRILL_CLOCK": str(self.file)}

    def set(self, offset_s: int) -> None:
        """From now on it is off by that much."""
        with self.file.open("r+b") as file:
            file.write(struct.pack("=q", offset_s))


@pytest.fixture
def clock(tmp_path: Path) -> WallClock:
    file = tmp_path / "clock"
    file.write_bytes(bytes(8))
    return WallClock(build_library("clock_fault.c", tmp_path), file)


def test_the_wall_clock_jumps(
    make_run: Callable[..., DrillRun], serve: Callable[..., Service], references: References, clock: WallClock
) -> None:
    """The clock of job, host, controller and Ray is set an hour ahead, a day back and an hour ahead again; after each
    a policy is sent, and before the last the controller is killed.

    Promised: each policy counts once, leases hold, no step waits, and the time that is left is told from the steps.
    """
    run = slow_run(make_run, mixing__report_every=2)
    job = run.start(step_s=STEP_S, **clock.environment)
    service = serve(run, job, **clock.environment)
    began, sent = run.last_step() + 1, []
    for offset_s, domain in ((HOUR_S, "letters"), (-DAY_S, "numbers"), (HOUR_S, "colours")):
        clock.set(offset_s)
        if len(sent) == 2:
            assert service.kill("controller")
        sent.append(Submission(run.run_dir, {"kind": "static", "mixture": {domain: 1}}))
        sent[-1].wait(60)
        wait_until(lambda: len(run.history().commits) == 1 + len(sent))
    job.wait_for_step(run.last_step() + 12)
    assert service.is_up()
    pace = RunFollower(run.run_dir / "journal").pace.steps_per_s
    assert pace is not None
    assert 0.2 / STEP_S < pace < 1.5 / STEP_S
    end(run, job, references)
    assert [len(service.policies_of(submission.request_id)) for submission in sent] == [1, 1, 1]
    assert longest_step_s(run, began, run.num_steps) < 5
    entries = read_entries(run.run_dir / "journal")
    assert {jumps(entries, writer) for writer in ("leader", "controller")} == {3}


def jumps(entries: list[Entry], writer: str) -> int:
    """How often the clock of one side was set, by the times of its entries."""
    times = [entry.time for entry in entries if entry.writer.startswith(writer)]
    return sum(abs(after - before) > HOUR_S / 2 for before, after in pairwise(times))
