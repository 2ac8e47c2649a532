"""Storage that fails under a running job: the journal's, and that of checkpoints."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mixwright.data_mixing.entry_file import entry_numbers
from tests.drills.drill_run import DrillRun
from tests.drills.preloaded import build_library
from tests.drills.undisturbed import References, assert_as_undisturbed

pytestmark = pytest.mark.drill

MakeRun = Callable[..., DrillRun]
ERRORS = pytest.mark.parametrize("number", [errno.ENOSPC, pytest.param(errno.EIO, marks=pytest.mark.long)])
OUTAGE_STEPS = 20


@dataclass(frozen=True)
class FailingStorage:
    """A library that makes writing fail below a folder of a job while it is switched on."""

    library: Path
    switch: Path

    def below(self, folder: Path) -> dict[str, str]:
        """Environment of a job whose storage below `folder` can fail."""
        names = {"DRILL_FAULT_BELOW": str(folder), "DRILL_FAULT_SWITCH": str(self.switch)}
        return {"LD_PRELOAD": str(self.library), **names}

    def fail(self, number: int) -> None:
        """From now on with this error number."""
        part = self.switch.with_suffix(".part")
        part.write_text(str(number))
        part.replace(self.switch)

    def recover(self) -> None:
        self.switch.unlink()


@pytest.fixture
def storage(tmp_path: Path) -> FailingStorage:
    return FailingStorage(build_library("storage_fault.c", tmp_path), tmp_path / "fault")


@ERRORS
def test_the_journal_cannot_be_written_for_a_while(
    make_run: MakeRun, references: References, storage: FailingStorage, number: int
) -> None:
    """ENOSPC or EIO on every write to the journal for twenty steps of training, then none.

    Promised: training goes on meanwhile, what it had to say is in the journal afterwards, no commit moves.
    """
    run = make_run()
    job = run.begin(step_s=0.1, **storage.below(run.run_dir / "journal"))
    job.wait_for_step(25)
    storage.fail(number)
    time.sleep(0.3)  # an entry that was under way
    before, step = entry_numbers(run.run_dir / "journal"), run.last_step()
    job.wait_for_step(step + OUTAGE_STEPS)
    assert entry_numbers(run.run_dir / "journal") == before
    storage.recover()
    run.speed_up()
    assert f"entry cannot be written: {os.strerror(number)}" in job.succeed()
    assert_as_undisturbed(run, references.of(run))
    assert [commit.effective_step for commit in run.history().commits] == [0, 41, 85]


@pytest.mark.long
@ERRORS
def test_a_checkpoint_cannot_be_written(
    make_run: MakeRun, references: References, storage: FailingStorage, number: int
) -> None:
    """ENOSPC or EIO on every write of a checkpoint from step 32 on; afterwards there is room again.

    Promised: exit code 2 and one line; earlier checkpoints stay; the same command goes on and ends as if nothing was.
    """
    run = make_run()
    job = run.begin(step_s=0.05, **storage.below(run.run_dir / "checkpoints"))
    job.wait_for_step(32)
    storage.fail(number)
    code, output = job.finish()
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert (code, len(errors), "Traceback" in output) == (2, 1, False), output[-3000:]
    assert "the checkpoint cannot be written" in errors[0]
    storage.recover()
    assert "resuming after step" in run.start().succeed()
    assert_as_undisturbed(run, references.of(run))
