"""A whole job under an online policy: DeepSpeed ranks, a real controller in Ray, kills."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from mixwright.data_mixing.deciding import differences, recompute
from mixwright.data_mixing.entries import Decision
from mixwright.data_mixing.journal import read_entries, verify
from mixwright.pretrain.rundir import journal_folder
from tests.pretrain.jobs import (
    digests,
    finish,
    history_of,
    metrics,
    mixwright,
    run_job,
    start_job,
    wait_for_step,
    write_config,
)
from tests.pretrain.tiny import tiny_tree

NUM_STEPS = 40
AIOLI = {"kind": "aioli", "variant": "paper", "sweeps": 1, "sweep_steps": 2, "round_steps": 12}


def config_in(folder: Path, store: Path, policy: dict[str, Any] = AIOLI, service: str = "required") -> Path:
    folder.mkdir()
    tree = tiny_tree(folder, store, training__num_steps=NUM_STEPS)
    tree["mixing"].update(policy=policy, service=service)
    return write_config(folder, tree)


def decisions(run_dir: Path) -> list[Decision]:
    return [e.body for e in read_entries(journal_folder(run_dir)) if isinstance(e.body, Decision)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path) -> Path:
    folder = tmp_path_factory.mktemp("online") / "run"
    run_job(config_in(folder, tiny_store))
    return folder / "tiny"


def test_each_round_ends_in_a_decision_from_real_losses(undisturbed: Path) -> None:
    history = verify(journal_folder(undisturbed))
    made = decisions(undisturbed)
    assert [decision.step for decision in made] == [6, 18, 30]
    assert [commit.effective_step for commit in history.commits] == [0, 6, 18, 30]
    plan = history.plan()
    for decision in made:
        assert decision.action == "propose", decision.reason
        assert plan.proportions(decision.step) == pytest.approx(decision.shares, abs=1e-8)
        for interval in decision.window["intervals"]:
            assert None not in (*interval["before"], *interval["after"])
    assert made[-1].shares != made[0].shares
    measured = {record["step"] for record in metrics(undisturbed, "validation")}
    assert measured == {0, 2, 4, 6, 12, 14, 16, 18, 24, 26, 28, 30, 36}


def test_every_decision_comes_out_again_from_its_journaled_input(undisturbed: Path) -> None:
    history = history_of(undisturbed)
    for decision in decisions(undisturbed):
        again = recompute(decision, history.policies[decision.policy_lsn], history.genesis)
        assert differences(decision, again) == []


def test_killed_between_perturbations_it_goes_on_with_the_same_rows(
    undisturbed: Path, tiny_store: Path, tmp_path: Path
) -> None:
    config = config_in(tmp_path / "run", tiny_store)
    run_dir = tmp_path / "run" / "tiny"
    job = start_job(config)
    wait_for_step(run_dir, 16, job)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    run_job(config)
    assert digests(run_dir) == digests(undisturbed)
    assert [decision.shares for decision in decisions(run_dir)] == [d.shares for d in decisions(undisturbed)]


def test_two_ranks_wait_together_and_read_what_the_plan_says(tiny_store: Path, tmp_path: Path) -> None:
    run_job(config_in(tmp_path / "run", tiny_store), num_ranks=2)
    run_dir = tmp_path / "run" / "tiny"
    history = verify(journal_folder(run_dir))
    assert [decision.step for decision in decisions(run_dir)] == [6, 18, 30]
    assert history.end is not None
    assert history.end.digest == digests(run_dir)[-1]


def test_without_a_controller_the_job_waits_once_and_goes_on(tiny_store: Path, tmp_path: Path) -> None:
    policy = {**AIOLI, "guard": {"timeout_s": 1.0}}
    code, output = finish(start_job(config_in(tmp_path / "run", tiny_store, policy, service="none")))
    assert code == 0, output[-3000:]
    history = verify(journal_folder(tmp_path / "run" / "tiny"))
    assert [step for _, step in history.passes] == [6]
    assert "no decision came in time" in output


def command(run_dir: Path, *arguments: str) -> str:
    done = mixwright("mix", *arguments, "--run", str(run_dir))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wait_for_decisions(run_dir: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(decisions(run_dir)) < count:
        assert time.monotonic() < deadline, f"{len(decisions(run_dir))} decisions"
        time.sleep(0.1)


def test_people_submit_hold_resume_and_roll_back_an_online_policy_of_a_running_job(
    tiny_store: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    tree = tiny_tree(tmp_path / "run", tiny_store, training__num_steps=100_000, mixing__service="required")
    config, run_dir, policy = write_config(tmp_path, tree), tmp_path / "run" / "tiny", tmp_path / "odm.yaml"
    policy.write_text("kind: odm\nround_steps: 20\n")
    job = start_job(config)
    wait_for_step(run_dir, 2, job)
    command(run_dir, "submit", str(policy), "--why", "try", "--wait")
    wait_for_decisions(run_dir, 3)
    assert "online decisions are not held" in mixwright("mix", "resume", "--run", str(run_dir)).stderr
    assert "decisions are held" in command(run_dir, "hold", "--why", "look")
    deadline = time.monotonic() + 60
    while decisions(run_dir)[-1].reason != "decisions are held" and time.monotonic() < deadline:
        time.sleep(0.1)
    count = len(decisions(run_dir))
    assert "go on" in command(run_dir, "resume")
    wait_for_decisions(run_dir, count + 3)
    assert "the same" in command(run_dir, "replay-policy")
    earlier = next(lsn for lsn, body in history_of(run_dir).policies.items() if body.root is not None)
    command(run_dir, "rollback", str(earlier))
    deadline = time.monotonic() + 60
    while history_of(run_dir).active_root() is not None and time.monotonic() < deadline:
        time.sleep(0.1)
    job.send_signal(signal.SIGINT)
    code, output = finish(job)
    assert code == 75, output[-3000:]
    history = verify(journal_folder(run_dir))
    last, back = history.commits[-1], history.policies[earlier]
    assert last.policy.why == f"rollback to policy {earlier}"
    assert history.plan().proportions(last.effective_step) == pytest.approx(
        history.plan().proportions(next(c.effective_step for c in history.commits if c.lsn == earlier))
    )
    assert back.decision_lsn is not None
