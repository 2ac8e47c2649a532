"""The reports that wait for a decision: few, however long nobody decides, and worth the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from mixwright.data_mixing import measured
from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.deciding import due_entry
from mixwright.data_mixing.entries import Decision, DomainLoss, EntryBody, Pause, PolicyEntry, Report
from mixwright.data_mixing.entry_file import Entry
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.leader import commit_body
from tests.data_mixing.plan_cases import genesis

NUM_DOMAINS, REPORT_EVERY = 3, 2
GENESIS = genesis([1000, 2000, 3000], rows_per_step=12, num_steps=10**7)
AIOLI = {"kind": "aioli", "sweeps": 1, "sweep_steps": 2, "round_steps": 40, "decide": "bridge"}
ODM = {"kind": "odm", "round_steps": 40, "decide": "bridge"}


def tell(history: RunHistory, body: EntryBody) -> int:
    """Add an entry as the journal would; returns its number."""
    lsn = history.last_lsn + 1
    history.apply(Entry(lsn, type(body).__name__, body, "w", 0.0, "", f"hash {lsn}"))
    return lsn


def begun(document: dict[str, Any]) -> RunHistory:
    """A run whose first policy is `document`."""
    history = RunHistory()
    tell(history, GENESIS)
    policy = accept(document, GENESIS)
    tell(history, commit_body(history, tell(history, policy), policy, 0))
    return history


def loss(step: int, index: int, num_tokens: int) -> DomainLoss:
    mean = 3 + index + 5 / (step + 10)
    return DomainLoss(
        loss_sum=num_tokens * mean, loss_square_sum=num_tokens * mean**2, num_tokens=num_tokens, num_rows=4
    )


def report(kind: Any, first: int, last: int) -> Report:
    domains = {d.name: loss(last, i, 10 * (last - first + 1)) for i, d in enumerate(GENESIS.domains)}
    return Report(kind=kind, first_step=first, last_step=last, domains=domains, attempt=0, learning_rate=1 / (last + 1))


def reports(history: RunHistory, steps: range, validate_every: int = 50) -> Iterator[Report]:
    """What a trainer reports of these steps: windows that end at marks, validations there and now and then."""
    first = steps.start
    for step in steps:
        found = history.plan().mark(step + 1)
        if found or (step + 1) % REPORT_EVERY == 0:
            yield report("train", first, step)
            first = step + 1
        if (found and found[1].evaluate) or (step + 1) % validate_every == 0:
            yield report("validation", step, step)


def decision_of(document: dict[str, Any], num_steps: int) -> tuple[Decision, int]:
    """What is decided after so many steps without a controller, and how many reports waited for it."""
    history = begun(document)
    for body in reports(history, range(num_steps)):
        tell(history, body)
    decided = due_entry(history)
    assert isinstance(decided, Decision)
    return decided, len(history.measured)


def limited(monkeypatch: pytest.MonkeyPatch, num_reports: int) -> None:
    monkeypatch.setattr(measured, "MAX_LOSSES", num_reports * NUM_DOMAINS)
    monkeypatch.setattr(measured, "MIN_REPORTS", 1)


@pytest.mark.parametrize("document", [AIOLI, ODM], ids=lambda document: str(document["kind"]))
def test_a_decision_after_a_long_silence_is_that_of_all_reports(
    document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, 10**6)
    everything, num_all = decision_of(document, 1200)
    limited(monkeypatch, 60)
    found, num_kept = decision_of(document, 1200)
    assert num_all > 600
    assert num_kept <= 61
    assert found.step == everything.step
    assert found.shares == pytest.approx(everything.shares)
    for kept, whole in zip(found.window["intervals"], everything.window["intervals"], strict=True):
        exact = ("first_step", "last_step", "rows", "before", "after", "train_tokens", "is_perturbation")
        assert {key: kept[key] for key in exact} == {key: whole[key] for key in exact}
        assert kept["train_loss"] == pytest.approx(whole["train_loss"])
        assert kept["learning_rate"] == pytest.approx(whole["learning_rate"])


def test_without_a_controller_the_number_of_reports_does_not_grow_with_the_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limited(monkeypatch, 100)
    history = begun(ODM)
    most, bodies = 0, reports(history, range(20_000))
    for body in bodies:
        tell(history, body)
        most = max(most, len(history.measured))
    assert most <= 101
    trained = [r for r in history.measured if r.kind == "train"]
    assert (trained[0].first_step, trained[-1].last_step) == (0, 19_999)
    assert all(one.last_step + 1 == other.first_step for one, other in itertools.pairwise(trained))
    tokens = sum(r.domains["d1"].num_tokens for r in trained)
    assert tokens == 20_000 * 10


def test_held_decisions_need_no_reports() -> None:
    history = begun(ODM)
    tell(history, Pause(held=True))
    for body in reports(history, range(45)):
        tell(history, body)
    decision = due_entry(history)
    assert isinstance(decision, Decision)
    tell(history, decision)
    policy = due_entry(history)
    assert isinstance(policy, PolicyEntry)
    tell(history, commit_body(history, tell(history, policy), policy, 48))
    for body in reports(history, range(45, 1000)):
        tell(history, body)
    assert {r.last_step for r in history.measured} == {999}
    tell(history, Pause(held=False))
    resumed = due_entry(history)
    assert isinstance(resumed, Decision)
    assert resumed.step == 1000
    tell(history, resumed)
    for body in reports(history, range(1000, 1010)):
        tell(history, body)
    assert [r.first_step for r in history.measured if r.kind == "train"] == [998, 1000, 1002, 1004, 1006, 1008]


def test_a_run_that_goes_back_forgets_what_it_does_again(monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 40)
    history = begun(ODM)
    for body in itertools.chain(reports(history, range(300)), reports(history, range(250, 320))):
        tell(history, body)
    trained = [r for r in history.measured if r.kind == "train"]
    assert all(one.last_step < other.first_step for one, other in itertools.pairwise(trained))
    assert sum(r.last_step - r.first_step + 1 for r in trained) >= 320 - 16
