"""Files of a run that somebody writes to while it trains: those of the token store, and the journal's next entry."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mixwright.data_mixing.entry_file import entry_numbers, entry_path
from tests.data_mixing.live_run import wait_until
from tests.drills.drill_run import DrillRun, Job
from tests.drills.undisturbed import References, assert_as_undisturbed, final_losses
from tests.pretrain.jobs import digests, mixwright

pytestmark = [pytest.mark.drill, pytest.mark.long]

MakeRun = Callable[..., DrillRun]


@pytest.fixture
def store(tiny_store: Path, tmp_path: Path) -> Path:
    """A token store of this run's own."""
    return shutil.copytree(tiny_store, tmp_path / "store")


def other_rows(path: Path) -> bytes:
    """Of the same form and size: what a store made from other text would hold."""
    content = bytearray(path.read_bytes())
    middle = slice(len(content) // 4, len(content) // 2)
    content[middle] = bytes(byte ^ 1 for byte in content[middle])
    return bytes(content)


def write_into(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(other_rows(path))


def cut(path: Path) -> None:
    os.truncate(path, 100)


def replace(path: Path) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(other_rows(path))
    part.replace(path)


def refusal(job: Job) -> str:
    """The one line with which a job must have ended, with exit code 2."""
    code, output = job.finish()
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert (code, len(errors), "Traceback" in output) == (2, 1, False), output[-3000:]
    return errors[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [(write_into, "its content is not what the manifest recorded"), (cut, "100 bytes, the manifest recorded ")],
    ids=["other rows", "cut"],
)
def test_a_row_file_is_written_into_while_it_is_read(
    make_run: MakeRun, references: References, store: Path, damage: Callable[[Path], None], message: str
) -> None:
    """A file of the token store gets other rows in place, or is cut, while the ranks have it mapped.

    Promised: no step is trained with other rows, and no process ends by SIGBUS: one line names the file, again when the
    same command is tried, and with the file restored it goes on.
    """
    run = make_run(data__store=str(store))
    job = run.begin(step_s=0.05)
    job.wait_for_step(32)
    path = store / "letters" / "train-00000.arrow"
    backup = path.read_bytes()
    damage(path)
    assert refusal(job).startswith(f"error: {path}: {message}")
    assert refusal(run.start()).startswith(f"error: {path}: {message}")
    path.write_bytes(backup)
    assert "resuming after step" in run.start().succeed()
    assert_as_undisturbed(run, references.of(run))


def test_a_row_file_is_replaced_while_it_is_read(make_run: MakeRun, references: References, store: Path) -> None:
    """A file of the token store is replaced, by rename, with one of the same size and other rows.

    Promised: the job that has the old one mapped reads it on; the next attempt refuses the new one.
    """
    run = make_run(data__store=str(store))
    job = run.begin(step_s=0.05)
    job.wait_for_step(32)
    path = store / "letters" / "train-00000.arrow"
    backup = path.read_bytes()
    replace(path)
    job.wait_for_step(run.last_step() + 30)
    job.kill()
    assert refusal(run.start()).startswith(f"error: {path}: its content is not what the manifest recorded")
    path.write_bytes(backup)
    assert "resuming after step" in run.start().succeed()
    assert_as_undisturbed(run, references.of(run))


def put_garbage(run: DrillRun) -> Path:
    """A torn file under the number that the journal's next entry wants."""
    journal = run.run_dir / "journal"
    part = run.folder / "garbage"
    while True:
        path = entry_path(journal, entry_numbers(journal)[-1] + 1)
        part.write_bytes(b'{"entry":{"body":{"at_step":50,"caps":{},"doc')
        try:
            os.link(part, path)  # never over an entry that the job has just written
        except FileExistsError:
            continue
        finally:
            part.unlink()
        return path


def test_something_torn_stands_where_the_next_entry_belongs(make_run: MakeRun, references: References) -> None:
    """At step 32 a torn file appears under the number of the journal's next entry; it is removed twenty steps later.

    Promised: training goes on under what is committed, a line names the file, and what could not be written meanwhile
    is in the journal afterwards.
    """
    run = make_run()
    job = run.begin(step_s=0.1)
    job.wait_for_step(32)
    path = put_garbage(run)
    step = run.last_step()
    job.wait_for_step(step + 20)
    assert entry_numbers(run.run_dir / "journal")[-1] == int(path.stem)
    path.unlink()
    run.speed_up()
    assert f"{path}: is not a complete journal entry (45 bytes): torn, or not written by us" in job.succeed()
    assert_as_undisturbed(run, references.of(run))
    assert [commit.effective_step for commit in run.history().commits] == [0, 41, 85]


def test_something_torn_stays_where_the_next_entry_belongs(make_run: MakeRun, references: References) -> None:
    """As above, and it stays there: to the end of this attempt, and when the same command is tried again.

    Promised: the steps are trained and their checkpoints are whole; the job ends with one line that names the file.
    Once it is removed the same command ends the run, without the losses that the lost attempt had to tell.
    """
    run = make_run()
    job = run.begin()
    wait_until(lambda: len(run.history().commits) == 3)
    path = put_garbage(run)
    message = f"error: {path}: is not a complete journal entry (45 bytes)"
    assert refusal(job).startswith(message)
    assert refusal(run.start()).startswith(message)
    path.unlink()
    assert f"resuming after step {run.num_steps} " in run.start().succeed()
    reference = references.of(run)
    assert (digests(run.run_dir), final_losses(run.run_dir)) == (digests(reference), final_losses(reference))
    assert mixwright("mix", "log", "--verify", "--run", str(run.run_dir)).returncode == 0
