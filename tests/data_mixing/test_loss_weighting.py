"""`loss_weighting:` of a policy document: accepted, journaled, in force from a step on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.entries import PolicyEntry
from mixwright.data_mixing.errors import PolicyRejected
from mixwright.data_mixing.loss_weighting import LossWeighting
from mixwright.data_mixing.plan import Plan
from mixwright.data_mixing.timeline import CommittedPolicy
from tests.data_mixing.run_cases import TrainerSide, genesis

LINUPPER = {"strategy": "linupper", "r": 0.4}


def entry(**keys: Any) -> PolicyEntry:
    return accept({"kind": "static", "mixture": {"code": 1}, **keys}, genesis())


def test_a_policy_carries_its_weighting_into_the_journal_and_back() -> None:
    found = entry(loss_weighting=LINUPPER)
    assert found.loss_weighting == LossWeighting(strategy="linupper", r=0.4)
    assert found.document["loss_weighting"] == LINUPPER
    assert PolicyEntry.model_validate_json(found.model_dump_json()).loss_weighting == found.loss_weighting


@pytest.mark.parametrize(
    ("weighting", "message"),
    [
        ({"strategy": "lin"}, r"loss_weighting.strategy: .*'linupper'.*found 'lin'"),
        ({"r": -1}, r"loss_weighting.r"),
        ({"stratgy": "upper"}, r"loss_weighting.stratgy.*strategy"),
    ],
)
def test_a_wrong_weighting_is_refused_with_its_key(weighting: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyRejected, match=message):
        entry(loss_weighting=weighting)


def test_a_weighting_holds_until_another_policy_speaks_of_it() -> None:
    commits = [
        CommittedPolicy(0, 1, entry()),
        CommittedPolicy(10, 2, entry(loss_weighting=LINUPPER)),
        CommittedPolicy(20, 3, entry(mixture={"wiki": 1})),
        CommittedPolicy(30, 4, entry(loss_weighting={"strategy": "uniform"})),
    ]
    for plan in (Plan(genesis(), commits), Plan(genesis(), commits[:1]).extended(commits[1]).extended(commits[2])):
        assert plan.weighting(9) is None
        assert plan.weighting(10) == (10, LossWeighting(**LINUPPER))
        assert plan.weighting(25) == (10, LossWeighting(**LINUPPER))
    assert Plan(genesis(), commits).weighting(30) == (30, LossWeighting(strategy="uniform"))


def test_a_commit_that_comes_earlier_takes_back_the_weighting_of_a_later_one() -> None:
    commits = [CommittedPolicy(0, 1, entry()), CommittedPolicy(50, 2, entry(loss_weighting=LINUPPER))]
    plan = Plan(genesis(), [*commits, CommittedPolicy(40, 3, entry())])
    assert plan.weighting(60) is None


def test_keep_goes_on_with_mixture_and_caps_and_changes_the_weighting(tmp_path: Path) -> None:
    first = {"kind": "static", "mixture": {"code": 3, "wiki": 1}, "caps": {"wiki": {"max_epochs": 500}}}
    trainer = TrainerSide(tmp_path / "exp", document=first)
    found = accept({"kind": "keep", "loss_weighting": LINUPPER}, trainer.genesis, history=trainer.history)
    before = trainer.history.commits[-1].policy
    assert (found.program, found.caps) == (before.program, before.caps)
    assert found.loss_weighting is not None


def test_keep_needs_a_mixture_and_something_to_change(tmp_path: Path) -> None:
    with pytest.raises(PolicyRejected, match="needs a mixture in force, and this run has none yet"):
        accept({"kind": "keep", "loss_weighting": LINUPPER}, genesis())
    with pytest.raises(PolicyRejected, match="expected loss_weighting or caps"):
        accept({"kind": "keep"}, genesis())
    trainer = TrainerSide(tmp_path / "exp", document={"kind": "odm", "round_steps": 20})
    with pytest.raises(PolicyRejected, match="cannot take over from an online policy"):
        accept({"kind": "keep", "loss_weighting": LINUPPER}, trainer.genesis, history=trainer.history)
