"""The whole job in real processes: killed, interrupted, resumed on other ranks, refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.journal import Journal, verify
from mixwright.pretrain.rundir import journal_folder
from tests.pretrain.jobs import digests, finish, history_of, metrics, run_job, start_job, wait_for_step, write_config
from tests.pretrain.tiny import tiny_tree

POLICY = {"kind": "static", "mixture": {"letters": 1, "colours": 3}, "at_step": 21, "why": "test"}
NUM_STEPS = 40


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path) -> Path:
    """Folder of a run of 40 steps with a policy change at step 21, never interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = start_job(config_in(folder, tiny_store))
    submit_by_journal(folder / "tiny", job)
    code, output = finish(job)
    assert code == 0, output[-4000:]
    return folder / "tiny"


def config_in(folder: Path, store: Path, **changes: Any) -> Path:
    return write_config(folder, tiny_tree(folder, store, training__num_steps=NUM_STEPS, **changes))


def submit_by_journal(run_dir: Path, job: subprocess.Popen[str]) -> None:
    """What the controller does with an accepted policy, without Ray."""
    wait_for_step(run_dir, 1, job)
    journal = Journal(journal_folder(run_dir), writer="controller")
    journal.poll()
    journal.append(accept(POLICY, history_of(run_dir).genesis))


def test_the_policy_takes_effect_at_its_step_without_a_restart(undisturbed: Path) -> None:
    history = history_of(undisturbed)
    assert [commit.effective_step for commit in history.commits] == [0, 21]
    plan, names = history.plan(), [domain.name for domain in history.genesis.domains]
    before = [names[i] for step in range(21) for i in plan.rows(step).domain_n]
    after = [names[i] for step in range(21, NUM_STEPS) for i in plan.rows(step).domain_n]
    assert "numbers" in before
    assert "numbers" not in after
    realised = after.count("colours") / len(after)
    assert realised == pytest.approx(0.75, abs=0.02)


def test_every_step_was_compared_with_the_plan_and_the_journal_verifies(undisturbed: Path) -> None:
    history = verify(journal_folder(undisturbed))
    assert history.end is not None
    assert (history.end.step, history.end.reason) == (NUM_STEPS, "complete")
    assert history.end.digest == digests(undisturbed)[-1]
    plan = history.plan()
    for report in (report for report in history.reports if report.kind == "train"):
        steps = range(report.first_step, report.last_step + 1)
        assert int(report.digest, 16) == sum(plan.digest(step) for step in steps) % (1 << 64)


def test_reports_hold_the_losses_and_rows_of_every_domain(undisturbed: Path) -> None:
    history = history_of(undisturbed)
    reports = [report for report in history.reports if report.kind == "train"]
    assert [(r.first_step, r.last_step) for r in reports][:3] == [(0, 3), (4, 4), (5, 7)]
    assert sum(d.num_rows for r in reports for d in r.domains.values()) == 8 * NUM_STEPS
    cursors = dict(zip([d.name for d in history.genesis.domains], history.plan().cursors(NUM_STEPS), strict=True))
    for name, cursor in cursors.items():
        assert sum(r.domains[name].num_rows for r in reports if name in r.domains) == cursor


def test_the_model_learns_and_the_exported_folder_generates(undisturbed: Path) -> None:
    tests = metrics(undisturbed, "test")
    assert [record["step"] for record in tests] == [0, NUM_STEPS]
    assert all(tests[1]["loss"][name] < tests[0]["loss"][name] - 1.0 for name in tests[0]["loss"])
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(undisturbed / "export")
    tokenizer = AutoTokenizer.from_pretrained(undisturbed / "export")
    generated = model.generate(**tokenizer("red green", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert generated.shape[1] > 5


def test_the_exported_model_has_the_reported_test_loss(undisturbed: Path, tiny_store: Path) -> None:
    from transformers import AutoModelForCausalLM

    from mixwright.data_mixing.store import TokenStore

    model = AutoModelForCausalLM.from_pretrained(undisturbed / "export")
    store = TokenStore.open(tiny_store)
    spread = [k * store.num_rows("letters", "test") // 4 for k in range(4)]
    rows = torch.from_numpy(store.gather(np.full(4, store.index("letters")), np.array(spread), "test").astype("int64"))
    with torch.no_grad():
        logits = model(rows[:, :-1]).logits.double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].reshape(-1))
    assert metrics(undisturbed, "test")[-1]["loss"]["letters"] == pytest.approx(float(loss), rel=1e-5)


def test_the_report_shows_losses_mixture_and_commits(undisturbed: Path) -> None:
    page = (undisturbed / "report.html").read_text()
    assert "policy" in page
    assert "(test)" in page
    assert (undisturbed / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_same_command_on_a_complete_run_says_so_and_trains_nothing(undisturbed: Path, tiny_store: Path) -> None:
    before = (undisturbed / "metrics.jsonl").read_bytes()
    output = run_job(undisturbed.parent / "run.yaml")
    assert "run 'tiny' is complete" in output
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("attempt", [0, 1])
def test_kill_9_at_a_random_step_and_the_same_command_read_the_same_batches(
    undisturbed: Path, tiny_store: Path, tmp_path: Path, attempt: int
) -> None:
    config, run_dir = config_in(tmp_path, tiny_store), tmp_path / "tiny"
    job = start_job(config)
    submit_by_journal(run_dir, job)
    wait_for_step(run_dir, random.Random(attempt).randint(5, NUM_STEPS - 3), job)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    output = run_job(config)
    assert digests(run_dir) == digests(undisturbed)
    assert history_of(run_dir).end == history_of(undisturbed).end
    assert "resuming after step" in output
    last, expected = (metrics(folder, "train")[-1]["overall"] for folder in (run_dir, undisturbed))
    assert last == pytest.approx(expected, rel=1e-4)


def test_one_rank_resumed_on_two_reads_the_same_batches(undisturbed: Path, tiny_store: Path, tmp_path: Path) -> None:
    config, run_dir = config_in(tmp_path, tiny_store, training__zero_stage=2), tmp_path / "tiny"
    job = start_job(config)
    submit_by_journal(run_dir, job)
    wait_for_step(run_dir, 14, job)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    output = run_job(config, num_ranks=2)
    assert "2 rank(s), ZeRO 2" in output
    assert digests(run_dir) == digests(undisturbed)
    last, expected = (metrics(folder, "train")[-1]["overall"] for folder in (run_dir, undisturbed))
    assert last == pytest.approx(expected, rel=1e-3)


def test_an_interrupt_leaves_a_checkpoint_of_that_step(undisturbed: Path, tiny_store: Path, tmp_path: Path) -> None:
    config, run_dir = config_in(tmp_path, tiny_store, checkpoint__every=1000), tmp_path / "tiny"
    job = start_job(config)
    submit_by_journal(run_dir, job)
    wait_for_step(run_dir, 7, job)
    job.send_signal(signal.SIGINT)
    code, output = finish(job)
    assert code == 75, output[-3000:]
    assert "run the same command again" in output
    checkpoint = history_of(run_dir).checkpoints[-1]
    assert checkpoint.step == metrics(run_dir, "step")[-1]["step"]
    assert checkpoint.digest == digests(undisturbed)[checkpoint.step - 1]


def test_a_validation_that_a_stop_did_not_wait_for_is_made_up_for(tiny_store: Path, tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path, tiny_store, training__num_steps=20, evaluation__every=1)
    config, run_dir = write_config(tmp_path, tree), tmp_path / "tiny"
    job = start_job(config)
    wait_for_step(run_dir, 3, job)
    job.send_signal(signal.SIGTERM)
    assert finish(job)[0] == 75
    stopped = history_of(run_dir).checkpoints[-1].step
    assert [record["step"] for record in metrics(run_dir, "validation")] == list(range(1, stopped))
    run_job(config)
    assert [record["step"] for record in metrics(run_dir, "validation")] == list(range(1, 21))


def test_a_damaged_checkpoint_is_passed_over_with_a_word(tiny_store: Path, tmp_path: Path) -> None:
    config, run_dir = config_in(tmp_path, tiny_store), tmp_path / "tiny"
    job = start_job(config)
    wait_for_step(run_dir, 9, job)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    newest = sorted(path.parent for path in (run_dir / "checkpoints").glob("step-*/sealed.json"))[-1]
    os.truncate(newest / "mp_rank_00_model_states.pt", 100)
    output = run_job(config)
    assert f"checkpoint {newest.name} is damaged (mp_rank_00_model_states.pt has 100 bytes instead of" in output
    assert f"resuming after step {int(newest.name[-8:]) - 4}" in output
    assert len(digests(run_dir)) == NUM_STEPS


def refused(config: Path, *overrides: str) -> str:
    """The one error line of a job that must be refused with exit code 2."""
    code, output = finish(start_job(config, *overrides))
    assert code == 2, output[-3000:]
    assert "Traceback" not in output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    return errors[0]


def test_a_second_trainer_on_the_same_run_is_refused(tiny_store: Path, tmp_path: Path) -> None:
    config = config_in(tmp_path, tiny_store)
    job = start_job(config, "training.num_steps=4000")
    wait_for_step(tmp_path / "tiny", 1, job)
    message = refused(config, "training.num_steps=4000")
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    assert f"another trainer is working on this run (process {job.pid} on " in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "data.store=nowhere",
            "data.store: nowhere holds no token store; make it with `mixwright data prepare CONFIG`",
        ),
        (
            "mixing.policy={kind: static, mixture: {letter: 1}}",
            "mixture.letter: no such domain; did you mean 'letters'?",
        ),
        ("mixing.policy={kind: static, mixture: {letters: -1}}", "letters"),
        ("mixing.policy={kind: static, mixture: {letters: .nan}}", "letters"),
        ("model.config.max_position_embeddings=8", "exceeds the model's max_position_embeddings = 8"),
        ("model.config.vocab_size=100", "smaller than the token store's vocabulary"),
        ("training.micro_batch_rows=3", "fitting micro_batch_rows: 1, 2, 4, 8"),
        ("training.num_stps=3", "training.num_stps: unknown key; did you mean 'num_steps'?"),
    ],
)
def test_bad_input_is_one_clear_line(tiny_store: Path, tmp_path: Path, override: str, expected: str) -> None:
    assert expected in refused(config_in(tmp_path, tiny_store), override)


def test_a_run_is_not_continued_on_another_store(undisturbed: Path, tiny_store: Path, tmp_path: Path) -> None:
    config, run_dir = config_in(tmp_path, tiny_store), tmp_path / "tiny"
    job = start_job(config)
    wait_for_step(run_dir, 2, job)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    other = tmp_path / "other"
    shutil.copytree(tiny_store, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["fingerprint"] = "0" * len(manifest["fingerprint"])
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert "token store" in refused(config, f"data.store={other}")


def test_changed_settings_that_change_the_data_are_refused(undisturbed: Path, tiny_store: Path, tmp_path: Path) -> None:
    config, run_dir = config_in(tmp_path, tiny_store), tmp_path / "tiny"
    job = start_job(config)
    wait_for_step(run_dir, 2, job)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    message = refused(config, "training.rows_per_step=16")
    assert "rows_per_step = 16 (the run has 8)" in message
