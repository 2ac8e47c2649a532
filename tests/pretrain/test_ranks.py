"""What the leader does alone, and the others wait for."""

from __future__ import annotations

import time

import pytest

from mixwright.pretrain.engine import start_ranks
from mixwright.pretrain.errors import TrainingError
from mixwright.pretrain.ranks import ALONE
from tests.ranks import run_ranks

LIMIT_S = 2.0
"""Of the process group, below what the leader takes."""


def work_of_the_leader() -> list[str]:
    """The leader works for longer than a rank may be lost, then works again and fails."""
    ranks = start_ranks(lambda _: None, timeout_s=LIMIT_S)

    def work() -> str:
        time.sleep(2 * LIMIT_S)
        return "prepared"

    def fail() -> None:
        raise OSError("disk full")

    seen = [str(ranks.leader_first(work))]
    try:
        ranks.leader_first(fail)
    except (OSError, TrainingError) as error:
        seen.append(f"{type(error).__name__}: {error}")
    ranks.barrier()
    ranks.leave()
    return seen


def test_the_others_wait_for_the_leader_and_end_when_it_fails() -> None:
    leader, other = run_ranks(work_of_the_leader, 2)
    assert leader == ["prepared", "OSError: disk full"]
    assert other == ["None", "TrainingError: rank 0 could not prepare what all ranks need; its own line says why"]


def test_a_rank_alone_just_works() -> None:
    assert ALONE.leader_first(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        ALONE.leader_first(lambda: 1 // 0)
