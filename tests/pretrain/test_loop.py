from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixwright.data_mixing.entries import PolicyEntry, Segment
from mixwright.data_mixing.errors import PlanMismatch
from mixwright.data_mixing.plan import CommittedPolicy, Plan, rank_positions, rows_digest
from mixwright.pretrain.errors import NonFiniteLoss
from mixwright.pretrain.loop import _check_digest, _report_is_due, domain_losses
from mixwright.pretrain.ranks import ControlWord, PendingControlWord, Ranks
from tests.data_mixing.test_leader import GENESIS
from tests.pretrain.tiny import tiny_config
from tests.ranks import run_ranks

HALF = 1 << 30
PLAN = Plan(
    GENESIS,
    [CommittedPolicy(0, 1, PolicyEntry(document={}, program=(Segment(start_step=0, proportions=(HALF, HALF, 0)),)))],
)


def trainer_of(plan: Plan) -> Any:
    """The two parts of a trainer that the comparison looks at."""
    return SimpleNamespace(leader=object(), feeder=SimpleNamespace(plan=plan))


def test_rows_that_the_plan_prescribes_pass() -> None:
    _check_digest(trainer_of(PLAN), 5, ControlWord(PLAN.digest(5), 0, stop=False))


def test_rows_of_another_step_or_in_another_order_stop_the_run() -> None:
    with pytest.raises(PlanMismatch, match="step 5: the ranks read rows with digest"):
        _check_digest(trainer_of(PLAN), 5, ControlWord(PLAN.digest(6), 0, stop=False))
    swapped = PLAN.rows(5)
    swapped.row_n[[0, 1]] = swapped.row_n[[1, 0]]
    with pytest.raises(PlanMismatch):
        _check_digest(trainer_of(PLAN), 5, ControlWord(rows_digest(GENESIS, 5, swapped), 0, stop=False))


def exchange() -> ControlWord:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.new_group(backend="gloo"))
    share = rows_digest(GENESIS, 3, PLAN.rows(3, rank_positions(GENESIS.rows_per_step, ranks.rank, ranks.size)))
    word = PendingControlWord(ranks, share, committed_lsn=17 if ranks.is_leader else 99, stop=ranks.rank == 1).wait()
    ranks.leave()
    return word


def test_a_control_word_adds_digests_modulo_2_to_the_64_and_takes_the_leaders_entry() -> None:
    words = run_ranks(exchange, 2)
    assert words == [ControlWord(PLAN.digest(3), committed_lsn=17, stop=True)] * 2


def test_reports_are_due_at_their_interval_at_checkpoints_and_at_the_end() -> None:
    config = tiny_config(Path("runs"), Path("store"), mixing__report_every=5, checkpoint__every=4)
    assert [step + 1 for step in range(12) if _report_is_due(config, step)] == [4, 5, 8, 10, 12]


def test_losses_of_domains_without_rows_are_left_out_and_one_that_is_not_finite_is_named() -> None:
    rows = [[6.0, 20.0, 4.0, 2.0], [0.0, 0.0, 0.0, 0.0], [3.0, 9.0, 1.0, 1.0]]
    first, _, last = (domain.name for domain in GENESIS.domains)
    found = domain_losses(GENESIS.domains, rows, "steps 3-5")
    assert {name: (loss.loss_sum, loss.num_tokens) for name, loss in found.items()} == {first: (6.0, 4), last: (3.0, 1)}
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NonFiniteLoss, match=f"validation at step 6: the loss of domain '{last}' is {bad}"):
            domain_losses(GENESIS.domains, [*rows[:2], [bad, bad, 1.0, 1.0]], "validation at step 6")
    with pytest.raises(NonFiniteLoss):  # the sum of squares overflows first
        domain_losses(GENESIS.domains, [*rows[:2], [1e200, float("inf"), 1.0, 1.0]], "steps 3-5")
