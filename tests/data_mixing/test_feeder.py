from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.entries import Genesis
from mixwright.data_mixing.errors import DomainExhausted, JournalError, StoreChanged
from mixwright.data_mixing.feeder import Feeder, StepRows, micro_batches, store_order
from mixwright.data_mixing.journal import Journal
from mixwright.data_mixing.leader import commit_body, open_run
from mixwright.data_mixing.store import TokenStore

ROWS, STEPS = 12, 60
TEMPERATURE = {"kind": "temperature", "temperature": 1.0}


@pytest.fixture
def store(tiny_store: Path) -> TokenStore:
    return TokenStore.open(tiny_store)


def genesis_for(store: TokenStore) -> Genesis:
    return Genesis(run="feeder", seed=9, sequence_length=16, rows_per_step=ROWS, num_steps=STEPS,
                   store_fingerprint=store.fingerprint, domains=store.domains())  # fmt: skip


def start_run(folder: Path, store: TokenStore, policy: dict) -> Journal:
    genesis = genesis_for(store)
    journal = Journal(folder, writer="leader")
    open_run(journal, genesis, accept(policy, genesis))
    return journal


def commit(journal: Journal, store: TokenStore, policy: dict, effective_step: int) -> int:
    """What controller and leader do: POLICY, then COMMIT; returns the commit's entry."""
    from mixwright.data_mixing.history import RunHistory
    from mixwright.data_mixing.journal import read_entries

    accepted = journal.append(accept(policy, genesis_for(store)))
    history = RunHistory()
    for entry in read_entries(journal.folder):
        history.apply(entry)
    return journal.append(commit_body(history, accepted.lsn, accepted.body, effective_step)).lsn


def read(folder: Path, store: TokenStore, rank: int, world: int, steps: range, prefetch: int = 2) -> list[StepRows]:
    with Feeder(folder, store, rank=rank, num_ranks=world, start_step=steps.start, prefetch_steps=prefetch) as feeder:
        return [feeder.next() for _ in steps]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("micro_rows", [1, 2, 5])
def test_ranks_and_micro_batches_in_order_are_the_global_batch(
    store: TokenStore, tmp_path: Path, world: int, micro_rows: int
) -> None:
    journal = start_run(tmp_path, store, TEMPERATURE)
    commit(journal, store, {"kind": "static", "mixture": {"colours": 2, "numbers": 1}}, 7)
    whole = read(tmp_path, store, 0, 1, range(14))
    parts = [read(tmp_path, store, rank, world, range(14)) for rank in range(world)]
    for step in range(14):
        pieces = [piece for part in parts for piece in micro_batches(part[step], micro_rows)]
        tokens_nS, domain_n, row_n = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
        np.testing.assert_array_equal(tokens_nS, whole[step].tokens_nS)
        np.testing.assert_array_equal(domain_n, whole[step].domain_n)
        np.testing.assert_array_equal(row_n, whole[step].row_n)
        assert sum(part[step].digest for part in parts) % (1 << 64) == whole[step].digest


def test_rows_are_the_stores_rows_that_the_plan_names(store: TokenStore, tmp_path: Path) -> None:
    start_run(tmp_path, store, TEMPERATURE)
    with Feeder(tmp_path, store, rank=0, num_ranks=1, start_step=0, prefetch_steps=1) as feeder:
        rows, plan = feeder.next(), feeder.plan
    refs = plan.rows(0)
    names = [domain.name for domain in plan.genesis.domains]
    for tokens_S, domain, row in zip(rows.tokens_nS, refs.domain_n, refs.row_n, strict=True):
        np.testing.assert_array_equal(tokens_S, store.rows(names[domain], "train", int(row), 1)[0])
    assert rows.tokens_nS.dtype == np.int64


def test_starting_later_gives_the_same_steps(store: TokenStore, tmp_path: Path) -> None:
    start_run(tmp_path, store, TEMPERATURE)
    from_start = read(tmp_path, store, 1, 2, range(20))
    for step in (1, 7, 19):
        np.testing.assert_array_equal(
            read(tmp_path, store, 1, 2, range(step, step + 1))[0].tokens_nS, from_start[step].tokens_nS
        )


def test_a_commit_is_applied_at_exactly_its_step_once_it_is_announced(store: TokenStore, tmp_path: Path) -> None:
    journal = start_run(tmp_path, store, TEMPERATURE)
    only = {"kind": "static", "mixture": {"numbers": 1}}
    numbers = [domain.name for domain in store.domains()].index("numbers")
    with Feeder(tmp_path, store, rank=0, num_ranks=1, start_step=0, prefetch_steps=2) as feeder:
        first = feeder.next()
        lsn = commit(journal, store, only, 8)
        assert feeder.committed_lsn < lsn
        feeder.follow(lsn)
        rest = [feeder.next() for _ in range(11)]
    assert set(first.domain_n) | {d for rows in rest[:7] for d in rows.domain_n} > {numbers}
    assert [set(rows.domain_n) for rows in rest[7:]] == [{numbers}] * 4


def test_a_commit_that_comes_too_late_is_an_error_and_not_a_fork(store: TokenStore, tmp_path: Path) -> None:
    journal = start_run(tmp_path, store, TEMPERATURE)
    with Feeder(tmp_path, store, rank=0, num_ranks=1, start_step=0, prefetch_steps=6) as feeder:
        for _ in range(4):
            feeder.next()
        lsn = commit(journal, store, {"kind": "static", "mixture": {"numbers": 1}}, 3)
        with pytest.raises(JournalError, match=r"takes effect at step 3, but step \d+ is already prepared"):
            feeder.follow(lsn)


def test_the_end_of_the_plan_reaches_the_training_thread(store: TokenStore, tmp_path: Path) -> None:
    capped = {"kind": "static", "mixture": {"colours": 1}, "caps": {"colours": {"max_epochs": 1, "on_exhaust": "stop"}}}
    start_run(tmp_path, store, capped)
    full_steps = store.num_rows("colours") // ROWS
    assert full_steps < STEPS
    with Feeder(tmp_path, store, rank=0, num_ranks=1, start_step=0, prefetch_steps=2) as feeder:
        for _ in range(full_steps):
            feeder.next()
        with pytest.raises(DomainExhausted, match="'colours' reached max_epochs=1"):
            feeder.next()


def test_another_store_is_refused(store: TokenStore, tmp_path: Path) -> None:
    genesis = genesis_for(store).model_copy(update={"store_fingerprint": "f" * 64})
    with pytest.raises(StoreChanged, match="restore the old store or start a new run"):
        store_order(genesis, store)


def test_leaving_the_feeder_ends_its_thread(store: TokenStore, tmp_path: Path) -> None:
    start_run(tmp_path, store, TEMPERATURE)
    with Feeder(tmp_path, store, rank=0, num_ranks=1, start_step=0, prefetch_steps=1) as feeder:
        thread = feeder._thread
    assert not thread.is_alive()
