from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.entries import Mark, PolicyEntry, Report
from mixwright.data_mixing.errors import (
    ConfigError,
    DataError,
    JournalError,
    MixingError,
    PlanMismatch,
    PolicyRejected,
    StoreChanged,
)
from mixwright.data_mixing.feeder import Feeder
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.journal import Journal, read_entries
from mixwright.data_mixing.loader import MicroBatch, MixingLoader, NewRun, open_loader
from mixwright.data_mixing.plan import run_digest
from mixwright.data_mixing.store import TokenStore

ROWS, STEPS, WIDTH = 12, 30, 17
POLICY = {"kind": "temperature", "temperature": 1.0}
NEW = NewRun(policy=POLICY, rows_per_step=ROWS, num_steps=STEPS, seed=5)


@pytest.fixture
def store(tiny_store: Path) -> TokenStore:
    return TokenStore.open(tiny_store)


class Together:
    """A sum over ranks that are threads."""

    def __init__(self, size: int) -> None:
        self._barrier, self._parts = threading.Barrier(size, timeout=30), [np.zeros(0)] * size

    def of(self, rank: int) -> Callable[[np.ndarray], np.ndarray]:
        def sum_over_ranks(array: np.ndarray) -> np.ndarray:
            self._parts[rank] = array.copy()
            self._barrier.wait()
            total: np.ndarray = np.sum(self._parts, axis=0, dtype=array.dtype)
            self._barrier.wait()
            return total

        return sum_over_ranks


def on_ranks(size: int, work: Callable[[int, dict[str, Any]], Any]) -> list[Any]:
    """Results of `work(rank, arguments for open_loader)` in order of rank, all at the same time."""
    together = Together(size)
    with ThreadPoolExecutor(size) as pool:
        arguments = [{"rank": rank, "num_ranks": size, "sum_over_ranks": together.of(rank)} for rank in range(size)]
        return list(pool.map(work, range(size), arguments))


def read_all(loader: MixingLoader, until: int = STEPS) -> list[tuple[list[MicroBatch], int]]:
    """Micro-batches of every step and the run digest after it."""
    seen = []
    with loader:
        for step in loader:
            for batch in step:
                loader.observe(batch, np.full((batch.num_rows, WIDTH - 1), 2.0))
            loader.end_step()
            seen.append((list(step), loader.run_digest))
            if step.number + 1 == until:
                break
    return seen


def history_of(run_dir: Path) -> RunHistory:
    history = RunHistory()
    for entry in read_entries(run_dir / "journal"):
        history.apply(entry)
    return history


def tokens_of(batches: list[MicroBatch]) -> np.ndarray:
    return np.concatenate([batch.tokens_BS for batch in batches])


def test_rows_and_digests_are_the_plans_in_order(store: TokenStore, tmp_path: Path) -> None:
    seen = read_all(open_loader(tmp_path / "run", store, begin=NEW, micro_batch_rows=5))
    plan = history_of(tmp_path / "run").plan()
    assert [digest for _, digest in seen] == [run_digest(plan, step + 1) for step in range(STEPS)]
    for step, (batches, _) in enumerate(seen):
        refs = plan.rows(step)
        assert [batch.num_rows for batch in batches] == [5, 5, 2]
        np.testing.assert_array_equal(np.concatenate([batch.domain_B for batch in batches]), refs.domain_n)
        np.testing.assert_array_equal(np.concatenate([batch.row_B for batch in batches]), refs.row_n)
        np.testing.assert_array_equal(tokens_of(batches), store.gather(refs.domain_n, refs.row_n))
        assert batches[0].tokens_BS.dtype == np.int64


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_in_order_make_up_the_batch_and_agree_on_the_digest(store: TokenStore, tmp_path: Path, size: int) -> None:
    alone = read_all(open_loader(tmp_path / "alone", store, begin=NEW, micro_batch_rows=ROWS))

    def work(rank: int, arguments: dict[str, Any]) -> Any:
        return read_all(open_loader(tmp_path / "run", store, begin=NEW, micro_batch_rows=2, **arguments))

    ranks = on_ranks(size, work)
    for step, (batches, digest) in enumerate(alone):
        pieces = [piece for rank in ranks for piece in rank[step][0]]
        np.testing.assert_array_equal(tokens_of(pieces), tokens_of(batches))
        assert {rank[step][1] for rank in ranks} == {digest}


def test_a_policy_that_comes_while_ranks_read_holds_on_all_from_the_same_step(
    store: TokenStore, tmp_path: Path
) -> None:
    numbers = store.index("numbers")

    def work(rank: int, arguments: dict[str, Any]) -> list[set[int]]:
        seen = []
        with open_loader(tmp_path / "run", store, begin=NEW, micro_batch_rows=4, **arguments) as loader:
            for step in loader:
                seen.append({int(domain) for batch in step for domain in batch.domain_B})
                if step.number == 3 and rank == 0:
                    policy = accept({"kind": "static", "mixture": {"numbers": 1}}, loader.genesis)
                    Journal(tmp_path / "run" / "journal", "somebody").append(policy)
                    threading.Event().wait(0.5)
                loader.end_step()
        return seen

    both = on_ranks(2, work)
    effective_step = history_of(tmp_path / "run").commits[1].effective_step
    assert 3 < effective_step < STEPS
    only_numbers = [[domains == {numbers} for domains in seen[effective_step:]] for seen in both]
    assert only_numbers == [[True] * (STEPS - effective_step)] * 2
    assert not all(domains <= {numbers} for seen in both for domains in seen[:effective_step])


def test_going_on_needs_the_step_number_only(store: TokenStore, tmp_path: Path) -> None:
    whole = read_all(open_loader(tmp_path / "whole", store, begin=NEW, micro_batch_rows=4))
    with open_loader(tmp_path / "run", store, begin=NEW, micro_batch_rows=4) as loader:
        for step in loader:
            loader.end_step()
            if step.number == 10:
                state = loader.state("mine")
                break
    assert state == {"step": 11}
    rest = read_all(open_loader(tmp_path / "run", store, micro_batch_rows=6, start_step=state["step"]))
    assert [digest for _, digest in rest] == [digest for _, digest in whole[11:]]
    np.testing.assert_array_equal(tokens_of(rest[0][0]), tokens_of(whole[11][0]))
    noted = history_of(tmp_path / "run").checkpoints[0]
    assert (noted.step, noted.tag, int(noted.digest, 16)) == (11, "mine", whole[10][1])
    without_note = read_all(open_loader(tmp_path / "whole", store, micro_batch_rows=4, start_step=7))
    assert [digest for _, digest in without_note] == [digest for _, digest in whole[7:]]


def test_reports_are_the_sums_of_what_was_observed_on_all_ranks(store: TokenStore, tmp_path: Path) -> None:
    def loss(batch: MicroBatch) -> np.ndarray:
        return (batch.tokens_BS[:, 1:] % 7) / 3 + batch.domain_B[:, None]

    def work(rank: int, arguments: dict[str, Any]) -> Any:
        seen = []
        with open_loader(tmp_path / "run", store, begin=NEW, micro_batch_rows=4, **arguments) as loader:
            for step in loader:
                for batch in step:
                    loader.observe(batch, loss(batch))
                    seen.append(batch)
                loader.end_step(learning_rate=step.number)
        return seen

    batches = [batch for part in on_ranks(2, work) for batch in part]
    history = history_of(tmp_path / "run")
    assert [(r.first_step, r.last_step, r.learning_rate) for r in history.reports] == [
        (0, 9, 4.5), (10, 19, 14.5), (20, 29, 24.5),
    ]  # fmt: skip
    plan = history.plan()
    for report in history.reports:
        steps = range(report.first_step, report.last_step + 1)
        assert int(report.digest, 16) == sum(plan.digest(step) for step in steps) % (1 << 64)
        for index, domain in enumerate(plan.genesis.domains):
            rows = [loss(b)[b.domain_B == index] for b in batches if b.step in steps]
            nll = np.concatenate(rows)
            found = report.domains[domain.name]
            assert (found.num_rows, found.num_tokens) == (len(nll), nll.size)
            assert found.loss_sum == pytest.approx(nll.sum())
            assert found.loss_square_sum == pytest.approx((nll**2).sum())
    assert history.end is not None
    assert (history.end.step, history.end.reason, int(history.end.digest, 16)) == (
        STEPS, "complete", run_digest(plan, STEPS),
    )  # fmt: skip


def test_the_end_of_the_plan_ends_the_loop(store: TokenStore, tmp_path: Path) -> None:
    capped = {"kind": "static", "mixture": {"colours": 1}, "caps": {"colours": {"max_epochs": 1, "on_exhaust": "stop"}}}
    new = NewRun(policy=capped, rows_per_step=ROWS, num_steps=10_000)
    full_steps = store.num_rows("colours") // ROWS
    assert len(read_all(open_loader(tmp_path / "run", store, begin=new, micro_batch_rows=4), -1)) == full_steps
    end = history_of(tmp_path / "run").end
    assert end is not None
    assert (end.step, end.reason) == (full_steps, "exhausted")


def test_marks_are_measured_and_a_decision_that_does_not_come_is_passed(store: TokenStore, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with open_loader(run_dir, store, begin=NEW, micro_batch_rows=4):
        pass
    genesis = history_of(run_dir).genesis
    first = accept(POLICY, genesis)
    marks = (Mark(step=0, evaluate=True), Mark(step=3), Mark(step=6, evaluate=True, decide="sync", timeout_s=0.3))
    online = PolicyEntry(document=POLICY, program=first.program, marks=marks, counts_from_commit=True, at_step=12)
    Journal(run_dir / "journal", "controller").append(online)
    called: list[int] = []

    def validate(batch: MicroBatch) -> np.ndarray:
        called.append(len(batch.domain_B))
        return np.full(batch.num_rows, 3.0)

    def work(rank: int, arguments: dict[str, Any]) -> Any:
        return read_all(
            open_loader(
                run_dir, store, micro_batch_rows=4, prefetch_steps=2, validate=validate, validation_rows=5, **arguments
            )
        )

    on_ranks(2, work)
    entries = read_entries(run_dir / "journal")
    validations = [e.body for e in entries if isinstance(e.body, Report) and e.body.kind == "validation"]
    assert [report.last_step for report in validations] == [11, 17]
    assert all(
        loss.loss_sum == pytest.approx(3.0 * loss.num_tokens) for r in validations for loss in r.domains.values()
    )
    assert [sum(loss.num_rows for loss in r.domains.values()) for r in validations] == [15, 15]
    trains = [e.body.last_step for e in entries if isinstance(e.body, Report) and e.body.kind == "train"]
    assert trains == [9, 11, 14, 17, 19, 29]
    assert [e.body.step for e in entries if e.type == "PASS"] == [18]
    assert len(called) == 8


def test_a_step_that_was_not_ended_is_an_error(store: TokenStore, tmp_path: Path) -> None:
    with open_loader(tmp_path / "run", store, begin=NEW, micro_batch_rows=4) as loader:
        steps = iter(loader)
        next(steps)
        with pytest.raises(MixingError, match=r"not ended: call end_step\(\) before state"):
            loader.state()
        with pytest.raises(MixingError, match=r"step 0 was not ended: call end_step\(\)"):
            next(steps)
    with (
        open_loader(tmp_path / "other", store, begin=NEW, micro_batch_rows=4) as loader,
        pytest.raises(MixingError, match="without a step"),
    ):
        loader.end_step()


@pytest.mark.parametrize("shape", [(4, 3), (3,), (), (4, 17)])
def test_losses_of_another_shape_are_refused(store: TokenStore, tmp_path: Path, shape: tuple[int, ...]) -> None:
    with open_loader(tmp_path / "run", store, begin=NEW, micro_batch_rows=4) as loader:
        batch = next(iter(next(iter(loader))))
        with pytest.raises(DataError, match=r"expected \[4, 16\] \(nats of each token\) or \[4\]"):
            loader.observe(batch, np.zeros(shape))
        loader.observe(batch, np.zeros(4))


def test_a_loss_that_is_not_finite_reaches_no_report(store: TokenStore, tmp_path: Path) -> None:
    with open_loader(tmp_path / "run", store, begin=NEW, micro_batch_rows=ROWS, report_every=1) as loader:
        loader.observe(next(iter(loader)).micro_batches[0], np.full(ROWS, np.nan))
        with pytest.raises(DataError, match=r"the observed loss of domain '\w+' is nan"):
            loader.end_step()
    assert not history_of(tmp_path / "run").reports


def test_ranks_that_read_the_same_share_are_caught_at_the_first_step(store: TokenStore, tmp_path: Path) -> None:
    def work(rank: int, arguments: dict[str, Any]) -> str:
        loader = open_loader(tmp_path / "run", store, begin=NEW, micro_batch_rows=4, **arguments)
        if rank == 1:  # what a wrong RANK leads to
            loader._feeder._positions = range(6)
        try:
            read_all(loader, 1)
        except PlanMismatch as error:
            return str(error)
        return ""

    messages = on_ranks(2, work)
    assert "each with its own rank number" in messages[0]


def test_ranks_default_to_what_the_launcher_says(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MixingError, match="2 ranks need sum_over_ranks"):
        open_loader(tmp_path / "run", store, begin=NEW, micro_batch_rows=4)
    with pytest.raises(MixingError, match="rank 2 of 2"):
        open_loader(tmp_path / "run", store, begin=NEW, micro_batch_rows=4, rank=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("begin", "error", "message"),
    [
        (None, JournalError, "no run has begun here; say what it is to be"),
        (NewRun(policy={"kind": "static", "mixture": {"colour": 1}}, rows_per_step=4, num_steps=4), PolicyRejected,
         "did you mean 'colours'"),
        (NewRun(policy=POLICY, rows_per_step=0, num_steps=4), ConfigError, "NewRun: rows_per_step: "),
        (NewRun(policy=POLICY, rows_per_step=4, num_steps=4, seed=-1), ConfigError, "NewRun: seed: "),
    ],
)  # fmt: skip
def test_a_run_that_cannot_be_opened_is_an_error_on_every_rank(
    store: TokenStore, tmp_path: Path, begin: NewRun | None, error: type[Exception], message: str
) -> None:
    def work(rank: int, arguments: dict[str, Any]) -> Exception | None:
        try:
            open_loader(tmp_path / "run", store, begin=begin, micro_batch_rows=4, **arguments)
        except MixingError as failure:
            return failure
        return None

    first, second = on_ranks(2, work)
    assert isinstance(first, error)
    assert message in str(first)
    assert "could not open the run" in str(second)


@pytest.mark.parametrize(
    ("rows", "size", "micro", "fits"), [(10, 4, 2, 16), (2, 4, 2, 8), (13, 3, 4, 24), (9, 2, 4, 16)]
)
def test_numbers_of_micro_batches_that_differ_between_ranks_are_refused_before_anything_is_written(
    store: TokenStore, tmp_path: Path, rows: int, size: int, micro: int, fits: int
) -> None:
    for rank in range(size):
        arguments = {"rank": rank, "num_ranks": size, "sum_over_ranks": lambda array: array}
        with pytest.raises(
            MixingError, match=rf"rows_per_step = {rows} on {size} ranks .*; rows_per_step = {fits} fits"
        ):
            open_loader(
                tmp_path / "run", store, begin=replace(NEW, rows_per_step=rows), micro_batch_rows=micro, **arguments
            )
    assert not (tmp_path / "run").exists()


def test_a_prefetch_of_nothing_is_refused(store: TokenStore, tmp_path: Path) -> None:
    with pytest.raises(MixingError, match="prefetch_steps must be positive, found 0"):
        open_loader(tmp_path / "run", store, begin=NEW, micro_batch_rows=4, prefetch_steps=0)


def test_other_settings_and_another_store_are_refused(store: TokenStore, tmp_path: Path) -> None:
    read_all(open_loader(tmp_path / "run", store, begin=NEW, micro_batch_rows=4), 2)
    other = NewRun(policy=POLICY, rows_per_step=ROWS, num_steps=STEPS, seed=6)
    with pytest.raises(JournalError, match=r"seed = 6 \(the run has 5\)"):
        open_loader(tmp_path / "run", store, begin=other, micro_batch_rows=4)
    changed = TokenStore(store.folder, store.manifest.model_copy(update={"fingerprint": "f" * 64}))
    with pytest.raises(StoreChanged):
        open_loader(tmp_path / "run", changed, micro_batch_rows=4)
    with pytest.raises(MixingError, match="at least prefetch_steps"):
        open_loader(tmp_path / "run", store, micro_batch_rows=4, lead_steps=4)


class AskedAhead(TokenStore):
    """A store that notes in which order rows are asked for and taken."""

    ask_ahead = 3

    def __init__(self, store: TokenStore) -> None:
        super().__init__(store.folder, store.manifest)
        self.asked, self.taken, self.most_open = 0, 0, 0

    def ask(self, domain_n: np.ndarray, row_n: np.ndarray) -> Callable[[], np.ndarray]:
        number, self.asked = self.asked, self.asked + 1
        self.most_open = max(self.most_open, self.asked - self.taken)

        def take() -> np.ndarray:
            assert number == self.taken
            self.taken += 1
            return self.gather(domain_n, row_n)

        return take


def test_rows_that_are_asked_for_ahead_come_in_order_and_no_further_ahead_than_prefetch(
    store: TokenStore, tmp_path: Path
) -> None:
    capped = {"kind": "static", "mixture": {"colours": 1}, "caps": {"colours": {"max_epochs": 1, "on_exhaust": "stop"}}}
    new = NewRun(policy=capped, rows_per_step=ROWS, num_steps=10_000)
    near = read_all(open_loader(tmp_path / "run", store, begin=new, micro_batch_rows=4), -1)
    asking = AskedAhead(store)
    far = read_all(open_loader(tmp_path / "run", asking, micro_batch_rows=4), -1)
    assert asking.most_open == 4
    assert [digest for _, digest in far] == [digest for _, digest in near]
    for (batches, _), (expected, _) in zip(far, near, strict=True):
        np.testing.assert_array_equal(tokens_of(batches), tokens_of(expected))


def test_a_feeder_that_asks_ahead_delivers_what_it_has_before_it_waits_for_a_decision(
    store: TokenStore, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    read_all(open_loader(run_dir, store, begin=NEW, micro_batch_rows=4), 1)
    first = accept(POLICY, history_of(run_dir).genesis)
    waits = PolicyEntry(document=POLICY, program=first.program, marks=(Mark(step=12, decide="sync", timeout_s=0.1),))
    Journal(run_dir / "journal", "controller").append(waits)
    with open_loader(run_dir, store, micro_batch_rows=4, start_step=1):
        while len(history_of(run_dir).commits) < 2:
            threading.Event().wait(0.05)
    with Feeder(run_dir / "journal", AskedAhead(store), rank=0, num_ranks=1, start_step=0, prefetch_steps=4) as feeder:
        assert [feeder.next().step for _ in range(12)] == list(range(12))
        assert feeder._ready.empty()
