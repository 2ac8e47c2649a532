"""`mix hard-samples` on a run folder with a journal, a token store and a row log: the text is that of the hard rows."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.errors import ConfigError, DataError, MixingError, StoreChanged
from mixwright.data_mixing.plan import Plan
from mixwright.data_mixing.store import TokenStore
from mixwright.data_mixing.tokenizer import load_tokenizer
from mixwright.launch.hard_samples import spelt_out
from mixwright.launch.mix import app
from mixwright.pretrain.row_log import RowLossLog, row_log_folder
from mixwright.pretrain.rundir import read_history, write_resolved_config
from mixwright.pretrain.start import genesis_of
from tests.data_mixing.corpora_for_tests import random_rows, write_store
from tests.data_mixing.run_cases import TrainerSide
from tests.pretrain.tiny import tiny_config

STEPS, ROWS = 12, 8
NASTY = "[bold]x[/bold] \\[red]\x1b[31mred\nline\r\t\x07\u202edir\u2028木 [/]"


def run(*arguments: object) -> Result:
    """A command that succeeds; the error it raised otherwise."""
    result = CliRunner().invoke(app, ["hard-samples", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def rows_of(*arguments: object) -> list[dict]:
    return json.loads(run(*arguments, "--json").stdout)


def begin(folder: Path, store: Path) -> Path:
    """A run of 12 steps of 8 rows on `store` that changes its mixture at step 6: configuration and journal."""
    config = tiny_config(folder, store)
    opened = TokenStore.open(store)
    genesis = genesis_of(config, opened)
    trainer = TrainerSide(config.run_dir, genesis)
    last = opened.names[-1]
    trainer.commit(trainer.journal.append(accept({"kind": "static", "mixture": {last: 1}}, genesis)).lsn, 6)
    write_resolved_config(config.run_dir, config)
    return config.run_dir


def write_log(run_dir: Path, loss_SB: np.ndarray, weight_SB: np.ndarray, first_step: int = 0, attempt: int = 0) -> None:
    """Losses and weights [steps, rows] as two ranks log them."""
    for rank in (0, 1):
        mine = slice(4 * rank, 4 * rank + 4)
        with RowLossLog(row_log_folder(run_dir), rank, attempt, flush_steps=5) as log:
            for offset, (loss_B, weight_B) in enumerate(zip(loss_SB, weight_SB, strict=True)):
                log.add(first_step + offset, np.arange(ROWS)[mine], loss_B[mine], weight_B[mine])


def random_log(seed: int = 0, steps: int = STEPS) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(seed)
    loss_SB = chance.permutation(steps * ROWS).reshape(steps, ROWS) / 16
    return loss_SB.astype(np.float32), chance.uniform(0, 2, (steps, ROWS)).astype(np.float32)


@pytest.fixture
def run_dir(tiny_store: Path, tmp_path: Path) -> Path:
    run_dir = begin(tmp_path, tiny_store)
    write_log(run_dir, *random_log())
    return run_dir


def text_of(store: Path, domain: str, row: int) -> str:
    opened = TokenStore.open(store)
    return load_tokenizer(opened.tokenizer_folder).decode(opened.rows(domain, "train", row, 1)[0].tolist())


def brute_force(plan: Plan, steps: range = range(STEPS)) -> list[tuple]:
    """(step, position, domain, row, epoch) of every reading, in order."""
    names = [domain.name for domain in plan.genesis.domains]
    found = []
    for step in steps:
        refs = plan.rows(step)
        numbers = zip(refs.domain_n.tolist(), refs.row_n.tolist(), refs.epoch_n.tolist(), strict=True)
        found += [(step, position, names[d], row, epoch) for position, (d, row, epoch) in enumerate(numbers)]
    return found


@pytest.mark.parametrize("by", ["highest", "lowest", "down-weighted"])
def test_the_rows_shown_are_the_hardest_and_the_text_is_that_of_the_store(
    run_dir: Path, tiny_store: Path, by: str
) -> None:
    loss_SB, weight_SB = random_log()
    plan = read_history(run_dir).plan()
    last = {(domain, row): (step, position, epoch) for step, position, domain, row, epoch in brute_force(plan)}
    value_SB, sign = (weight_SB, 1) if by == "down-weighted" else (loss_SB, -1 if by == "highest" else 1)
    order = sorted(last, key=lambda key: sign * float(value_SB[last[key][:2]]))[:5]
    found = rows_of("--run", run_dir, "--by", by, "--count", 5)
    assert [(row["domain"], row["row"]) for row in found] == order
    assert [(row["step"], row["position"], row["epoch"]) for row in found] == [last[key] for key in order]
    assert [row["text"] for row in found] == [text_of(tiny_store, *key) for key in order]
    assert [row["loss"] for row in found] == [float(loss_SB[last[key][:2]]) for key in order]
    assert [row["weight"] for row in found] == [float(weight_SB[last[key][:2]]) for key in order]


def test_the_table_has_every_column_and_the_text(run_dir: Path) -> None:
    (row,) = rows_of("--run", run_dir, "--count", 1)
    title, header, numbers, *text = run("--run", run_dir, "--count", 1).stdout.splitlines()
    assert title.rstrip() == "run tiny: highest, of 96 logged rows"
    assert header.split() == ["step", "position", "domain", "row", "epoch", "loss", "weight", "seen"]
    assert numbers.split() == [
        str(row["step"]), str(row["position"]), row["domain"], str(row["row"]), str(row["epoch"]),
        f"{row['loss']:.3f}", f"{row['weight']:.3g}", str(row["seen"]),
    ]  # fmt: skip
    assert " ".join(text).split() == row["text"].split()


def test_text_is_cut_where_asked_for(run_dir: Path) -> None:
    whole = rows_of("--run", run_dir, "--count", 3)
    assert [row["text"] for row in rows_of("--run", run_dir, "--count", 3, "--characters", 7)] == [
        row["text"][:7] for row in whole
    ]


def test_a_domain_and_steps_narrow_it_down(run_dir: Path) -> None:
    plan = read_history(run_dir).plan()
    found = rows_of("--run", run_dir, "--count", 1000, "--domain", "numbers", "--first-step", 2, "--last-step", 4)
    expected = [
        (step, position) for step, position, domain, *_ in brute_force(plan, range(2, 5)) if domain == "numbers"
    ]
    assert len(expected) > 2
    assert sorted((row["step"], row["position"]) for row in found) == expected


def test_steps_done_again_after_a_resume_show_what_was_done_last(run_dir: Path) -> None:
    loss_SB = np.zeros((3, ROWS), np.float32)
    loss_SB[1, 6] = 50
    write_log(run_dir, loss_SB, np.ones((3, ROWS), np.float32), first_step=8, attempt=1)
    found = rows_of("--run", run_dir, "--count", 1000)
    assert (found[0]["step"], found[0]["position"], found[0]["loss"]) == (9, 6, 50.0)
    assert max(row["step"] for row in found) == 10


# --- a store whose texts are known ------------------------------------------------------------------------------


@pytest.fixture
def nasty(tmp_path: Path) -> Path:
    """A run on `many` and on the 4 rows of `few`, read many times, of which row 2 holds what no terminal should see."""
    rows = random_rows(3, {"many": 200, "few": 4}, width=80)
    tokenizer = load_tokenizer(write_store(tmp_path / "first", rows) / "tokenizer")
    for number in range(4):
        text = NASTY if number == 2 else f"row {number}"
        (ids,) = tokenizer.encode_batch([text])
        rows["few"]["train"][number] = (ids + tokenizer.encode_batch([" "])[0] * 80)[:80]
    run_dir = begin(tmp_path, write_store(tmp_path / "store", rows))
    loss_SB, weight_SB = random_log()
    for step, position, domain, row, _ in brute_force(read_history(run_dir).plan()):
        if (domain, row) == ("few", 2):
            loss_SB[step, position] = 100 + step
    write_log(run_dir, loss_SB, weight_SB)
    return run_dir


def test_text_of_others_is_neither_markup_nor_obeyed_by_the_terminal(nasty: Path) -> None:
    printed = run("--run", nasty, "--count", 1).stdout
    text = "".join(printed.splitlines()[3:]).replace(" ", "")
    assert text.startswith(spelt_out(NASTY).replace(" ", ""))
    assert not any(character in printed for character in "\x1b\r\t\x07\u202e\u2028")
    assert rows_of("--run", nasty, "--count", 1)[0]["text"].startswith(NASTY)


def test_characters_without_a_glyph_are_spelt_out() -> None:
    assert spelt_out("a\n\x1b[1m\u202e\udc80é木 [b]\\") == "a\\n\\x1b[1m\\u202e\\udc80é木 [b]\\"


def test_a_row_of_several_epochs_is_shown_once_as_read_last(nasty: Path) -> None:
    readings = [key for key in brute_force(read_history(nasty).plan()) if key[2:4] == ("few", 2)]
    found = [row for row in rows_of("--run", nasty, "--count", 1000) if (row["domain"], row["row"]) == ("few", 2)]
    (step, position, _, _, epoch), times = readings[-1], len(readings)
    assert times > 10
    assert [(r["step"], r["position"], r["epoch"], r["seen"], r["loss"]) for r in found] == [
        (step, position, epoch, times, 100.0 + step)
    ]


# --- what there is not ------------------------------------------------------------------------------------------


def test_uniform_weights_leave_nothing_to_show(tiny_store: Path, tmp_path: Path) -> None:
    run_dir = begin(tmp_path, tiny_store)
    write_log(run_dir, random_log()[0], np.ones((STEPS, ROWS), np.float32))
    assert run("--run", run_dir, "--by", "down-weighted").stdout == (
        "none of the rows among 96 logged ones weighed less than uniform\n"
    )
    assert rows_of("--run", run_dir, "--by", "down-weighted") == []


def test_a_loss_that_is_no_number_has_no_rank_and_is_null_in_json(tiny_store: Path, tmp_path: Path) -> None:
    run_dir = begin(tmp_path, tiny_store)
    weight_SB = np.ones((STEPS, ROWS), np.float32)
    weight_SB[1, 2] = 0
    write_log(run_dir, np.full((STEPS, ROWS), np.nan, np.float32), weight_SB)
    assert "has a loss that is a number" in run("--run", run_dir).stdout
    (row,) = rows_of("--run", run_dir, "--by", "down-weighted")
    assert (row["step"], row["position"], row["loss"], row["weight"]) == (1, 2, None, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--domain", "number"], "--domain: the run has no domain 'number'; did you mean 'numbers'?"),
        (["--first-step", "20"], "no row was logged in steps 20 to 11; the log has steps 0 to 11"),
        (["--first-step", "5", "--last-step", "4"], "no row was logged in steps 5 to 4; the log has steps 0 to 11"),
    ],
)
def test_a_choice_that_leaves_nothing_is_refused(run_dir: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        run("--run", run_dir, *arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("arguments", [["--by", "hardest"], ["--count", "0"], ["--characters", "0"]])
def test_a_wrong_option_is_exit_2(run_dir: Path, arguments: list[str]) -> None:
    assert run("--run", run_dir, *arguments).exit_code == 2


def test_a_run_without_a_log_a_damaged_log_and_another_runs_log_are_named(run_dir: Path, tmp_path: Path) -> None:
    folder = row_log_folder(run_dir)
    with RowLossLog(folder, rank=0, attempt=0) as log:
        log.add(STEPS, np.arange(2), np.ones(2), np.ones(2))
    with pytest.raises(DataError, match="step 12, position 0, but run 'tiny' has 12 steps"):
        run("--run", run_dir)
    (folder / "step-00000012-attempt-0000-rank-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"step-00000012-attempt-0000-rank-00000\.parquet: not a readable row log file"):
        run("--run", run_dir)
    shutil.rmtree(folder)
    with pytest.raises(DataError, match=f"{folder}: no row log"):
        run("--run", run_dir)


def test_another_store_is_refused_and_a_moved_one_can_be_named(run_dir: Path, tiny_store: Path, tmp_path: Path) -> None:
    before = rows_of("--run", run_dir)
    other = write_store(tmp_path / "other", random_rows(0, {"a": 8}))
    with pytest.raises(StoreChanged, match="the run was started on"):
        run("--run", run_dir, "--store", other)
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace(str(tiny_store), str(tmp_path / "gone")))
    with pytest.raises(MixingError, match=f"{tmp_path}/gone: not a token store"):
        run("--run", run_dir)
    assert rows_of("--run", run_dir, "--store", tiny_store) == before
    config.unlink()
    with pytest.raises(ConfigError, match=r"config\.yaml: no such file"):
        run("--run", run_dir)


def test_the_command_itself_ends_with_one_line_and_exit_code_2(tiny_store: Path, tmp_path: Path) -> None:
    run_dir = begin(tmp_path, tiny_store)
    words = [sys.executable, "-m", "mixwright.launch.cli", "mix", "hard-samples", "--run", str(run_dir)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (f"error: {run_dir}/row_log: no row log; training writes one with `metrics.row_log: true`\n")
