"""Online policies in a run: what is decided when, who waits for whom, and what the journal can prove afterwards."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.control import MixingController
from mixwright.data_mixing.deciding import differences, due_entry, recompute
from mixwright.data_mixing.entries import Decision
from mixwright.data_mixing.errors import PolicyRejected
from mixwright.data_mixing.history import HistoryState, RunHistory
from mixwright.data_mixing.journal import Journal, read_entries, verify
from mixwright.data_mixing.rounds import Round
from mixwright.data_mixing.store import TokenStore
from tests.data_mixing.live_run import ControllerThread, LiveRun, genesis_of, wait_until

ODM: dict[str, Any] = {"kind": "odm", "round_steps": 12}
AIOLI: dict[str, Any] = {"kind": "aioli", "sweeps": 1, "sweep_steps": 2, "round_steps": 20}
STATIC: dict[str, Any] = {"kind": "temperature", "temperature": 1.0}


@pytest.fixture
def store(tiny_store: Path) -> TokenStore:
    return TokenStore.open(tiny_store)


def history_of(folder: Path) -> RunHistory:
    history = RunHistory()
    for entry in read_entries(folder):
        history.apply(entry)
    return history


def decisions(run: LiveRun) -> list[Decision]:
    return [entry.body for entry in run.entries("DECISION")]


def effective_steps(run: LiveRun) -> list[int]:
    return [entry.body.effective_step for entry in run.entries("COMMIT")]


def decided_run(folder: Path, store: TokenStore, policy: dict[str, Any], num_steps: int = 60, **more: Any) -> LiveRun:
    run = LiveRun(folder, store, num_steps, policy, **more)
    with ControllerThread(folder):
        run.run()
    verify(folder)
    return run


def test_a_synchronous_decision_holds_from_exactly_the_end_of_its_round(store: TokenStore, tmp_path: Path) -> None:
    run = decided_run(tmp_path, store, ODM)
    assert effective_steps(run) == [0, 12, 24, 36, 48]
    assert [decision.step for decision in decisions(run)] == [12, 24, 36, 48]
    plan = history_of(tmp_path).plan()
    for decision in decisions(run):
        assert plan.proportions(decision.step) == pytest.approx(decision.shares, abs=1e-8)
    assert not np.allclose(plan.proportions(23), plan.proportions(48))
    assert run.entries("PASS") == []


def test_two_ranks_read_the_batches_that_one_rank_reads(store: TokenStore, tmp_path: Path) -> None:
    one = decided_run(tmp_path / "one", store, ODM)
    two = decided_run(tmp_path / "two", store, ODM, num_ranks=2)
    assert two.digests == one.digests


def test_a_bridging_policy_is_not_waited_for(store: TokenStore, tmp_path: Path) -> None:
    class Slow(LiveRun):
        def losses(self, step: int) -> np.ndarray:
            time.sleep(0.3)  # reports are rare: time for the controller to decide while training goes on
            return super().losses(step)

    run = Slow(tmp_path, store, 90, {**ODM, "decide": "bridge"})
    with ControllerThread(tmp_path):
        run.run()
    decided, effective = decisions(run), effective_steps(run)
    assert len(decided) >= 2
    for decision, step in zip(decided, effective[1:], strict=False):
        assert step >= decision.step + 8
    first, second = decided[0].window["intervals"], decided[1].window["intervals"]
    assert [(i["first_step"], i["last_step"]) for i in first] == [(0, 11)]
    # The steps between the boundary and the commit belong to the next window.
    assert [i["first_step"] for i in second] == [12, effective[1]]
    assert second[0]["last_step"] == effective[1] - 1


def test_the_window_has_the_rows_really_read_and_both_validations(store: TokenStore, tmp_path: Path) -> None:
    run = decided_run(tmp_path, store, AIOLI, num_steps=50)
    plan = history_of(tmp_path).plan()
    assert len(decisions(run)) >= 2
    for decision in decisions(run):
        intervals = decision.window["intervals"]
        edges = [(i["first_step"], i["last_step"] + 1) for i in intervals]
        assert [end for _, end in edges[:-1]] == [first for first, _ in edges[1:]]
        assert edges[-1][1] == decision.step
        for interval, (first, end) in zip(intervals, edges, strict=True):
            assert tuple(interval["rows"]) == tuple((plan.cursors(end) - plan.cursors(first)).tolist())
            assert interval["before"] == pytest.approx(run.losses(first).tolist())
            assert interval["after"] == pytest.approx(run.losses(end).tolist())
            assert interval["learning_rate"] == 1e-3
    sweep = [interval["is_perturbation"] for interval in decisions(run)[0].window["intervals"]]
    assert sweep == [True] * len(store.domains())


def test_without_a_controller_training_goes_on_with_the_last_mixture(store: TokenStore, tmp_path: Path) -> None:
    run = LiveRun(tmp_path, store, 40, {**ODM, "guard": {"timeout_s": 0.3}})
    run.run()
    passed = [(entry.body.policy_lsn, entry.body.step) for entry in run.entries("PASS")]
    assert [step for _, step in passed] == [12]
    assert effective_steps(run) == [0]
    plan = history_of(tmp_path).plan()
    assert plan.proportions(39) == pytest.approx(plan.proportions(0))
    again = LiveRun(tmp_path, store, 40, run.policy)
    again.run()
    assert again.digests == run.digests
    assert len(run.entries("PASS")) == 1, "a boundary that was passed once is not waited at again"


def test_a_controller_that_comes_late_decides_what_is_due_and_goes_on(store: TokenStore, tmp_path: Path) -> None:
    busy_machine_s = 5.0  # waited in full once, at step 12; afterwards what a starved controller may take
    run = LiveRun(tmp_path, store, 100, {**ODM, "guard": {"timeout_s": busy_machine_s}})
    run.run(0, 20)
    with ControllerThread(tmp_path):
        wait_until(lambda: bool(decisions(run)))  # nobody waits for a boundary that was passed: steps would run ahead
        run.run(20)
    first, *later = [(decision.step, decision.decision) for decision in decisions(run)]
    assert first == (12, 0)
    assert [number for _, number in later] == list(range(1, len(later) + 1))
    assert len(later) >= 3
    assert effective_steps(run)[1] >= 20


def test_the_decision_of_a_killed_controller_is_carried_out_by_the_next(store: TokenStore, tmp_path: Path) -> None:
    run = LiveRun(tmp_path, store, 40, {**ODM, "guard": {"timeout_s": 0.2}})
    run.run(0, 14)
    decision = due_entry(history_of(tmp_path))
    assert isinstance(decision, Decision)
    killed = Journal(tmp_path, writer="controller-a")
    killed.poll()
    lsn = killed.append(decision).lsn
    MixingController(tmp_path, "controller-b").advance()
    policies = [entry.body for entry in run.entries("POLICY") if entry.body.root is not None]
    assert [(policy.decision_lsn, policy.at_step) for policy in policies] == [(lsn, 12)]
    assert len(run.entries("DECISION")) == 1


def test_deciding_again_writes_nothing(store: TokenStore, tmp_path: Path) -> None:
    run = LiveRun(tmp_path, store, 40, {**ODM, "guard": {"timeout_s": 0.2}})
    run.run(0, 14)
    controller = MixingController(tmp_path, "controller-a")
    assert controller.advance() == 2
    assert controller.advance() == 0
    assert MixingController(tmp_path, "controller-b").advance() == 0


def test_a_journaled_decision_can_be_recomputed_and_a_changed_one_is_told_apart(
    store: TokenStore, tmp_path: Path
) -> None:
    run = decided_run(tmp_path, store, AIOLI)
    history = history_of(tmp_path)
    for decision in decisions(run):
        policy = history.policies[decision.policy_lsn]
        assert differences(decision, recompute(decision, policy, history.genesis)) == []
    forged = decisions(run)[-1]
    forged = forged.model_copy(update={"shares": tuple(reversed(forged.shares))})
    found = differences(forged, recompute(forged, history.policies[forged.policy_lsn], history.genesis))
    assert len(found) == 1
    assert found[0].startswith("shares: journaled (")


def test_the_state_of_a_policy_goes_from_decision_to_decision(store: TokenStore, tmp_path: Path) -> None:
    run = decided_run(tmp_path, store, ODM)
    for earlier, later in itertools.pairwise(decisions(run)):
        assert later.state == earlier.proposal["state"]
        assert later.decision == earlier.decision + 1
    assert decisions(run)[0].state == {}


def test_a_user_policy_ends_the_rounds_of_the_online_one(store: TokenStore, tmp_path: Path) -> None:
    run = LiveRun(tmp_path, store, 60, ODM)
    with ControllerThread(tmp_path) as thread:
        run.run(0, 20)
        thread.call("submit", {"kind": "static", "mixture": {store.domains()[0].name: 1}, "at_step": 30})
        run.run(20)
    assert max(decision.step for decision in decisions(run)) <= 30
    assert history_of(tmp_path).plan().proportions(59)[0] == 1.0
    assert history_of(tmp_path).measured == []


def test_an_online_policy_that_is_submitted_to_a_running_job_takes_over(store: TokenStore, tmp_path: Path) -> None:
    run = LiveRun(tmp_path, store, 60, STATIC)
    with ControllerThread(tmp_path) as thread:
        run.run(0, 10)
        lsn = thread.call("submit", {**AIOLI, "at_step": 20})["lsn"]
        run.run(10)
    rounds = decisions(run)
    assert {decision.policy_lsn for decision in rounds} == {lsn}
    first = rounds[0].window["intervals"][0]
    assert first["first_step"] == 20
    assert first["before"] == pytest.approx(run.losses(20).tolist())


def test_held_decisions_keep_the_mixture_and_go_on_when_told(store: TokenStore, tmp_path: Path) -> None:
    run = LiveRun(tmp_path, store, 2000, ODM)
    with ControllerThread(tmp_path) as thread:
        run.run(0, 14)
        thread.call("pause", True, author="ann")
        with pytest.raises(PolicyRejected, match="already held"):
            thread.call("pause", True)
        run.run(14, 60)
        held = decisions(run)[-1]
        assert (held.step, held.action, held.reason) == (24, "hold", "decisions are held")
        plan = history_of(tmp_path).plan()
        assert plan.proportions(59) == pytest.approx(plan.proportions(23))
        thread.call("pause", False)
        end, after = 60, []
        while len(after) < 2 and end < 2000:  # a busy machine takes steps faster than entries
            run.run(end, end + 40)
            end, after = end + 40, [decision for decision in decisions(run) if decision.step > 60]
    assert len(after) >= 2
    assert after[0].state == held.state


def test_a_shadow_decides_in_the_journal_and_is_never_obeyed(store: TokenStore, tmp_path: Path) -> None:
    run = LiveRun(tmp_path, store, 90, STATIC, report_every=5)
    with ControllerThread(tmp_path) as thread:
        run.run(0, 10)
        thread.call("submit", {**ODM, "shadow": True})
        run.run(10)
        deadline = time.monotonic() + 30  # nobody waits for a shadow: its last decision may come after the last step
        while len(decisions(run)) < 5 and time.monotonic() < deadline:
            time.sleep(0.02)
    assert effective_steps(run) == [0]
    assert [decision.shadow for decision in decisions(run)] == [True] * len(decisions(run))
    assert [decision.step for decision in decisions(run)] == [25, 40, 55, 70, 85]
    assert decisions(run)[-1].shares != decisions(run)[0].shares


def test_rolling_back_reads_the_mixture_of_an_earlier_decision_again(store: TokenStore, tmp_path: Path) -> None:
    run = LiveRun(tmp_path, store, 60, ODM)
    with ControllerThread(tmp_path) as thread:
        run.run(0, 40)
        earlier = next(entry for entry in run.entries("POLICY") if entry.body.root is not None)
        thread.call("roll_back", earlier.lsn, why="too much of it")
        run.run(40)
    plan = history_of(tmp_path).plan()
    assert plan.proportions(59) == pytest.approx(plan.proportions(earlier.body.at_step), abs=1e-8)
    with pytest.raises(PolicyRejected, match="policy 4711 does not exist"):
        MixingController(tmp_path, "controller-b").roll_back(4711)


def test_a_run_killed_between_decisions_reads_the_same_rows_again(store: TokenStore, tmp_path: Path) -> None:
    whole = decided_run(tmp_path / "whole", store, AIOLI)
    killed = LiveRun(tmp_path / "killed", store, 60, AIOLI)
    with ControllerThread(tmp_path / "killed"):
        killed.run(0, 33)
        resumed = LiveRun(tmp_path / "killed", store, 60, AIOLI, attempt=1)
        resumed.run(21)
    assert killed.digests[:21] + resumed.digests == whole.digests
    assert [d.shares for d in decisions(killed)] == [d.shares for d in decisions(whole)]


def test_reports_of_steps_that_were_done_again_replace_the_old_ones(store: TokenStore, tmp_path: Path) -> None:
    run = LiveRun(tmp_path, store, 60, {**ODM, "round_steps": 30})
    run.run(0, 25)
    run.run(15, 28)
    ends = [(r.first_step, r.last_step) for r in history_of(tmp_path).measured if r.kind == "train"]
    assert ends == [(0, 9), (15, 19), (20, 27)]


def test_a_snapshot_keeps_what_the_next_decision_needs(store: TokenStore, tmp_path: Path) -> None:
    run = LiveRun(tmp_path, store, 100, {**AIOLI, "guard": {"timeout_s": 0.2}})
    with ControllerThread(tmp_path):
        run.run(0, 31)
    run.run(31, 50)
    history = history_of(tmp_path)
    restored = RunHistory.from_state(HistoryState.model_validate_json(history.state().model_dump_json()))
    expected = due_entry(history)
    assert isinstance(expected, Decision)
    assert due_entry(restored) == expected
    assert restored.passes == history.passes
    assert len(restored.passes) == 1


def test_an_online_policy_that_cannot_work_here_is_refused_with_the_reason(store: TokenStore) -> None:
    genesis = genesis_of(store, 60)
    with pytest.raises(PolicyRejected, match=r"guard\.floor"):
        accept({**ODM, "guard": {"floor": 0.9}}, genesis)
    with pytest.raises(PolicyRejected, match="arms"):
        accept({**ODM, "arms": {"a": ["no-such-domain"]}}, genesis)


def test_a_policy_that_takes_longer_than_reports_are_apart_decides_once(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = LiveRun(tmp_path, store, 40, {**ODM, "guard": {"timeout_s": 0.1}})
    run.run(0, 20)
    asked, decide = [], Round.decide

    def slow_decide(self: Round, *arguments: Any) -> Any:
        asked.append(arguments)
        assert len(asked) < 5
        writer = Journal(tmp_path, writer="leader")
        writer.append(run.report("train", 20 + len(asked), 20 + len(asked)))
        return decide(self, *arguments)

    monkeypatch.setattr(Round, "decide", slow_decide)
    MixingController(tmp_path, "controller-a").advance()
    assert len(decisions(run)) == len(asked) == 1
