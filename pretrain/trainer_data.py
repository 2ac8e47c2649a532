"""A run's rows for `transformers.Trainer`, in the plan's order, with policies that change while it trains.

    with TrainerMixing(run_dir, store, begin=NewRun(policy=..., rows_per_step=64, num_steps=1000)) as mixing:
        arguments = TrainingArguments(output_dir=..., **mixing.arguments(per_device_train_batch_size=8, world_size=2))
        Trainer(model, arguments, train_dataset=mixing.rows, callbacks=[mixing], compute_loss_func=mixing.loss).train()

Row `i` of the dataset stands at position `i % rows_per_step` of the batch of step `i // rows_per_step`. The Trainer
hands micro-batch k of an optimizer step (k = accumulation * processes + process) the rows k * b to (k + 1) * b, so that
its micro-batches, in that order, are the plan's batch. `loss` compares the labels that reach it with the plan's rows.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mixwright.data_mixing import seal
from mixwright.data_mixing.entries import Checkpoint, End, Genesis, Report
from mixwright.data_mixing.errors import PlanMismatch
from mixwright.data_mixing.feeder import store_order
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.leader import Leader
from mixwright.data_mixing.loss_sums import LossSums
from mixwright.data_mixing.plan import RowRefs, chain_digest, rows_digest, run_digest
from mixwright.data_mixing.run_start import NewRun, attempt_of, joined, lead
from mixwright.data_mixing.store import TokenStore
from mixwright.pretrain.errors import TrainingError
from mixwright.pretrain.objective import DomainSums
from mixwright.pretrain.rundir import began_ns

_WRAP = 1 << 64


class PlannedRows(Dataset[dict[str, Tensor]]):
    """All rows that a run reads, in order: `input_ids` [T], and as `labels` and `shift_labels` the next tokens [T].

    Can be copied into worker processes. Reading waits, at most `timeout_s`, for a step that a policy may still change.
    """

    def __init__(self, run_dir: Path, store_folder: Path, genesis: Genesis, timeout_s: float = 120.0) -> None:
        self._run_dir, self._store_folder = run_dir, store_folder
        self._genesis, self._timeout_s = genesis, timeout_s
        self._reader: tuple[int, seal.SealedPlan, TokenStore, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return self._genesis.num_steps * self._genesis.rows_per_step

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        tokens = torch.from_numpy(self.tokens(indices))
        return [{"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]} for row in tokens]

    def tokens(self, indices: Sequence[int]) -> NDArray[np.int64]:
        """Rows [n, T+1] int64 in order of `indices`."""
        return np.concatenate([self._gather(self.refs(indices[piece])) for piece in self._steps(indices)])

    def refs(self, indices: Sequence[int]) -> RowRefs:
        """The plan's rows at `indices`, which follow each other within one step."""
        step, first = divmod(indices[0], self._genesis.rows_per_step)
        return self._parts()[0].at(step).rows(step, range(first, first + len(indices)))

    def share(self, step: int, num_batches: int, batch: int) -> RowRefs:
        """Rows of batch number `batch` of the `num_batches` that make up a step."""
        size = self._genesis.rows_per_step // num_batches
        first = step * self._genesis.rows_per_step + batch * size
        return self.refs(range(first, first + size))

    def _steps(self, indices: Sequence[int]) -> list[slice]:
        """Pieces of `indices` that lie in one step each; raises when they are not in order."""
        index_n = np.asarray(indices)
        if (np.diff(index_n) != 1).any():
            raise TrainingError(
                f"rows {list(indices)[:4]}... were asked for: the rows must be read in order; set "
                "train_sampling_strategy='sequential' in TrainingArguments"
            )
        cuts = np.flatnonzero(np.diff(index_n // self._genesis.rows_per_step)) + 1
        edges = [0, *cuts.tolist(), len(index_n)]
        return [slice(a, b) for a, b in itertools.pairwise(edges)]

    def _gather(self, refs: RowRefs) -> NDArray[np.int64]:
        _, store, order = self._parts()
        return store.gather(order[refs.domain_n], refs.row_n).astype(np.int64)

    def _parts(self) -> tuple[seal.SealedPlan, TokenStore, NDArray[np.int64]]:
        """Journal and store as this process has opened them; a forked worker opens its own."""
        if self._reader is None or self._reader[0] != os.getpid():
            store = TokenStore.open(self._store_folder, compare_since_ns=began_ns(self._run_dir))
            plan = seal.SealedPlan(self._run_dir, self._timeout_s)
            self._reader = (os.getpid(), plan, store, store_order(self._genesis, store))
        return self._reader[1:]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}


class TrainerMixing(TrainerCallback):  # type: ignore[misc]
    """The run behind a `transformers.Trainer`: its dataset `rows`, its callback, its `loss`. Use as a context manager.

    Every process makes one; process 0 leads the run. `wait_timeout_s` limits every wait for process 0.
    """

    def __init__(
        self,
        run_dir: Path,
        store: TokenStore,
        *,
        begin: NewRun | None = None,
        report_every: int = 10,
        lead_steps: int = 8,
        wait_timeout_s: float = 120.0,
    ) -> None:
        self._run_dir, self._report_every, self._lead_steps = run_dir, report_every, lead_steps
        self._rank = int(os.environ.get("RANK", "0"))
        self._size = int(os.environ.get("WORLD_SIZE", "1"))
        if self._rank == 0:
            self._journal, self._history = lead(run_dir, store, begin)
            seal.remove(run_dir)
        else:
            self._history = _joined(run_dir, wait_timeout_s)
        self.genesis = self._history.genesis
        self.rows = PlannedRows(run_dir, store.folder, self.genesis, wait_timeout_s)
        self._leader: Leader | None = None
        self._average_over_devices = True
        self._step = self._micro_batch = self._num_batches = 0
        self._digest = self._window_start = self._window_digest = 0
        self._num_wrong = torch.zeros((), dtype=torch.int64)
        self._sums = DomainSums(len(self.genesis.domains), self._num_wrong.device)

    def arguments(self, *, per_device_train_batch_size: int, world_size: int = 1) -> dict[str, Any]:
        """Settings for TrainingArguments that make the Trainer read this run; raises TrainingError."""
        rows, size = self.genesis.rows_per_step, per_device_train_batch_size * world_size
        if rows % size:
            raise TrainingError(
                f"rows_per_step = {rows} is no multiple of per_device_train_batch_size x processes = "
                f"{per_device_train_batch_size} x {world_size}"
            )
        return {
            "per_device_train_batch_size": per_device_train_batch_size,
            "gradient_accumulation_steps": rows // size,
            "max_steps": self.genesis.num_steps,
            "train_sampling_strategy": "sequential",
        }

    @property
    def run_digest(self) -> int:
        """64-bit digest of all rows read so far, in order; the same as the DeepSpeed job's. Process 0 only."""
        return self._digest

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        """`compute_loss_func` of the Trainer: mean cross-entropy over the tokens of the whole step.

        `labels` [B, T] are the next tokens. Notes the losses per domain for the reports.
        """
        nll_BT = functional.cross_entropy(outputs.logits.float().transpose(1, 2), labels, reduction="none")
        if not torch.is_grad_enabled():
            return nll_BT.mean()
        batch = self._micro_batch * self._size + self._rank
        refs = self.rows.share(self._step, self._num_batches, batch)
        self._micro_batch += 1
        self._note(refs, labels, nll_BT)
        # The Trainer takes the mean over processes, and undoes it only when it averages tokens over devices.
        is_undone = self._average_over_devices and num_items_in_batch is not None
        scale = 1 if is_undone else self._size
        return nll_BT.sum() * (scale / (self.genesis.rows_per_step * self.genesis.sequence_length))

    def _note(self, refs: RowRefs, labels: Tensor, nll_BT: Tensor) -> None:
        expected = torch.from_numpy(self.rows._gather(refs)[:, 1:]).to(labels.device, non_blocking=True)
        # Compared on the device; asked for with the report.
        self._num_wrong = self._num_wrong + (labels != expected).sum()
        self._sums.add(nll_BT, torch.from_numpy(refs.domain_n).to(labels.device))
        self._window_digest = (self._window_digest + rows_digest(self.genesis, self._step, refs)) % _WRAP

    def __enter__(self) -> TrainerMixing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_leading(kind, error, trace)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._check(args, state)
        self._step = self._window_start = state.global_step
        self._num_batches = args.gradient_accumulation_steps * self._size
        self._average_over_devices = args.average_tokens_across_devices
        self._sums = DomainSums(len(self.genesis.domains), args.device)
        self._num_wrong = torch.zeros((), dtype=torch.int64, device=args.device)
        self._window_digest = 0
        if self._rank == 0:
            ahead = steps_ahead(args)
            lead_steps = max(self._lead_steps, ahead + 3)
            self._leader = Leader(
                self._journal, self._history, start_step=self._step, lead_steps=lead_steps, prefetch_steps=ahead
            )
            self._leader.__enter__()
            self._digest = run_digest(self._history.plan(), self._step)
            seal.Seal(*self._leader.sealed()).write(self._run_dir)
        self._barrier()

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self._step, self._micro_batch = state.global_step, 0
        if self._leader is not None:
            self._leader.begin_step(self._step)
            seal.Seal(*self._leader.sealed()).write(self._run_dir)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        done = state.global_step
        if self._leader is not None:
            plan = self.rows._parts()[0].at(self._step)
            self._digest = chain_digest(self._digest, plan.digest(self._step))
        if done % self._report_every == 0 or done == self.genesis.num_steps:
            self._report(done)
        if control.should_save and self._leader is not None:
            self._leader.flush()

    def on_save(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if self._leader is not None:
            step = state.global_step
            self._leader.write(Checkpoint(step=step, tag=f"checkpoint-{step}", digest=f"{self._digest:016x}"))

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.global_step > self._window_start:
            self._report(state.global_step)
        if self._leader is not None and state.global_step == self.genesis.num_steps:
            self._leader.write(End(step=state.global_step, reason="complete", digest=f"{self._digest:016x}"))
        self._stop_leading(None, None, None)

    def _report(self, done: int) -> None:
        sums = LossSums(tuple(d.name for d in self.genesis.domains), self._sums.take().cpu().numpy())
        losses = sums.take(self._sum)
        wrong, signed = self._sum(np.array([int(self._num_wrong), _signed(self._window_digest)])).tolist()
        first, self._window_start, self._window_digest = self._window_start, done, 0
        if self._leader is None or not losses:
            return
        plan = self.rows._parts()[0].at(done - 1)
        expected = sum(plan.digest(step) for step in range(first, done)) % _WRAP
        if wrong or signed % _WRAP != expected:
            raise PlanMismatch(
                f"steps {first}-{done - 1}: {wrong} labels are not those of the plan's rows: does the Trainer use "
                "mixing.rows and the settings of mixing.arguments(...)?"
            )
        self._leader.write(
            Report(kind="train", first_step=first, last_step=done - 1, domains=losses, digest=f"{expected:016x}",
                   attempt=attempt_of(self._history))
        )  # fmt: skip

    def _check(self, args: TrainingArguments, state: TrainerState) -> None:
        """Raise TrainingError for settings under which another order would be read."""
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        wanted = {
            "train_sampling_strategy": (args.train_sampling_strategy, "sequential"),
            "per_device_train_batch_size x gradient_accumulation_steps x processes": (rows, self.genesis.rows_per_step),
            "accelerator_config.split_batches": (args.accelerator_config.split_batches, False),
            "ignore_data_skip": (args.ignore_data_skip, False),
            "dataloader_in_order": (args.dataloader_in_order, True),
        }
        for name, (found, expected) in wanted.items():
            if found != expected:
                raise TrainingError(f"TrainingArguments: {name} is {found!r}, expected {expected!r} (mixing.arguments)")
        if state.max_steps > self.genesis.num_steps:
            raise TrainingError(
                f"TrainingArguments: max_steps is {state.max_steps}, the run has {self.genesis.num_steps}"
            )

    def _stop_leading(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        leader, self._leader = self._leader, None
        if leader is not None:
            leader.__exit__(kind, error, trace)

    def _barrier(self) -> None:
        if self._size > 1:
            dist.barrier()

    def _sum(self, array: NDArray[Any]) -> NDArray[Any]:
        if self._size == 1:
            return array
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        tensor = torch.from_numpy(array).to(device)
        dist.all_reduce(tensor)
        total: NDArray[Any] = tensor.cpu().numpy()
        return total


def steps_ahead(args: TrainingArguments) -> int:
    """Optimizer steps that may be read before they are trained on: by workers, accelerate (1 batch) and the Trainer."""
    batches: int = args.dataloader_num_workers * (args.dataloader_prefetch_factor or 2) + 1
    accumulation: int = args.gradient_accumulation_steps
    return -(-batches // accumulation) + 1


def _joined(run_dir: Path, timeout_s: float) -> RunHistory:
    """The run, once process 0 has begun it; raises TrainingError after the time limit."""
    deadline = time.monotonic() + timeout_s
    while not (run_dir / "journal").is_dir() or not (history := joined(run_dir)).commits:
        if time.monotonic() > deadline:
            raise TrainingError(f"{run_dir}: process 0 has not begun the run within {timeout_s:g} s")
        time.sleep(0.1)
    return history


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return value - _WRAP if value >= _WRAP // 2 else value
