"""The row log: what is written is what is read, killed and resumed runs included; the plan names its rows."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.errors import DataError
from mixwright.data_mixing.plan import Plan
from mixwright.pretrain.hard_rows import identify, last_readings, ranked
from mixwright.pretrain.row_log import RowLog, RowLossLog, read_row_log
from tests.data_mixing.run_cases import TrainerSide, genesis

ROWS = 8


def losses(step: int, positions: range, attempt: int = 0) -> np.ndarray:
    """Losses by which a row of a log can be told from every other."""
    return (10 * attempt + step + np.array(positions) / 100).astype(np.float32)


def write(log: RowLossLog, steps: range, positions: range = range(ROWS), attempt: int = 0) -> None:
    for step in steps:
        weight_n = np.array(positions, np.float32) / 4
        log.add(step, np.array(positions), losses(step, positions, attempt), weight_n)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def rows_of(log: RowLog, step: int) -> list[float]:
    return log.loss_n[log.step_n == step].tolist()


def table(**columns: np.ndarray) -> pa.Table:
    return pa.table(dict(columns))


# --- writing and reading ---------------------------------------------------------------------------------------


def test_what_ranks_write_is_read_in_order_of_step_and_position(tmp_path: Path) -> None:
    for rank in (1, 0):
        with RowLossLog(tmp_path, rank, attempt=0, flush_steps=3) as log:
            write(log, range(7), range(4 * rank, 4 * rank + 4))
    found = read_row_log(tmp_path)
    assert found.step_n.tolist() == np.repeat(np.arange(7), ROWS).tolist()
    assert found.position_n.tolist() == list(range(ROWS)) * 7
    assert found.loss_n.tolist() == np.concatenate([losses(step, range(ROWS)) for step in range(7)]).tolist()
    assert found.weight_n.tolist() == (np.arange(ROWS, dtype=np.float32) / 4).tolist() * 7
    assert [array.dtype.name for array in vars(found).values()] == ["int64", "int64", "float32", "float32"]


def test_a_file_holds_so_many_steps_and_is_named_by_its_first(tmp_path: Path) -> None:
    with RowLossLog(tmp_path, rank=2, attempt=5, flush_steps=3) as log:
        write(log, range(3))
        assert not names(tmp_path)
        write(log, range(3, 8))
        assert names(tmp_path) == [
            "step-00000000-attempt-0005-rank-00002.parquet",
            "step-00000003-attempt-0005-rank-00002.parquet",
        ]
    assert names(tmp_path)[2:] == ["step-00000006-attempt-0005-rank-00002.parquet"]


def test_a_step_may_come_in_micro_batches_and_is_not_torn(tmp_path: Path) -> None:
    with RowLossLog(tmp_path, rank=0, attempt=0, flush_steps=1) as log:
        for step in range(3):
            write(log, range(step, step + 1), range(0, 4))
            write(log, range(step, step + 1), range(4, 8))
    assert len(names(tmp_path)) == 3
    assert all(rows_of(read_row_log(tmp_path), step) == losses(step, range(ROWS)).tolist() for step in range(3))


def test_what_was_handed_over_may_be_overwritten_at_once(tmp_path: Path) -> None:
    buffer_n = np.full(ROWS, 2.0, np.float32)
    with RowLossLog(tmp_path, rank=0, attempt=0) as log:
        log.add(0, np.arange(ROWS), buffer_n, buffer_n)
        buffer_n[:] = 9.0
    assert read_row_log(tmp_path).loss_n.tolist() == [2.0] * ROWS


def test_a_log_without_rows_leaves_no_file(tmp_path: Path) -> None:
    with RowLossLog(tmp_path / "row_log", rank=0, attempt=0) as log:
        log.add(0, np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.float32))
    assert not (tmp_path / "row_log").exists()


def test_losses_that_are_not_finite_are_kept_as_they_are(tmp_path: Path) -> None:
    with RowLossLog(tmp_path, rank=0, attempt=0) as log:
        log.add(0, np.arange(2), np.array([np.nan, np.inf], np.float32), np.array([0, 1], np.float32))
    np.testing.assert_array_equal(read_row_log(tmp_path).loss_n, np.array([np.nan, np.inf], np.float32))


def test_a_row_takes_twelve_bytes_or_less_on_disk(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    with RowLossLog(tmp_path, rank=0, attempt=0) as log:
        for step in range(100):
            loss_n, weight_n = chance.normal(3, 1, 256), chance.lognormal(0, 0.5, 256)
            log.add(step, np.arange(256), loss_n.astype(np.float32), weight_n.astype(np.float32))
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size <= 12 * 100 * 256


@pytest.mark.parametrize(
    ("step", "positions", "num_losses", "message"),
    [
        (4, [0], 1, "step 4: steps come in order, this log takes rows from step 5 on"),
        (1 << 32, [0], 1, "step 4294967296: steps come in order"),
        (5, [0, 1], 1, r"step 5: expected three arrays \[n\], found shapes \[\(2,\), \(1,\), \(1,\)\]"),
        (5, [-1], 1, "step 5: positions -1 to -1 are no uint32"),
    ],
)
def test_rows_that_cannot_be_logged_are_refused(
    tmp_path: Path, step: int, positions: list[int], num_losses: int, message: str
) -> None:
    log = RowLossLog(tmp_path, rank=0, attempt=0)
    write(log, range(5, 6))
    with pytest.raises(ValueError, match=message):
        log.add(step, np.array(positions), np.zeros(num_losses, np.float32), np.zeros(num_losses, np.float32))


def test_a_step_that_was_written_takes_no_more_rows(tmp_path: Path) -> None:
    log = RowLossLog(tmp_path, rank=0, attempt=0)
    write(log, range(5))
    log.flush()
    with pytest.raises(ValueError, match="this log takes rows from step 5 on"):
        write(log, range(4, 5))


# --- kills and resumes -----------------------------------------------------------------------------------------


def test_steps_that_a_resume_does_again_count_as_done_last(tmp_path: Path) -> None:
    with RowLossLog(tmp_path, rank=0, attempt=0, flush_steps=4) as log:
        write(log, range(10))
    with RowLossLog(tmp_path, rank=0, attempt=2, flush_steps=4) as log:
        write(log, range(6, 13), attempt=2)
    found = read_row_log(tmp_path)
    assert len(found) == 13 * ROWS
    assert rows_of(found, 5) == losses(5, range(ROWS)).tolist()
    assert all(rows_of(found, step) == losses(step, range(ROWS), 2).tolist() for step in range(6, 13))


def test_one_step_is_read_as_the_whole_log_has_it(tmp_path: Path) -> None:
    for rank in (0, 1):
        mine = range(4 * rank, 4 * rank + 4)
        with RowLossLog(tmp_path, rank, attempt=0, flush_steps=3) as log:
            write(log, range(9), mine)
        with RowLossLog(tmp_path, rank, attempt=1, flush_steps=4) as log:
            write(log, range(5, 12), mine, attempt=1)
    whole = read_row_log(tmp_path)
    for step in range(14):
        found = read_row_log(tmp_path, only_step=step)
        assert rows_of(found, step) == rows_of(whole, step)
        assert len(found) == (ROWS if step < 12 else 0)


def test_one_step_opens_no_file_that_cannot_hold_it(tmp_path: Path) -> None:
    with RowLossLog(tmp_path, 0, attempt=0, flush_steps=3) as log:
        write(log, range(9))
    (tmp_path / names(tmp_path)[0]).write_bytes(b"damaged")
    assert len(read_row_log(tmp_path, only_step=4)) == ROWS
    with pytest.raises(DataError, match="not a readable row log file"):
        read_row_log(tmp_path, only_step=1)


def test_steps_beyond_a_resume_that_was_killed_itself_are_void(tmp_path: Path) -> None:
    with RowLossLog(tmp_path, rank=0, attempt=0) as log:
        write(log, range(10))
    with RowLossLog(tmp_path, rank=0, attempt=1) as log:
        write(log, range(6, 8), attempt=1)
    # Steps 8 and 9 were read under a plan and by a model that the run has left.
    assert read_row_log(tmp_path).step_n.max() == 7


def test_a_resume_on_fewer_ranks_and_a_rank_that_wrote_less_mix_no_attempts(tmp_path: Path) -> None:
    for rank in (0, 1):
        with RowLossLog(tmp_path, rank, attempt=0) as log:
            write(log, range(4), range(4 * rank, 4 * rank + 4))
    with RowLossLog(tmp_path, rank=0, attempt=1) as log:
        write(log, range(2, 4), range(2), attempt=1)
    found = read_row_log(tmp_path)
    assert [len(rows_of(found, step)) for step in range(4)] == [ROWS, ROWS, 2, 2]


def test_a_checkpoint_that_flushes_first_loses_nothing_to_a_kill(tmp_path: Path) -> None:
    program = f"""
import os, signal, sys
import numpy as np
from pathlib import Path
from mixwright.pretrain.row_log import RowLossLog
log = RowLossLog(Path({str(tmp_path)!r}), rank=0, attempt=0, flush_steps=4)
for step in range(7):
    if step == 6:
        log.flush()
    log.add(step, np.arange(8), np.full(8, step, np.float32), np.ones(8, np.float32))
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert read_row_log(tmp_path).step_n.tolist() == np.repeat(np.arange(6), 8).tolist()
    with RowLossLog(tmp_path, rank=0, attempt=1) as log:
        write(log, range(6, 8), attempt=1)
    assert read_row_log(tmp_path).step_n.tolist() == np.repeat(np.arange(8), 8).tolist()


def test_a_half_written_file_is_not_read_and_is_cleared_by_its_rank(tmp_path: Path) -> None:
    with RowLossLog(tmp_path, rank=0, attempt=0) as log:
        write(log, range(2))
    (whole,) = tmp_path.iterdir()
    parts = [tmp_path / f"step-00000002-attempt-0000-rank-0000{rank}.parquet.part" for rank in (0, 1)]
    for part in parts:
        part.write_bytes(whole.read_bytes()[:100])
    assert read_row_log(tmp_path).step_n.max() == 1
    RowLossLog(tmp_path, rank=0, attempt=1)
    assert [part.exists() for part in parts] == [False, True]


def test_a_full_disk_is_one_line_leaves_nothing_half_written_and_keeps_the_rows(tmp_path: Path) -> None:
    log = RowLossLog(tmp_path, rank=0, attempt=0)
    write(log, range(50))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(
            DataError, match=r"step-00000000-attempt-0000-rank-00000\.parquet: file too large .*free some"
        ):
            log.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []
    log.close()
    assert read_row_log(tmp_path).step_n.tolist() == np.repeat(np.arange(50), ROWS).tolist()


# --- damage ----------------------------------------------------------------------------------------------------


def test_a_folder_without_a_log_says_so(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match=f"{folder}: no row log; training writes one with"):
            read_row_log(folder)


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "noise", "no file"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    with RowLossLog(tmp_path, rank=0, attempt=0, flush_steps=20) as log:
        write(log, range(40))
    path = tmp_path / "step-00000020-attempt-0000-rank-00000.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0x10
    if damage == "no file":
        path.unlink()
        path.mkdir()
    else:
        broken = {"empty": b"", "cut": content[:-30], "flipped": content, "noise": b"PAR1" + bytes(200) + b"PAR1"}
        path.write_bytes(broken[damage])
    with pytest.raises(DataError, match=f"{path}: not a readable row log file: ") as error:
        read_row_log(tmp_path)
    assert "\n" not in str(error.value)


STEP, UP, FLOAT = np.full(2, 3, np.uint32), np.arange(2, dtype=np.uint32), np.ones(2, np.float32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (table(step=STEP), "a row log file: has columns step: uint32, expected step: uint32, position"),
        (table(step=STEP, position=STEP, loss=FLOAT.astype(float), weight=FLOAT), "has columns .*loss: double"),
        (table(step=STEP + np.uint32(1), position=STEP, loss=FLOAT, weight=FLOAT), "its 2 rows are not of steps 3 on"),
        (table(step=STEP[:0], position=STEP[:0], loss=FLOAT[:0], weight=FLOAT[:0]), "its 0 rows are not of steps 3"),
        (table(step=STEP - UP, position=STEP, loss=FLOAT, weight=FLOAT), "its 2 rows are not of steps 3 on"),
    ],
)
def test_a_file_of_something_else_is_named(tmp_path: Path, content: pa.Table, message: str) -> None:
    path = tmp_path / "step-00000003-attempt-0000-rank-00000.parquet"
    pq.write_table(content, path)
    with pytest.raises(DataError, match=f"{path}: not .*{message}"):
        read_row_log(tmp_path)


def test_nulls_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "step-00000003-attempt-0000-rank-00000.parquet"
    loss = pa.array([1.0, None], pa.float32())
    pq.write_table(pa.table({"step": STEP, "position": STEP, "loss": loss, "weight": FLOAT}), path)
    with pytest.raises(DataError, match=f"{path}: not a row log file: .* without nulls"):
        read_row_log(tmp_path)


def test_a_row_that_two_ranks_claim_is_refused(tmp_path: Path) -> None:
    for rank in (0, 1):
        with RowLossLog(tmp_path, rank, attempt=0) as log:
            write(log, range(2), range(4 + rank))
    with pytest.raises(DataError, match="two files have the row of step 0, position 0"):
        read_row_log(tmp_path)


# --- what the rows are -----------------------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """A plan of 60 steps of 8 rows that reads two small domains several times and changes its mixture at step 20."""
    run = genesis(num_steps=60, sizes={"wiki": 40, "code": 25})
    trainer = TrainerSide(tmp_path / "exp", run)
    lsn = trainer.journal.append(accept({"kind": "static", "mixture": {"code": 3, "wiki": 1}}, run)).lsn
    trainer.commit(lsn, 20)
    return trainer.read().plan()


def logged(plan: Plan, steps: range, positions: range = range(ROWS)) -> RowLog:
    """A log of these steps with losses that look random."""
    step_n = np.repeat(np.array(steps, np.int64), len(positions))
    position_n = np.tile(np.array(positions), len(steps))
    chance = np.random.default_rng(1)
    loss_n = chance.normal(3, 1, len(step_n)).astype(np.float32)
    return RowLog(step_n, position_n, loss_n, chance.uniform(0, 2, len(step_n)).astype(np.float32))


def test_a_logged_row_is_the_row_that_the_plan_has_at_its_position(plan: Plan) -> None:
    log = logged(plan, range(15, 30), range(3, 7))
    rows = identify(log, plan)
    for step in range(15, 30):
        refs, mine = plan.rows(step, range(3, 7)), log.step_n == step
        assert rows.domain_n[mine].tolist() == refs.domain_n.tolist()
        assert rows.epoch_n[mine].tolist() == refs.epoch_n.tolist()
        assert rows.row_n[mine].tolist() == refs.row_n.tolist()


def test_a_row_of_several_epochs_appears_once_as_read_last_with_its_count(plan: Plan) -> None:
    log = logged(plan, range(60))
    rows = identify(log, plan)
    seen: dict[tuple[int, int], list[int]] = {}
    for i, key in enumerate(zip(rows.domain_n.tolist(), rows.row_n.tolist(), strict=True)):
        seen.setdefault(key, []).append(i)
    last = sorted(indices[-1] for indices in seen.values())
    found = last_readings(rows)
    assert max(map(len, seen.values())) > 5
    assert found.log.loss_n.tolist() == log.loss_n[last].tolist()
    assert found.num_seen_n.tolist() == [
        len(seen[key]) for key in zip(rows.domain_n[last].tolist(), rows.row_n[last].tolist(), strict=True)
    ]


def test_rankings_are_by_brute_force(plan: Plan) -> None:
    log = logged(plan, range(10))
    log.loss_n[[5, 6, 7]], log.loss_n[[20, 30]], log.weight_n[7] = [np.nan, np.inf, -np.inf], 1.25, np.nan
    rows = identify(log, plan)
    finite = [i for i in range(len(log)) if np.isfinite(log.loss_n[i])]
    lighter = [i for i in range(len(log)) if log.weight_n[i] < 0.9999]
    expected = {
        "highest": sorted(finite, key=lambda i: -float(log.loss_n[i])),
        "lowest": sorted(finite, key=lambda i: float(log.loss_n[i])),
        "down-weighted": sorted(lighter, key=lambda i: float(log.weight_n[i])),
    }
    for by, order in expected.items():
        for count in (12, 1000):
            found = ranked(rows, by, count)
            assert found.log.step_n.tolist() == log.step_n[order[:count]].tolist()
            assert found.log.position_n.tolist() == log.position_n[order[:count]].tolist()


def test_rounding_is_not_a_lower_weight(plan: Plan) -> None:
    log = logged(plan, range(2))
    log.weight_n[:] = np.nextafter(np.float32(1), np.float32(0))
    assert len(ranked(identify(log, plan), "down-weighted", 10)) == 0


@pytest.mark.parametrize(("step", "position"), [(60, 0), (3, 8)])
def test_the_log_of_another_run_is_refused(plan: Plan, step: int, position: int) -> None:
    log = logged(plan, range(step, step + 1), range(position, position + 1))
    message = f"step {step}, position {position}, but run 'exp' has 60 steps of 8 rows"
    with pytest.raises(DataError, match=message):
        identify(log, plan)


def test_nothing_is_identified_as_nothing(plan: Plan) -> None:
    assert len(last_readings(identify(logged(plan, range(0)), plan))) == 0


def test_a_log_whose_folder_is_a_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "row_log").write_text("not a folder")
    log = RowLossLog(tmp_path / "row_log", rank=0, attempt=0)
    log.add(0, np.arange(2), np.ones(2, np.float32), np.ones(2, np.float32))
    with pytest.raises(DataError, match=r"row_log.*cannot be written"):
        log.flush()
