"""Forecasts against counting the rows of every step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.domain import Cap
from mixwright.data_mixing.entries import Genesis
from mixwright.data_mixing.forecast import (
    ASSUMED_LEAD_STEPS,
    expected_commits,
    expected_plan,
    forecast,
    mixture_change,
    remarks,
    soonest_step,
)
from mixwright.data_mixing.plan import CommittedPolicy, Plan
from mixwright.data_mixing.trace import trace
from tests.data_mixing.run_cases import TrainerSide, genesis


def committed(run: Genesis, *policies: tuple[int, dict[str, Any]]) -> list[CommittedPolicy]:
    return [CommittedPolicy(step, lsn, accept(document, run)) for lsn, (step, document) in enumerate(policies)]


def counted_rows(run: Genesis, commits: list[CommittedPolicy], first: int, end: int) -> Counter[str]:
    plan = Plan(run, commits)
    return Counter(run.domains[d].name for step in range(first, end) for d in plan.rows(step).domain_n)


CHANGING = (
    (0, {"kind": "temperature", "temperature": 2}),
    (30, {"kind": "static", "mixture": {"web-*": 1}, "caps": {"web-a": {"max_epochs": 1.1}}}),
    (80, {"kind": "schedule", "points": [{"step": 0, "mixture": {"code": 1}},
                                         {"step": 150, "mixture": {"wiki": 1}, "ramp": "linear"}]}),
)  # fmt: skip


@pytest.mark.parametrize(("first", "end"), [(0, 200), (25, 90), (199, 200)])
def test_a_forecast_is_what_the_plan_reads(first: int, end: int) -> None:
    run = genesis(num_steps=200)
    commits = committed(run, *CHANGING)
    counts, sofar = counted_rows(run, commits, first, end), counted_rows(run, commits, 0, end)
    result = forecast(Plan(run, commits), first, end)
    for domain, rows in zip(result.domains, [d.num_rows for d in run.domains], strict=True):
        assert domain.num_tokens == counts[domain.name] * run.sequence_length
        assert domain.proportion == pytest.approx(counts[domain.name] / ((end - first) * run.rows_per_step))
        assert domain.epochs == pytest.approx(sofar[domain.name] / rows)


def test_a_domain_is_exhausted_at_the_first_step_that_would_exceed_its_cap() -> None:
    run = genesis(num_steps=200)
    commits = committed(run, *CHANGING)
    (event,) = [d.exhaustion for d in forecast(Plan(run, commits), 0, 200).domains if d.exhaustion]
    assert event.domain == "web-a"
    uncapped = committed(run, CHANGING[0], (30, {"kind": "static", "mixture": {"web-*": 1}}))
    assert counted_rows(run, uncapped, 0, event.step)["web-a"] <= 110
    assert counted_rows(run, uncapped, 0, event.step + 1)["web-a"] > 110


def test_exhaustions_are_found_however_long_the_program_is() -> None:
    run = genesis()
    ramp = {"kind": "schedule", "caps": {"web-a": {"max_epochs": 4}},
            "points": [{"step": 0, "mixture": {"*": 1}},
                       {"step": 500, "mixture": {"code": 3, "web-*": 1}, "ramp": "linear"}]}  # fmt: skip
    commits = committed(run, (0, {"kind": "temperature", "temperature": 1}), (8, ramp))
    expected = [event.step for event in Plan(run, commits).exhaustion()]
    found = [d.exhaustion.step for d in forecast(Plan(run, commits), 8, 1000).domains if d.exhaustion]
    assert found == expected != []


def test_a_cap_with_stop_ends_the_forecast() -> None:
    run = genesis(caps={"code": Cap(max_epochs=1, on_exhaust="stop")})
    result = forecast(Plan(run, committed(run, (0, {"kind": "static", "mixture": {"code": 1}}))), 0, 1000)
    assert result.stop_step == 125
    assert {d.name: d.epochs for d in result.domains}["code"] == 1


def test_expected_commits_put_pending_policies_at_their_step_and_the_others_first(tmp_path: Path) -> None:
    trainer = TrainerSide(tmp_path / "exp")
    trainer.report(last_step=99)
    later = trainer.journal.append(accept({"kind": "static", "mixture": {"code": 1}, "at_step": 500}, trainer.genesis))
    shadow = accept({"kind": "static", "mixture": {"code": 1}, "shadow": True}, trainer.genesis)
    trainer.journal.append(shadow)
    soon = trainer.journal.append(accept({"kind": "static", "mixture": {"wiki": 1}}, trainer.genesis))
    commits = expected_commits(trainer.read())
    soonest = 100 + ASSUMED_LEAD_STEPS
    assert [(c.lsn, c.effective_step) for c in commits] == [(2, 0), (soon.lsn, soonest), (later.lsn, 500)]
    assert soonest_step(trainer.history) == soonest


def test_the_expected_plan_is_that_of_the_expected_commits_and_derives_what_is_new_only(tmp_path: Path) -> None:
    trainer = TrainerSide(tmp_path / "exp")
    trainer.report(last_step=99)
    new = (
        9,
        accept({"kind": "static", "mixture": {"web-*": 1}, "caps": {"web-a": {"max_epochs": 40}}}, trainer.genesis),
    )
    commits = expected_commits(trainer.history, new)
    plan, whole = expected_plan(trainer.genesis, trainer.history, new), Plan(trainer.genesis, commits)
    assert plan.commits == tuple(commits)
    assert [plan.digest(step) for step in range(95, 125)] == [whole.digest(step) for step in range(95, 125)]
    assert forecast(plan, 100, 900) == forecast(whole, 100, 900)
    assert remarks(plan, 9) == remarks(whole, 9) != []


def test_a_policy_says_anew_what_has_run_out_before_it() -> None:
    """web-a ran out under the first policy: the forecast under the second names it if that one still wants it."""
    run = genesis(num_steps=1000)
    first = {"kind": "static", "mixture": {"code": 1, "web-a": 1}, "caps": {"web-a": {"max_epochs": 1}}}
    wanting = {"kind": "static", "mixture": {"wiki": 1, "web-a": 1}, "caps": {"web-a": {"max_epochs": 1}}}
    steps = {}
    for name, second in (("wanted", wanting), ("unwanted", {"kind": "static", "mixture": {"wiki": 1}})):
        found = forecast(Plan(run, committed(run, (0, first), (500, second))), 500, 1000)
        steps[name] = {d.name: d.exhaustion.step for d in found.domains if d.exhaustion}
    assert steps == {"wanted": {"web-a": 500}, "unwanted": {}}


def test_a_change_shows_the_mixtures_right_before_and_after(tmp_path: Path) -> None:
    trainer = TrainerSide(tmp_path / "exp")
    entry = accept({"kind": "static", "mixture": {"code": 1}}, trainer.genesis)
    after = expected_plan(trainer.genesis, trainer.history, (9, entry))
    before = expected_plan(trainer.genesis, trainer.history)
    changes = mixture_change(before, after, after.commits[-1].effective_step)
    assert [(c.name, round(c.before, 6), c.after) for c in changes] == [
        ("code", round(1000 / 4400, 6), 1.0), ("wiki", round(3000 / 4400, 6), 0.0),
        ("web-a", round(100 / 4400, 6), 0.0), ("web-b", round(300 / 4400, 6), 0.0),
    ]  # fmt: skip


def test_remarks_name_the_domains_that_get_nothing_and_those_that_run_out() -> None:
    run = genesis()
    document = {"kind": "static", "mixture": {"code": 1, "web-a": 1}, "caps": {"web-a": {"max_epochs": 4}}}
    assert remarks(Plan(run, committed(run, (0, document))), 0) == [
        "these domains get 0: wiki, web-b",
        "web-a reaches 4 epochs at step 100: its share goes to the other domains",
    ]


@pytest.mark.parametrize(("domain", "row"), [("web-a", 0), ("web-a", 99), ("code", 17)])
def test_a_trace_finds_every_use_of_a_row_in_order(domain: str, row: int) -> None:
    run = genesis(num_steps=200)
    plan = Plan(run, committed(run, *CHANGING))
    index = [d.name for d in run.domains].index(domain)
    expected = [
        (step, int(position), int(epoch))
        for step in range(200)
        for refs in [plan.rows(step)]
        for position, d, epoch, r in zip(refs.position_n, refs.domain_n, refs.epoch_n, refs.row_n, strict=True)
        if (d, r) == (index, row)
    ]
    assert [(use.step, use.position, use.epoch) for use in trace(plan, index, row, 200)] == expected
    assert domain != "web-a" or expected
