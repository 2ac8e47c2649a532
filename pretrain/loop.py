"""The training loop: one optimizer step on one screen, and a generator of step records around it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixwright.data_mixing.domain import Domain
from mixwright.data_mixing.entries import DomainLoss, Report
from mixwright.data_mixing.errors import DomainExhausted, PlanMismatch
from mixwright.data_mixing.feeder import Feeder, StepRows, micro_batches
from mixwright.data_mixing.leader import Leader
from mixwright.data_mixing.plan import chain_digest, rank_positions
from mixwright.pretrain.config import PretrainConfig
from mixwright.pretrain.distill.teaching import Teaching
from mixwright.pretrain.engine import Engine
from mixwright.pretrain.errors import NonFiniteLoss
from mixwright.pretrain.head import seed_step
from mixwright.pretrain.model_options.apply import begin_step
from mixwright.pretrain.objective import DomainSums, Objective, weighting_at
from mixwright.pretrain.ranks import ControlWord, PendingControlWord, Ranks
from mixwright.pretrain.row_log import RowLossLog
from mixwright.pretrain.schedules import apply_dropout, dropout_probability, learning_rate


@dataclass(frozen=True)
class Position:
    """Where a run stands: optimizer steps done, and the digest of all rows read so far, in order.

    `weighting` is what the instance weighting remembers (WeightingState.to_json).
    """

    step: int = 0
    run_digest: int = 0
    weighting: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, known alike on all ranks. Losses are None between reports (no device wait for them).

    `step` counts from 0; `position` is where the run stands after it. Seconds are this rank's. `weights` are figures of
    the instance weights since the last report.
    """

    step: int
    position: Position
    lr: float
    grad_norm: float
    step_seconds: float
    wait_seconds: float
    report: Report | None
    weights: dict[str, Any] | None
    stop_requested: bool


@dataclass
class Trainer:
    """The parts of a running job that one step needs."""

    config: PretrainConfig
    engine: Engine
    objective: Objective
    ranks: Ranks
    feeder: Feeder
    leader: Leader | None
    attempt: int
    stop_requested: Callable[[], bool]
    row_log: RowLossLog | None = None
    teaching: Teaching | None = None

    def train_step(self, step: int, sums: DomainSums) -> tuple[float, float, ControlWord]:
        """One optimizer step; returns the gradient norm, the learning rate and what all ranks know of the step."""
        lr = self._prepare_step(step)
        rows = self.feeder.next()
        control = self._announce(rows)
        parts = micro_batches(rows, self.config.training.micro_batch_rows)
        batches = [
            (self._to_device(tokens_BS), self._to_device(domain_B), row_B) for tokens_BS, domain_B, row_B in parts
        ]
        if self.objective.has_first_pass:
            self._preview(step, batches)
        row_losses = []
        for tokens_BS, domain_B, row_B in batches:
            lesson = self.teaching.lesson(tokens_BS, domain_B, row_B) if self.teaching is not None else None
            losses = self.engine.forward(tokens_BS, lesson)
            self.engine.backward(self.objective(losses, tokens_BS, domain_B))
            sums.add(losses.nll_N, domain_B)
            row_losses.append(losses.nll_N.detach().reshape(len(domain_B), -1).mean(dim=1))
            divisor = self.objective.end() if self.engine.ends_step else 1.0
            grad_norm = self.engine.step(lr, divisor)  # the last micro-batch of the step updates and returns the norm
        if self.row_log is not None:
            self._log_rows(self.row_log, step, torch.cat(row_losses), divisor)
        return grad_norm or 0.0, lr, control.wait()

    def _log_rows(self, log: RowLossLog, step: int, loss_n: Tensor, divisor: float) -> None:
        """This rank's rows of the step; waits for the device."""
        weight_n = self.objective.row_weights(divisor)
        weight_n = torch.ones_like(loss_n) if weight_n is None else weight_n
        mine = rank_positions(self.config.training.rows_per_step, self.ranks.rank, self.ranks.size)
        log.add(step, np.arange(mine.start, mine.stop), loss_n.float().cpu().numpy(), weight_n.float().cpu().numpy())

    @torch.no_grad()
    def _preview(self, step: int, batches: Sequence[tuple[Tensor, Tensor, np.ndarray]]) -> None:
        """The first of two passes: losses alone, with the dropout of the second."""
        for tokens_BS, domain_B, _ in batches:
            self.objective.preview(self.engine.forward(tokens_BS), tokens_BS, domain_B)
        seed_step(self.config.run.seed, step, self.ranks.rank)

    def await_decision(self, step: int, timeout_s: float) -> None:
        """Wait with all ranks, at the boundary before `step`, for what an online policy decides to read from there."""
        lsn = self.leader.await_decision(step, timeout_s) if self.leader is not None else 0
        self.feeder.follow(self.ranks.from_leader(lsn))

    def _prepare_step(self, step: int) -> float:
        training = self.config.training
        seed_step(self.config.run.seed, step, self.ranks.rank)
        dropout = dropout_probability(training.dropout, step)
        if dropout is not None:
            apply_dropout(self.engine.module, dropout)
        begin_step(self.engine.module, self.config.options, self.config.run.seed, step)
        if self.leader is not None:
            self.leader.begin_step(step)
        self.objective.begin(*weighting_at(self.feeder.plan, step))
        return learning_rate(self.config.schedule, self.config.optimizer.lr, step, training.num_steps)

    def _announce(self, rows: StepRows) -> PendingControlWord:
        lsn = self.leader.announced_lsn if self.leader is not None else 0
        return PendingControlWord(self.ranks, rows.digest, lsn, self.stop_requested())

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.ranks.device.type == "cuda":
            return tensor.pin_memory().to(self.ranks.device, non_blocking=True)
        return tensor


def train(trainer: Trainer, start: Position) -> Iterator[StepRecord]:
    """Train from `start` to the last step of the configuration (or of the plan), one record per optimizer step."""
    config, feeder = trainer.config, trainer.feeder
    sums = DomainSums(len(feeder.genesis.domains), trainer.ranks.device)
    position, window_start, window_digest = start, start.step, 0
    trainer.engine.train()
    for step in range(start.step, config.training.num_steps):
        began, waited = time.perf_counter(), feeder.wait_seconds
        try:
            grad_norm, lr, word = trainer.train_step(step, sums)
        except DomainExhausted:
            return
        except NonFiniteLoss as error:
            raise NonFiniteLoss(f"step {step}: {error}; training stops, the last checkpoint is intact") from None
        _check_digest(trainer, step, word)
        digest = chain_digest(position.run_digest, word.digest)
        position = Position(step + 1, digest, trainer.objective.state.to_json())
        window_digest = (window_digest + word.digest) % (1 << 64)
        report, weights = None, None
        if _report_is_due(config, step) or word.stop or feeder.plan.mark(step + 1):
            report = _report(trainer, sums, window_start, step, window_digest)
            weights = _weights(trainer, step)
            window_start, window_digest = step + 1, 0
        feeder.follow(word.committed_lsn)
        seconds = time.perf_counter() - began
        waited = feeder.wait_seconds - waited
        yield StepRecord(step, position, lr, grad_norm, seconds, waited, report, weights, word.stop)
        if word.stop:
            return


def _report_is_due(config: PretrainConfig, step: int) -> bool:
    done = step + 1
    due = (config.mixing.report_every, config.checkpoint.every)
    return done == config.training.num_steps or any(done % every == 0 for every in due)


def _check_digest(trainer: Trainer, step: int, word: ControlWord) -> None:
    """The leader recomputes what all ranks should have read and compares it with what they did read."""
    if trainer.leader is None:
        return
    expected = trainer.feeder.plan.digest(step)
    if word.digest != expected:
        raise PlanMismatch(
            f"step {step}: the ranks read rows with digest {word.digest:016x}, the plan says {expected:016x}"
        )


def _report(trainer: Trainer, sums: DomainSums, first_step: int, last_step: int, digest: int) -> Report:
    """Add up the window over all ranks; the leader also sends it to the journal."""
    domains = trainer.feeder.genesis.domains
    sums_KC = trainer.ranks.sum(sums.take()).tolist()
    losses = domain_losses(domains, sums_KC, f"steps {first_step}-{last_step}")
    report = Report(
        kind="train",
        first_step=first_step,
        last_step=last_step,
        domains=losses,
        digest=f"{digest:016x}",
        attempt=trainer.attempt,
        learning_rate=_mean_learning_rate(trainer.config, first_step, last_step),
    )
    if trainer.leader is not None:
        trainer.leader.write(report)
    return report


def _weights(trainer: Trainer, step: int) -> dict[str, Any] | None:
    plan = trainer.feeder.plan
    names = [domain.name for domain in plan.genesis.domains]
    return trainer.objective.window.take(names, plan.proportions(step).tolist())


def _mean_learning_rate(config: PretrainConfig, first_step: int, last_step: int) -> float:
    steps = range(first_step, last_step + 1)
    rates = [learning_rate(config.schedule, config.optimizer.lr, step, config.training.num_steps) for step in steps]
    return sum(rates) / len(rates)


def domain_losses(domains: Sequence[Domain], sums_KC: list[list[float]], when: str) -> dict[str, DomainLoss]:
    """The columns of `DomainSums`, of the domains that have rows, as records.

    Raises NonFiniteLoss for a domain whose loss is NaN or infinite; the message begins with `when`.
    """
    found = {}
    for domain, (loss_sum, loss_square_sum, num_tokens, num_rows) in zip(domains, sums_KC, strict=True):
        if not math.isfinite(loss_sum) or not math.isfinite(loss_square_sum):
            raise NonFiniteLoss(f"{when}: the loss of domain {domain.name!r} is {loss_sum}")
        if num_rows:
            found[domain.name] = DomainLoss(
                loss_sum=loss_sum, loss_square_sum=loss_square_sum, num_tokens=round(num_tokens),
                num_rows=round(num_rows),
            )  # fmt: skip
    return found
