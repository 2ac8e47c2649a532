"""Entries of the journal of a real run that are torn, altered or gone when it goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mixwright.data_mixing.entry_file import entry_numbers, entry_path
from tests.drills.drill_run import DrillRun
from tests.drills.undisturbed import References, assert_as_undisturbed
from tests.pretrain.jobs import mixwright

pytestmark = [pytest.mark.drill, pytest.mark.long]

MakeRun = Callable[..., DrillRun]


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))


def tear(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "altered": (flip_a_bit, "it was altered"),
    "torn": (tear, "is not a complete journal entry"),
    "missing": (Path.unlink, "entry is missing"),
}


def test_a_damaged_entry_is_refused_and_the_restored_journal_goes_on(make_run: MakeRun, references: References) -> None:
    """The run is killed; an old entry has a flipped bit, is cut in half, or is gone; then the backup is put back.

    Promised: exit code 2 and one line that names the file, as does `mix log --verify`, and nothing is written; with the
    entry restored the same command goes on as if nothing had happened.
    """
    run = make_run()
    job = run.begin()
    job.wait_for_step(30)
    job.kill()
    journal = run.run_dir / "journal"
    path, numbers = entry_path(journal, 4), entry_numbers(journal)
    backup = path.read_bytes()
    for damage, message in DAMAGE.values():
        damage(path)
        code, output = run.start().finish()
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert (code, len(errors), "Traceback" in output) == (2, 1, False), output[-3000:]
        assert f"{path.name}: " in errors[0]
        assert message in errors[0]
        assert message in (audited := mixwright("mix", "log", "--verify", "--run", str(run.run_dir))).stderr
        assert audited.returncode != 0
        path.write_bytes(backup)
        assert entry_numbers(journal) == numbers
    run.start().succeed()
    assert_as_undisturbed(run, references.of(run))
