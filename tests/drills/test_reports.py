"""Loss reports that come twice, in the wrong order, or not at all: what an online policy makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from mixwright.data_mixing.deciding import differences, recompute
from mixwright.data_mixing.entries import Decision, EntryBody, Report
from mixwright.data_mixing.journal import verify
from mixwright.data_mixing.leader import Leader
from mixwright.data_mixing.store import TokenStore
from tests.data_mixing.live_run import ControllerThread, LiveRun

pytestmark = pytest.mark.drill

ODM: dict[str, Any] = {"kind": "odm", "round_steps": 12, "guard": {"timeout_s": 1.0}}
NUM_STEPS = 60
Fault = Literal["duplicated", "lost", "reordered"]


def disturb(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    """Reports of training on their way from the leader to the journal; the first of a round is the one that suffers."""
    write: Callable[[Leader, EntryBody], None] = Leader.write
    kept_back: list[EntryBody] = []

    def disturbed(self: Leader, body: EntryBody) -> None:
        is_first = isinstance(body, Report) and body.kind == "train" and (body.last_step + 1) % 12 != 0
        if is_first and fault == "lost":
            return
        if is_first and fault == "reordered":
            kept_back.append(body)
            return
        write(self, body)
        if fault == "duplicated":
            write(self, body)
        while kept_back:
            write(self, kept_back.pop())

    monkeypatch.setattr(Leader, "write", disturbed)


def decided(folder: Path, store: TokenStore) -> tuple[LiveRun, list[Decision]]:
    run = LiveRun(folder, store, NUM_STEPS, ODM)
    with ControllerThread(folder):
        run.run()
    return run, [entry.body for entry in run.entries("DECISION") if isinstance(entry.body, Decision)]


@pytest.mark.parametrize("fault", ["duplicated", "lost", "reordered"])
def test_reports_do_not_come_as_they_were_sent(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    """Every report twice; or the first of each round lost; or the first of each round after the last one.

    Promised: training does not stop, and each decision comes out again from its input. Reports that come twice change
    no batch. A report that comes late counts as steps done again, so the one of the boundary no longer holds: PASS in
    the journal, and the mixture stays for the rest of the run.
    """
    store = TokenStore.open(tiny_store)
    whole, expected = decided(tmp_path / "whole", store)
    with monkeypatch.context() as patch:
        disturb(patch, fault)
        run, decisions = decided(tmp_path / "disturbed", store)
    history = verify(tmp_path / "disturbed")
    assert [decision.step for decision in decisions] == ([] if fault == "reordered" else [12, 24, 36, 48])
    assert [step for _, step in history.passes] == ([12] if fault == "reordered" else [])
    for decision in decisions:
        again = recompute(decision, history.policies[decision.policy_lsn], history.genesis)
        assert differences(decision, again) == []
    plan = history.plan()
    assert run.digests == [plan.digest(step) for step in range(NUM_STEPS)]
    if fault == "duplicated":
        assert [decision.shares for decision in decisions] == [decision.shares for decision in expected]
        assert run.digests == whole.digests
    else:
        assert [d.window for d in decisions] != [d.window for d in expected], "the fault did not reach the policy"
