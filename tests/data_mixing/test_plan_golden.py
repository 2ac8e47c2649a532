"""The meaning of plan_version 1 is pinned: by vectors in a file and by a second, slow plan in plain integers."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from mixwright.data_mixing.domain import Cap, Domain
from mixwright.data_mixing.entries import Genesis, PolicyEntry, Segment
from mixwright.data_mixing.errors import DomainExhausted
from mixwright.data_mixing.plan import CommittedPolicy, Plan, run_digest
from tests.data_mixing import plan_reference
from tests.data_mixing.plan_cases import ordered

CASES = json.loads(plan_reference.GOLDEN.read_text())
NAMES = [case["spec"]["name"] for case in CASES]


def cap_of(max_epochs: str | None, on_exhaust: str) -> Cap:
    return Cap.model_validate(
        {"max_epochs": None if max_epochs is None else float(max_epochs), "on_exhaust": on_exhaust}
    )


def plan_of(spec: Mapping[str, Any]) -> Plan:
    domains = tuple(
        Domain(name=name, num_rows=rows, fingerprint="", cap=cap_of(max_epochs, action))
        for name, rows, max_epochs, action in spec["domains"]
    )
    run = Genesis(
        run="golden", seed=spec["seed"], sequence_length=1, rows_per_step=spec["rows_per_step"],
        num_steps=spec["num_steps"], store_fingerprint="", domains=domains,
    )  # fmt: skip
    return Plan(
        run, [CommittedPolicy(c["effective_step"], lsn, policy_of(run, c)) for lsn, c in enumerate(spec["commits"])]
    )


def policy_of(run: Genesis, commit: Mapping[str, Any]) -> PolicyEntry:
    program = tuple(
        Segment(start_step=start, proportions=tuple(mixture[domain.name] for domain in run.domains))
        for start, mixture in commit["segments"]
    )
    return PolicyEntry(document={}, program=program, caps={name: cap_of(*cap) for name, cap in commit["caps"].items()})


def named(plan: Plan, step: int) -> list[list[Any]]:
    domains = plan.genesis.domains
    return [[domains[domain].name, epoch, row] for _, domain, epoch, row in ordered(plan.rows(step))]


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_the_plan_gives_the_golden_vectors(case: Mapping[str, Any]) -> None:
    plan, expected = plan_of(case["spec"]), case["expected"]
    num_steps = len(expected["step_digests"])
    assert plan.stop_step == expected["stop_step"]
    assert named(plan, 0) == expected["first_batch"]
    assert [f"{plan.digest(step):016x}" for step in range(num_steps)] == expected["step_digests"]
    assert [plan.state_digest(step) for step in range(len(expected["state_digests"]))] == expected["state_digests"]
    assert f"{run_digest(plan, num_steps):016x}" == expected["run_digest"]
    assert named(plan, num_steps - 1) == expected["last_batch"]
    cursors = dict(zip((domain.name for domain in plan.genesis.domains), plan.cursors(num_steps).tolist(), strict=True))
    assert cursors == expected["cursors"]


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_the_slow_plan_still_gives_the_golden_vectors(case: Mapping[str, Any]) -> None:
    assert json.loads(json.dumps(plan_reference.run_case(case["spec"]))) == case["expected"]


def test_the_golden_cases_are_those_that_the_reference_describes() -> None:
    assert json.loads(json.dumps(plan_reference.case_specs())) == [case["spec"] for case in CASES]


@pytest.mark.parametrize("salt", range(12))
def test_the_plan_equals_the_slow_plan_on_random_logs_with_caps(salt: int) -> None:
    """Up to eight domains of 1 to 60 rows, five commits of up to three segments, caps of every kind."""
    spec = random_spec(salt)
    plan, expected = plan_of(spec), plan_reference.run_case(spec)
    num_steps = len(expected["step_digests"])
    assert plan.stop_step == expected["stop_step"]
    assert [f"{plan.digest(step):016x}" for step in range(num_steps)] == expected["step_digests"]
    assert [plan.state_digest(step) for step in range(len(expected["state_digests"]))] == expected["state_digests"]
    if expected["stop_step"] is not None:
        with pytest.raises(DomainExhausted):
            plan.rows(expected["stop_step"])


def random_spec(salt: int) -> dict[str, Any]:
    def pick(*key: int, below: int) -> int:
        return plan_reference.mix_key(1000, salt, *key) % below

    names = [f"domain-{i}" for i in range(1 + pick(0, below=8))]
    actions = [(None, "renormalise"), ("1.5", "renormalise"), ("3", "renormalise"), ("0.7", "allow"), ("6", "stop")]
    domains = [[name, 1 + pick(1, i, below=60), *actions[pick(2, i, below=5)]] for i, name in enumerate(names)]
    commits = []
    for index, step in enumerate(sorted({0, *(pick(3, i, below=25) for i in range(4))})):
        starts = sorted({0, *(pick(4, index, i, below=30) for i in range(2))})
        mixtures = [
            plan_reference.spread(plan_reference.drawn_weights(names, pick(5, index, start, below=10**6), 4))
            for start in starts
        ]
        caps = {
            name: actions[pick(6, index, i, below=4)] for i, name in enumerate(names) if pick(7, index, i, below=4) == 0
        }
        segments = [list(pair) for pair in zip(starts, mixtures, strict=True)]
        commits.append({"effective_step": step, "segments": segments, "caps": caps})
    return {
        "name": "random", "seed": salt, "rows_per_step": 1 + pick(8, below=24), "num_steps": 30,
        "domains": domains, "commits": commits,
    }  # fmt: skip
