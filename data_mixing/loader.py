"""Rows of a run for a training loop of one's own: plain PyTorch or anything else that takes arrays.

    new_run = NewRun(policy=..., rows_per_step=64, num_steps=1000)
    with open_loader(run_dir, store, begin=new_run, micro_batch_rows=8) as loader:
        for step in loader:
            for batch in step:
                ...                                   # forward and backward on batch.tokens_BS
                loader.observe(batch, nll_BT)         # losses, for reports and online policies
            optimizer.step()
            loader.end_step()

The rows, their order and the journal are those of the DeepSpeed job: equal seeds give equal digests. Rank 0 leads: it
commits policies and writes reports. With several ranks the caller provides one collective, a sum. Needs neither Ray nor
torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.entries import Checkpoint, End, Genesis, Report
from mixwright.data_mixing.errors import DomainExhausted, JournalError, MixingError, PlanMismatch
from mixwright.data_mixing.feeder import Feeder, StepRows
from mixwright.data_mixing.held_out import HeldOut
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.leader import Leader
from mixwright.data_mixing.loss_sums import LossSums
from mixwright.data_mixing.plan import Plan, chain_digest, rank_positions, rows_digest, run_digest
from mixwright.data_mixing.run_start import NewRun, attempt_of, joined, lead
from mixwright.data_mixing.store import TokenStore

__all__ = ["MicroBatch", "MixingLoader", "NewRun", "Step", "open_loader"]

SumOverRanks = Callable[[NDArray[Any]], NDArray[Any]]
"""Sum of an array (int64 or float64) over all ranks, the same on each. int64 wraps around (torch, numpy)."""

Validate = Callable[["MicroBatch"], Any]
"""Losses of held-out rows under the model as it is: nats per token [B, T], or their mean per row [B]."""

_WRAP = 1 << 64


@dataclass(frozen=True)
class Ranks:
    """This process among the data-parallel ones, and their one collective."""

    rank: int
    size: int
    sum: SumOverRanks

    @classmethod
    def of(cls, rank: int | None, size: int | None, sum_over_ranks: SumOverRanks | None) -> Ranks:
        """`rank` and `size` default to what a launcher (torchrun, deepspeed) put into the environment."""
        rank = int(os.environ.get("RANK", "0")) if rank is None else rank
        size = int(os.environ.get("WORLD_SIZE", "1")) if size is None else size
        if not 0 <= rank < size:
            raise MixingError(f"rank {rank} of {size}: expected 0 <= rank < {size}")
        if sum_over_ranks is None and size > 1:
            raise MixingError(f"{size} ranks need sum_over_ranks, a sum of an array over all of them")
        return cls(rank, size, sum_over_ranks or (lambda array: array))

    @property
    def is_leader(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class _ControlWord:
    """What all ranks know of a step once it is over: digest of its rows, newest entry to follow."""

    digest: int
    lsn: int


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one step, in order: tokens int64 [B, T+1], index in genesis.domains [B], number in the domain [B]."""

    step: int
    tokens_BS: NDArray[np.int64]
    domain_B: NDArray[np.int64]
    row_B: NDArray[np.int64]

    @property
    def num_rows(self) -> int:
        return len(self.domain_B)


@dataclass(frozen=True)
class Step:
    """This rank's micro-batches of one optimizer step; `rows_per_step` counts the rows of all ranks."""

    number: int
    rows_per_step: int
    micro_batches: tuple[MicroBatch, ...]

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.micro_batches)


class MixingLoader:
    """Steps of a run from `start_step` on. Made by `open_loader`; use as a context manager."""

    def __init__(
        self,
        store: TokenStore,
        feeder: Feeder,
        leader: Leader | None,
        ranks: Ranks,
        *,
        micro_batch_rows: int,
        start: tuple[int, int],
        attempt: int,
        report_every: int,
        validate: Validate | None,
        validation_rows: int,
    ) -> None:
        self._store, self._feeder, self._leader = store, feeder, leader
        self._micro_batch_rows, self._report_every, self._attempt = micro_batch_rows, report_every, attempt
        self._ranks = ranks
        self._validate, self._validation_rows = validate, validation_rows
        self._step, self._digest = start
        self._window_start, self._window_digest = start[0], 0
        self._sums = LossSums.zeros(self.genesis.domains)
        self._learning_rates: list[float] = []
        self._open: StepRows | None = None
        self._resources = contextlib.ExitStack()

    @property
    def genesis(self) -> Genesis:
        """What the run is; `genesis.domains[i].name` names domain i of a batch."""
        return self._feeder.genesis

    @property
    def plan(self) -> Plan:
        """The plan as far as this rank follows it."""
        return self._feeder.plan

    @property
    def run_digest(self) -> int:
        """64-bit digest of all rows read so far, in order, over all ranks; the same as the DeepSpeed job's."""
        return self._digest

    @property
    def wait_seconds(self) -> float:
        """Time that this rank has waited for rows."""
        return self._feeder.wait_seconds

    def __enter__(self) -> MixingLoader:
        if self._leader is not None:
            self._resources.enter_context(self._leader)
        self._resources.enter_context(self._feeder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.__exit__(kind, error, trace)

    def __iter__(self) -> Iterator[Step]:
        """The steps that are left, until the run's last one or the end of its plan. Each needs an `end_step`."""
        self._at_boundary()
        while self._step < self.genesis.num_steps:
            try:
                yield self._begin_step()
            except DomainExhausted:
                self._end("exhausted")
                return
            if self._open is not None:
                raise MixingError(f"step {self._step} was not ended: call end_step() after the optimizer's step")
        self._end("complete")

    def observe(self, batch: MicroBatch, nll: Any) -> None:
        """Add the plain cross-entropy of a batch: nats per token [B, T], or their mean per row [B].

        Anything that numpy.asarray takes, e.g. a detached CPU tensor. From means per row the squares are those of the
        means, so that standard errors come out too small.
        """
        self._sums.add(batch.domain_B, np.asarray(nll, np.float64), batch.tokens_BS.shape[1] - 1)

    def end_step(self, learning_rate: float | None = None) -> None:
        """Say that the optimizer's step is done, on every rank. Checks what was read, reports, follows commits.

        Raises PlanMismatch when the rows of all ranks together are not the plan's.
        """
        rows, self._open = self._open, None
        if rows is None:
            raise MixingError("end_step() without a step: take one from the loader first")
        word = self._control_word(rows.digest)
        self._check_digest(rows, word.digest)
        self._digest = chain_digest(self._digest, word.digest)
        self._window_digest = (self._window_digest + word.digest) % _WRAP
        self._learning_rates += [] if learning_rate is None else [learning_rate]
        self._step = rows.step + 1
        if self._report_is_due():
            self._report()
        self._feeder.follow(word.lsn)
        self._at_boundary()

    def state(self, tag: str = "") -> dict[str, int]:
        """What to keep with a checkpoint after `end_step`: give `start_step=state["step"]` to go on from there.

        The leader notes the checkpoint in the journal; `tag` names it.
        """
        if self._open is not None:
            raise MixingError(f"step {self._step} is not ended: call end_step() before state()")
        if self._leader is not None:
            self._leader.write(Checkpoint(step=self._step, tag=tag, digest=f"{self._digest:016x}"))
            self._leader.flush()
        return {"step": self._step}

    def _begin_step(self) -> Step:
        if self._leader is not None:
            self._leader.begin_step(self._step)
        rows = self._feeder.next()
        self._open = rows
        size = self._micro_batch_rows
        pieces = [slice(first, first + size) for first in range(0, len(rows.domain_n), size)]
        batches = tuple(
            MicroBatch(rows.step, rows.tokens_nS[piece], rows.domain_n[piece], rows.row_n[piece]) for piece in pieces
        )
        return Step(rows.step, self.genesis.rows_per_step, batches)

    def _control_word(self, digest: int) -> _ControlWord:
        lsn = self._leader.announced_lsn if self._leader is not None else 0
        signed = digest - _WRAP if digest >= _WRAP // 2 else digest
        total, announced = self._ranks.sum(np.array([signed, lsn], dtype=np.int64)).tolist()
        return _ControlWord(total % _WRAP, announced)

    def _check_digest(self, own: StepRows, digest: int) -> None:
        """The leader derives what the other ranks should have read, and compares the sum with what all did read."""
        if self._leader is None or self._ranks.size == 1:
            return
        others = self.plan.rows(own.step, range(len(own.domain_n), self.genesis.rows_per_step))
        expected = (own.digest + rows_digest(self.genesis, own.step, others)) % _WRAP
        if digest != expected:
            raise PlanMismatch(
                f"step {own.step}: the ranks read rows with digest {digest:016x}, the plan says {expected:016x}: do "
                "all ranks take part, each with its own rank number?"
            )

    def _report_is_due(self) -> bool:
        is_last = self._step == self.genesis.num_steps
        return is_last or self._step % self._report_every == 0 or self.plan.mark(self._step) is not None

    def _report(self) -> None:
        losses = self._sums.take(self._ranks.sum)
        rates, self._learning_rates = self._learning_rates, []
        if self._leader is not None:
            report = Report(
                kind="train", first_step=self._window_start, last_step=self._step - 1, domains=losses,
                digest=f"{self._window_digest:016x}", attempt=self._attempt,
                learning_rate=sum(rates) / len(rates) if rates else None,
            )  # fmt: skip
            self._leader.write(report)
        self._window_start, self._window_digest = self._step, 0

    def _at_boundary(self) -> None:
        """Between two steps: measure when an online policy asks for it, and let it decide."""
        found = self.plan.mark(self._step) if self._step < self.genesis.num_steps else None
        if found is None:
            return
        if found[1].evaluate and self._validate is not None:
            self._write_validation(self._validate)
        if found[1].decide == "sync":
            lsn = self._leader.await_decision(self._step, found[1].timeout_s) if self._leader is not None else 0
            self._feeder.follow(int(self._ranks.sum(np.array([lsn], dtype=np.int64))[0]))

    def _write_validation(self, validate: Validate) -> None:
        held_out = HeldOut.read(self._store, self.genesis, "validation", self._validation_rows)
        sums = LossSums.zeros(self.genesis.domains)
        for batch, is_padding in self._shared_out(held_out):
            nll = np.asarray(validate(batch), np.float64)
            if not is_padding:
                sums.add(batch.domain_B, nll, batch.tokens_BS.shape[1] - 1)
        losses = sums.take(self._ranks.sum)
        if self._leader is not None:
            step = self._step - 1
            body = Report(kind="validation", first_step=step, last_step=step, domains=losses, attempt=self._attempt)
            self._leader.write(body)

    def _shared_out(self, held_out: HeldOut) -> Iterator[tuple[MicroBatch, bool]]:
        """This rank's share in micro-batches, as many as the largest share has: a sharded model needs all ranks."""
        count, size = len(held_out.domain_n), self._micro_batch_rows
        mine = rank_positions(count, self._ranks.rank, self._ranks.size)
        most = max(len(rank_positions(count, rank, self._ranks.size)) for rank in range(self._ranks.size))
        for offset in range(0, most, size):
            first = mine.start + offset
            is_padding = first >= mine.stop
            piece = slice(0, 1) if is_padding else slice(first, min(first + size, mine.stop))
            tokens_BS, domain_B = held_out.tokens_nS[piece], held_out.domain_n[piece]
            yield MicroBatch(self._step, tokens_BS, domain_B, np.full(len(domain_B), -1)), is_padding

    def _end(self, reason: Any) -> None:
        if self._step > self._window_start:
            self._report()
        if self._leader is not None:
            self._leader.write(End(step=self._step, reason=reason, digest=f"{self._digest:016x}"))


def open_loader(
    run_dir: Path,
    store: TokenStore,
    *,
    micro_batch_rows: int,
    begin: NewRun | None = None,
    start_step: int = 0,
    rank: int | None = None,
    num_ranks: int | None = None,
    sum_over_ranks: SumOverRanks | None = None,
    prefetch_steps: int = 4,
    lead_steps: int = 8,
    report_every: int = 10,
    validate: Validate | None = None,
    validation_rows: int = 32,
) -> MixingLoader:
    """Begin or continue the run in `run_dir` and read it from `start_step` on; every rank calls this.

    rank, num_ranks: default to RANK and WORLD_SIZE, else 0 and 1. `sum_over_ranks` is needed for more than one rank.
    A policy becomes effective at least `lead_steps` after it is seen, which must be prefetch_steps + 3 or more. Where
    an online policy measures, `validate` is called with at most `validation_rows` fixed rows of every domain.

    Raises JournalError, PolicyRejected or StoreChanged when the run cannot be opened, MixingError for numbers that do
    not go together, on every rank.
    """
    if prefetch_steps < 1:
        raise MixingError(f"prefetch_steps must be positive, found {prefetch_steps}")
    if lead_steps < prefetch_steps + 3:
        raise MixingError(f"lead_steps must be at least prefetch_steps + 3 = {prefetch_steps + 3}, found {lead_steps}")
    if micro_batch_rows < 1 or report_every < 1:
        raise MixingError(
            f"micro_batch_rows and report_every must be positive, found {micro_batch_rows}, {report_every}"
        )
    ranks = Ranks.of(rank, num_ranks, sum_over_ranks)
    if begin is not None and isinstance(begin.rows_per_step, int):
        _check_even(begin.rows_per_step, ranks.size, micro_batch_rows)
    leader, history = _open_run(run_dir, store, begin, ranks, start_step, lead_steps, prefetch_steps)
    _check_even(history.genesis.rows_per_step, ranks.size, micro_batch_rows)
    feeder = Feeder(run_dir / "journal", store, rank=ranks.rank, num_ranks=ranks.size, start_step=start_step,
                    prefetch_steps=prefetch_steps)  # fmt: skip
    return MixingLoader(
        store, feeder, leader, ranks,
        micro_batch_rows=micro_batch_rows, start=(start_step, _digest_before(start_step, history)),
        attempt=attempt_of(history), report_every=report_every, validate=validate, validation_rows=validation_rows,
    )  # fmt: skip


def _check_even(rows_per_step: int, num_ranks: int, micro_batch_rows: int) -> None:
    """Raise MixingError unless all ranks make the same number of forward passes: where they talk, one would wait."""
    shares = {-(-len(rank_positions(rows_per_step, rank, num_ranks)) // micro_batch_rows) for rank in range(num_ranks)}
    if len(shares) > 1:
        whole = num_ranks * micro_batch_rows
        raise MixingError(
            f"rows_per_step = {rows_per_step} on {num_ranks} ranks in micro-batches of {micro_batch_rows}: some ranks "
            f"would make {min(shares)}, others {max(shares)} of them; rows_per_step = "
            f"{-(-rows_per_step // whole) * whole} fits"
        )


def _open_run(
    run_dir: Path,
    store: TokenStore,
    begin: NewRun | None,
    ranks: Ranks,
    start_step: int,
    lead_steps: int,
    prefetch_steps: int,
) -> tuple[Leader | None, RunHistory]:
    """The leader opens the run first; the others learn whether it could, whatever went wrong."""
    failure: Exception | None = None
    leader, history = None, RunHistory()
    if ranks.is_leader:
        try:
            journal, history = lead(run_dir, store, begin)
            leader = Leader(
                journal, history, start_step=start_step, lead_steps=lead_steps, prefetch_steps=prefetch_steps
            )
        except Exception as error:
            failure = error
    has_failed = bool(ranks.sum(np.array([int(failure is not None)], dtype=np.int64))[0])
    if failure is not None:
        raise failure
    if has_failed:
        raise JournalError(f"{run_dir}: the leader (rank 0) could not open the run; its message says why")
    return leader, history if ranks.is_leader else joined(run_dir)


def _digest_before(step: int, history: RunHistory) -> int:
    """Run digest up to `step`: noted with a checkpoint, else derived anew from the plan (milliseconds a step)."""
    noted = [checkpoint.digest for checkpoint in history.checkpoints if checkpoint.step == step]
    if step == 0 or not noted:
        return run_digest(history.plan(), step)
    return int(noted[-1], 16)
