"""Checkpoints that are half written, or damaged after they were written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mixwright.pretrain.checkpoint import SEAL
from tests.drills.drill_run import DrillRun
from tests.drills.preloaded import build_library
from tests.drills.test_journal_faults_live import flip_a_bit, tear
from tests.drills.undisturbed import References, assert_as_undisturbed

pytestmark = pytest.mark.drill

MakeRun = Callable[..., DrillRun]
Dying = Callable[[Path, int], dict[str, str]]
MODEL = "mp_rank_00_model_states.pt"
STEP_40 = "step-00000040"


@pytest.fixture
def dying(tmp_path: Path) -> Callable[[Path, int], dict[str, str]]:
    """`dying(path, n)`: environment of a job that ends by SIGKILL inside a write, after n bytes of what begins so."""
    library = build_library("storage_fault.c", tmp_path)

    def environment(below: Path, after: int) -> dict[str, str]:
        return {"LD_PRELOAD": str(library), "DRILL_FAULT_BELOW": str(below), "DRILL_KILL_AFTER": str(after)}

    return environment


def test_killed_while_a_checkpoint_is_written(make_run: MakeRun, references: References, dying: Dying) -> None:
    """kill -9 inside the write of the model at step 40, when 150,000 bytes of it are on disk.

    Promised: what is half written is no checkpoint and is gone after the next; the run goes on from the one before.
    """
    run = make_run()
    folder = run.run_dir / "checkpoints"
    job = run.begin(**dying(folder / STEP_40 / MODEL, 150_000))
    assert job.finish()[0] == -9
    whole = (folder / "step-00000030" / MODEL).stat().st_size
    assert 100_000 < (folder / STEP_40 / MODEL).stat().st_size < whole
    output = run.start().succeed()
    assert "resuming after step 30 " in output
    assert "damaged" not in output
    assert_as_undisturbed(run, references.of(run))
    assert not list(folder.glob(f"{STEP_40}*"))


@pytest.mark.long
def test_killed_around_the_seal_of_a_checkpoint(make_run: MakeRun, references: References, dying: Dying) -> None:
    """kill -9 before the first byte of a checkpoint, inside its seal, and between its seal and `latest`, in turn.

    Promised: before the seal it is none, behind it is one, whatever `latest` says.
    """
    run = make_run()
    folder = run.run_dir / "checkpoints"
    moments = [(folder / STEP_40 / MODEL, 0, 30), (folder / STEP_40 / f".{SEAL}", 100, 30), (folder / ".latest", 0, 40)]
    run.begin().wait_for_step(32)
    run.jobs[-1].kill()
    for below, after, step in moments:
        job = run.start(**dying(below, after))
        assert job.finish()[0] == -9
        assert max(path.parent.name for path in folder.glob(f"step-*/{SEAL}")) == f"step-{step:08d}"
    assert (folder / "latest").read_text() == "step-00000030"
    assert "resuming after step 40 " in run.start().succeed()
    assert_as_undisturbed(run, references.of(run))


@pytest.mark.long
def test_one_of_two_ranks_is_killed_while_it_writes_its_shard(
    make_run: MakeRun, references: References, dying: Dying
) -> None:
    """ZeRO 1 on two ranks; kill -9 of rank 1 inside the write of its part of the optimizer's state at step 40.

    Promised: no rank waits for it; all go on from the checkpoint before, on one rank by way of the universal format.
    """
    run = make_run(training__zero_stage=1)
    shard = run.run_dir / "checkpoints" / STEP_40 / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    job = run.begin(2, **dying(shard, 1000))
    code, output = job.finish()
    assert code != 0
    assert "return code = -9" in output
    assert (run.last_step(), run.history().checkpoints[-1].step) == (40, 30)
    assert not shard.with_name(SEAL).exists()
    assert "resuming after step 30 " in run.start().succeed()
    assert_as_undisturbed(run, references.of(run), same_ranks=False)


@pytest.mark.long
@pytest.mark.parametrize(
    ("damage", "word"),
    [(flip_a_bit, "does not hold what was written"), (tear, " bytes instead of ")],
    ids=["one bit flipped", "cut in half"],
)
def test_the_newest_checkpoint_is_damaged(
    make_run: MakeRun, references: References, damage: Callable[[Path], None], word: str
) -> None:
    """The run is killed; in the model of its newest checkpoint one bit is flipped, or its second half is gone.

    Promised: one line says so, and the run goes on from the checkpoint before, as if it were the newest.
    """
    run = make_run()
    job = run.begin()
    job.wait_for_step(45)
    job.kill()
    newest = max(path.parent for path in (run.run_dir / "checkpoints").glob(f"step-*/{SEAL}"))
    damage(newest / MODEL)
    output = run.start().succeed()
    assert f"checkpoint {newest.name} is damaged ({MODEL} " in output
    assert word in output
    assert f"resuming after step {int(newest.name[-8:]) - 10} " in output
    assert_as_undisturbed(run, references.of(run))
