"""The kinds of policies: what program each compiles to."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mixwright.data_mixing import policies
from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.entries import PROPORTION_TOTAL, PolicyEntry
from mixwright.data_mixing.errors import PolicyRejected
from mixwright.data_mixing.plan import CommittedPolicy, Plan
from mixwright.data_mixing.policies.schedule import MAX_RAMP_SEGMENTS
from mixwright.data_mixing.policy import policy_kinds
from tests.data_mixing.run_cases import SIZES, TrainerSide, genesis

NAMES = list(SIZES)
TOLERANCE = len(NAMES) / PROPORTION_TOTAL


def compiled(document: dict[str, Any], **run: Any) -> PolicyEntry:
    return accept(document, genesis(**run))


def mixture_at(entry: PolicyEntry, step: int) -> dict[str, float]:
    segment = [segment for segment in entry.program if segment.start_step <= step][-1]
    return {name: p / PROPORTION_TOTAL for name, p in zip(NAMES, segment.proportions, strict=True)}


def schedule(*points: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "schedule", "points": list(points)}


def test_static_divides_a_glob_by_rows_and_gives_the_rest_nothing() -> None:
    entry = compiled({"kind": "static", "mixture": {"code": 3, "web-*": 1}})
    assert [segment.start_step for segment in entry.program] == [0]
    assert mixture_at(entry, 0) == pytest.approx(
        {"code": 3 / 4, "wiki": 0.0, "web-a": 1 / 16, "web-b": 3 / 16}, abs=TOLERANCE
    )


def test_a_name_takes_its_domain_out_of_a_glob() -> None:
    entry = compiled({"kind": "static", "mixture": {"*": 1, "wiki": 1}})
    rest = sum(size for name, size in SIZES.items() if name != "wiki")
    expected = {name: size / rest / 2 for name, size in SIZES.items()} | {"wiki": 0.5}
    assert mixture_at(entry, 0) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("scale", [1e-300, 1, 1e308])
def test_only_the_ratio_of_numbers_counts(scale: float) -> None:
    entry = compiled({"kind": "static", "mixture": {"code": scale, "wiki": scale}})
    assert entry.program[0].proportions == (PROPORTION_TOTAL // 2, PROPORTION_TOTAL // 2, 0, 0)


def test_a_positive_number_never_becomes_nothing() -> None:
    entry = compiled({"kind": "static", "mixture": {"code": 1e308, "wiki": 5e-324}})
    assert entry.program[0].proportions == (PROPORTION_TOTAL - 1, 1, 0, 0)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0, 5.0])
def test_temperature_is_rows_to_the_power_of_one_over_t(temperature: float) -> None:
    entry = compiled({"kind": "temperature", "temperature": temperature})
    powers = {name: size ** (1 / temperature) for name, size in SIZES.items()}
    expected = {name: power / math.fsum(powers.values()) for name, power in powers.items()}
    assert mixture_at(entry, 0) == pytest.approx(expected, abs=TOLERANCE)


def test_temperature_one_is_exactly_proportional_to_rows() -> None:
    entry = compiled({"kind": "temperature", "temperature": 1})
    total = sum(SIZES.values())
    for size, proportion in zip(SIZES.values(), entry.program[0].proportions, strict=True):
        assert abs(Fraction(proportion) - Fraction(size * PROPORTION_TOTAL, total)) <= 1


def test_extreme_temperatures_are_one_domain_and_uniform() -> None:
    cold = mixture_at(compiled({"kind": "temperature", "temperature": 1e-9}), 0)
    assert cold["wiki"] == pytest.approx(1, abs=TOLERANCE)
    assert min(cold.values()) > 0
    hot = mixture_at(compiled({"kind": "temperature", "temperature": 1e300}), 0)
    assert hot == pytest.approx(dict.fromkeys(NAMES, 0.25), abs=TOLERANCE)


def test_temperature_over_some_domains_leaves_the_others_out() -> None:
    entry = compiled({"kind": "temperature", "temperature": 1, "domains": ["web-*", "code"]})
    assert mixture_at(entry, 0) == pytest.approx(
        {"code": 1000 / 1400, "wiki": 0.0, "web-a": 100 / 1400, "web-b": 300 / 1400}, abs=TOLERANCE
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"temperature": 0}, "temperature: input should be greater than 0 (found 0)"),
        ({"temperature": float("inf")}, "temperature: input should be a finite number (found inf)"),
        ({}, "temperature: required key is missing"),
        ({"temperature": 1, "domains": ["wikki"]}, "domains.wikki: no such domain; did you mean 'wiki'?"),
        ({"temperature": 1, "mixture": {"code": 1}}, "mixture: unknown key; did you mean 'temperature'?"),
    ],
)
def test_a_wrong_temperature_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyRejected) as caught:
        compiled({"kind": "temperature", **keys})
    assert str(caught.value).startswith(message.split(";")[0])


def test_a_held_schedule_changes_exactly_at_its_points() -> None:
    entry = compiled(schedule({"step": 10, "mixture": {"code": 1}}, {"step": 400, "mixture": {"wiki": 1}}))
    assert [segment.start_step for segment in entry.program] == [0, 400]
    assert mixture_at(entry, 399)["code"] == mixture_at(entry, 400)["wiki"] == 1


def test_equal_neighbours_are_one_segment() -> None:
    same = {"mixture": {"code": 1, "wiki": 1}}
    entry = compiled(schedule({"step": 0, **same}, {"step": 100, **same, "ramp": "linear"}, {"step": 200, **same}))
    assert [segment.start_step for segment in entry.program] == [0]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize(("start", "end"), [(0, 7), (0, 64), (100, 165), (13, 1000)])
def test_a_ramp_has_the_mixture_of_the_middle_of_every_stretch(kind: str, start: int, end: int) -> None:
    entry = compiled(
        schedule({"step": start, "mixture": {"code": 1}}, {"step": end, "mixture": {"wiki": 1}, "ramp": kind})
    )
    starts = [segment.start_step for segment in entry.program if start <= segment.start_step < end]
    assert len(starts) == min(end - start, MAX_RAMP_SEGMENTS)
    for first, after in zip(starts, [*starts[1:], end], strict=True):
        fraction = ((first + after) / 2 - start) / (end - start)
        progress = fraction if kind == "linear" else (1 - math.cos(math.pi * fraction)) / 2
        assert mixture_at(entry, first)["wiki"] == pytest.approx(progress, abs=TOLERANCE)
        assert mixture_at(entry, after - 1) == mixture_at(entry, first)
    assert mixture_at(entry, end)["wiki"] == 1


def test_a_linear_ramp_reads_as_many_rows_as_the_straight_line() -> None:
    entry = compiled(
        schedule({"step": 0, "mixture": {"code": 1}}, {"step": 1000, "mixture": {"wiki": 1}, "ramp": "linear"})
    )
    run = genesis()
    cursors = Plan(run, [CommittedPolicy(0, 1, entry)]).cursors(1000)
    straight = sum(run.rows_per_step * (step + 0.5) / 1000 for step in range(1000))
    assert abs(int(cursors[NAMES.index("wiki")]) - straight) <= 2


def test_a_ramp_between_mixtures_keeps_every_proportion_between_its_ends() -> None:
    first, last = {"code": 5, "wiki": 1, "web-a": 1}, {"code": 1, "web-b": 3}
    entry = compiled(schedule({"step": 0, "mixture": first}, {"step": 640, "mixture": last, "ramp": "cosine"}))
    rows = np.array([segment.proportions for segment in entry.program])
    assert np.all(rows.sum(axis=1) == PROPORTION_TOTAL)
    differences = np.diff(rows, axis=0)
    assert np.all((differences >= -1).all(axis=0) | (differences <= 1).all(axis=0))


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "points: expected at least one point, found an empty list"),
        ([{"step": 5, "mixture": {"code": 1}}] * 2, "points: steps must increase, found 5 after 5"),
        ([{"step": 0, "mixture": {"code": 1}, "ramp": "linear"}],
         "points: the first point has none before it to start a linear ramp from"),
        ([{"step": 0, "mixture": {"cod": 1}}], "points.0.mixture.cod: no such domain; did you mean 'code'?"),
        ([{"step": 0, "mixtur": {"code": 1}}], "points.0.mixture: required key is missing"),
        ([{"step": 0, "mixture": {"code": 1}}, {"step": 9, "mixture": {"code": 1}, "ramp": "lin"}],
         "points.1.ramp: input should be 'hold', 'linear' or 'cosine' (found 'lin')"),
        ([{"step": 1001, "mixture": {"code": 1}}], "points.0.step: step 1001 is beyond the run's 1000 steps"),
        ([{"step": n, "mixture": {"code": 1}} for n in range(257)], "points: tuple should have at most 256 items"),
        ("0: code", "points: input should be a valid tuple"),
    ],
)  # fmt: skip
def test_a_wrong_schedule_is_refused_with_the_point(points: Any, message: str) -> None:
    with pytest.raises(PolicyRejected) as caught:
        compiled({"kind": "schedule", "points": points})
    assert str(caught.value).startswith(message)


def test_a_schedule_may_end_its_last_ramp_with_the_run() -> None:
    entry = compiled(
        schedule({"step": 0, "mixture": {"code": 1}}, {"step": 1000, "mixture": {"wiki": 1}, "ramp": "linear"})
    )
    assert mixture_at(entry, 999)["wiki"] > 0.98


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"


def test_the_policy_that_the_guide_adds_works_as_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (ROOT / "docs" / "mixing.md").read_text().partition("## Adding a policy")[2]
    (tmp_path / "two_thirds.py").write_text(guide.partition("```python\n")[2].partition("```")[0])
    monkeypatch.setattr(policies, "__path__", [*policies.__path__, str(tmp_path)])
    assert "two_thirds" in policy_kinds()
    entry = compiled({"kind": "two_thirds", "first": "code"})
    assert mixture_at(entry, 0)["code"] == pytest.approx(2 / 3, abs=TOLERANCE)
    with pytest.raises(PolicyRejected, match="firts: unknown key; did you mean 'first'"):
        compiled({"kind": "two_thirds", "first": "code", "firts": 1})


@pytest.mark.parametrize("path", sorted((CONFIGS / "policies").glob("*.yaml")), ids=lambda path: path.name)
def test_the_examples_are_accepted_by_a_run_on_the_corpora_they_are_for(path: Path, tmp_path: Path) -> None:
    corpora = "quickstart_corpora.yaml" if path.name.startswith("quickstart") else "shared_corpora.yaml"
    names = yaml.safe_load((CONFIGS / corpora).read_text())["domains"]
    first = {"kind": "static", "mixture": dict.fromkeys(names, 1)}
    begun = TrainerSide(tmp_path / "exp", genesis(sizes=dict.fromkeys(names, 2000), num_steps=3000), first)
    assert accept(path.read_text(), begun.genesis, history=begun.history).program
