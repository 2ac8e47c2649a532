"""One decision: whatever a policy does, there is a mixture to train on and a reason."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mixwright.data_mixing.arms import arms_of
from mixwright.data_mixing.decide import Decided, decide, first_stretches, perturbation_share
from mixwright.data_mixing.online import Interval, OnlineDocument, Proposal, Stretch, Window
from tests.data_mixing.online_cases import domains, interval, online, window

NAMES = ("a", "b", "c")
ALL_KINDS: list[dict[str, Any]] = [
    {"kind": "aioli", "variant": "paper"},
    {"kind": "aioli", "variant": "released"},
    {"kind": "aioli", "variant": "centred"},
    {"kind": "aioli", "update": "omd"},
    {"kind": "aioli", "update": "optimistic"},
    {"kind": "skill_it"},
    {"kind": "doremi", "reference": dict.fromkeys(NAMES, 3.0)},
    {"kind": "odm"},
    {"kind": "ado", "warm_up": 4},
    {"kind": "bandit_neural", "pulls": 6},
    {"kind": "bandit_neural", "pulls": 6, "loss": "squared"},
]


class Fixed:
    """A kind that proposes what it was given; `stretches` is one of ten steps."""

    Document = OnlineDocument

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def stretches(self, document: Any, shares: Any, decision: int, key: int) -> tuple[Stretch, ...]:
        return (Stretch(num_steps=10, shares=tuple(shares), is_perturbation=True),)

    def propose(self, document: Any, seen: Window, state: Any) -> Proposal:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def calm(num_arms: int = 3, **more: Any) -> Window:
    rows = [100] * num_arms
    return window([interval(0, 10, rows, [5.0] * num_arms, [4.9] * num_arms)], **more)


def decided(answer: Any, seen: Window | None = None, guard: dict[str, Any] | None = None, **more: Any) -> Decided:
    document = OnlineDocument.model_validate({"kind": "fixed", "guard": guard or {}})
    return decide(Fixed(answer), document, seen or calm(), {"old": 1}, 7, **more)


def test_a_proposal_is_guarded_and_laid_out() -> None:
    result = decided(Proposal(shares=(1.0, 0.0, 0.0), state={"new": 2}), guard={"floor": 0.1, "max_l1_change": 2})
    assert result.shares == pytest.approx((0.8, 0.1, 0.1))
    assert (result.action, result.reason, result.proposal.state) == ("propose", "", {"new": 2})
    assert result.stretches[0].shares == result.shares
    assert result.proposal.shares == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (np.linalg.LinAlgError("Singular\nmatrix"), "LinAlgError: Singular matrix"),
        (Proposal(shares=(0.5, 0.5)), "expected 3 shares"),
        (Proposal(shares=(0.5, 0.5, -1)), "share of arm 2 is -1"),
        (Proposal.model_construct(shares=(math.nan, 0.5, 0.5), state={}, diagnostics={}, held=""), "not finite"),
        (Proposal(shares=(0, 0, 0)), "all shares are zero"),
        (Proposal(shares=(1, 1, 1), state={"x": math.nan}), "JSON"),
        (Proposal(shares=(1, 1, 1), state={"x": object()}), "not JSON serializable"),
        ("nonsense", "AttributeError"),
    ],
)
def test_a_policy_that_fails_holds_mixture_and_state_or_falls_back(answer: Any, reason: str) -> None:
    held = decided(answer, calm(shares=[0.2, 0.3, 0.5]))
    assert (held.action, held.shares, held.proposal.state) == ("hold", (0.2, 0.3, 0.5), {"old": 1})
    assert reason in held.reason
    back = decided(answer, calm(shares=[0.2, 0.3, 0.5]), guard={"max_l1_change": 2}, fallback=(0.6, 0.2, 0.2))
    assert (back.action, back.shares) == ("fallback", pytest.approx((0.6, 0.2, 0.2)))


def test_a_policy_that_holds_keeps_what_it_learned() -> None:
    proposal = Proposal(shares=(1, 0, 0), state={"new": 2}, held="too little")
    result = decided(proposal, calm(shares=[0.2, 0.3, 0.5]), fallback=(1.0, 0.0, 0.0))
    assert (result.action, result.reason, result.proposal.state) == ("hold", "too little", {"new": 2})
    assert result.shares == (0.2, 0.3, 0.5)


def test_too_few_tokens_hold() -> None:
    result = decided(Proposal(shares=(1, 0, 0)), guard={"min_tokens": 30_001})
    assert result.action == "hold"
    assert result.reason == "30,000 tokens since the last decision, guard.min_tokens asks for 30,001"
    assert decided(Proposal(shares=(1, 0, 0)), guard={"min_tokens": 30_000}).action == "propose"


def test_an_empty_window_holds() -> None:
    assert decided(Proposal(shares=(1, 0, 0)), calm().model_copy(update={"intervals": ()})).action == "hold"


def test_one_arm_has_it_all() -> None:
    result = decided(RuntimeError("never asked"), calm(1))
    assert (result.shares, result.action, result.reason) == ((1.0,), "hold", "there is one arm")


def test_nothing_is_explored_when_no_decision_follows() -> None:
    last = decided(Proposal(shares=(1, 1, 1)), calm(num_steps=20))
    assert [(s.num_steps, s.evaluate, s.is_perturbation) for s in last.stretches] == [(10, False, False)]
    assert decided(Proposal(shares=(1, 1, 1)), calm(num_steps=21)).stretches[0].is_perturbation


def test_a_layout_that_fails_leaves_a_round_of_the_same_length() -> None:
    kind = Fixed(Proposal(shares=(1, 1, 1)))
    kind.stretches = lambda *_: 1 / 0  # type: ignore[assignment]
    result = decide(kind, OnlineDocument(kind="fixed"), calm(), {}, 7)
    assert [(s.num_steps, s.evaluate) for s in result.stretches] == [(10, True)]


def test_the_part_that_perturbs_is_counted_in_steps() -> None:
    shares = (0.5, 0.5)
    laid = [Stretch(num_steps=30, shares=shares), Stretch(num_steps=10, shares=shares, is_perturbation=True)]
    assert perturbation_share(laid) == 0.25
    assert perturbation_share([]) == 0.0


GARBAGE = [math.nan, math.inf, -math.inf, 0.0, -5.0, 1e300, -1e300, 1e-300, 3.0]


def garbage_interval(draw: np.random.Generator, start: int) -> Interval:
    def values() -> list[float]:
        return [float(draw.choice(GARBAGE)) for _ in NAMES]

    rows = draw.choice([0, 0, 1, 7, 10**9], 3)
    rate = [None, 0.0, 1e-3, 1e300][draw.integers(4)]
    return interval(
        start, int(draw.integers(1, 9)), rows, values(), values(), train_loss=values(), learning_rate=rate,
        is_perturbation=bool(draw.integers(2)),
    )  # fmt: skip


@pytest.mark.parametrize(
    "keys", ALL_KINDS, ids=lambda keys: "-".join(str(v) for v in keys.values() if v.__class__ is str)
)
def test_no_numbers_break_any_kind(keys: dict[str, Any]) -> None:
    kind, document = online(keys)
    arms = arms_of(document, domains(*NAMES))
    draw, state, shares = np.random.default_rng(1), {}, arms.initial_K
    assert first_stretches(kind, document, arms, 3)
    for decision in range(40):
        intervals: list[Interval] = []
        for _ in range(draw.integers(1, 8)):
            intervals.append(garbage_interval(draw, intervals[-1].last_step + 1 if intervals else 0))
        seen = window(intervals, list(shares), arms=NAMES, decision=decision, num_steps=10**6)
        before = np.array(shares)
        result = decide(kind, document, seen, state, decision)
        assert sum(result.shares) == pytest.approx(1)
        assert min(result.shares) >= 0.005 - 1e-9
        assert np.abs(np.array(result.shares) - before).sum() <= 0.5 + 1e-9
        assert all(sum(stretch.shares) == pytest.approx(1) for stretch in result.stretches)
        assert decide(kind, document, seen, state, decision) == result
        state, shares = result.proposal.state, result.shares


@pytest.mark.parametrize(
    "keys", ALL_KINDS, ids=lambda keys: "-".join(str(v) for v in keys.values() if v.__class__ is str)
)
def test_every_kind_takes_one_domain(keys: dict[str, Any]) -> None:
    kind, document = online({**keys, **({"reference": {"a": 3.0}} if "reference" in keys else {})})
    arms = arms_of(document, domains("a"))
    laid = first_stretches(kind, document, arms, 3)
    assert {stretch.shares for stretch in laid} == {(1.0,)}
    result = decide(kind, document, window([interval(0, 5, [9], [3.0], [2.0])], arms=("a",)), {}, 3)
    assert (result.shares, result.action) == ((1.0,), "hold")
