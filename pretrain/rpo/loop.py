"""The preference loop: one optimizer step on one screen, and a generator of step records around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixwright.data_mixing.errors import PlanMismatch
from mixwright.data_mixing.permutation import mix_key
from mixwright.data_mixing.plan import chain_digest, rank_positions
from mixwright.pretrain.engine import Engine
from mixwright.pretrain.errors import NonFiniteLoss, TrainingError
from mixwright.pretrain.head import seed_step
from mixwright.pretrain.loop import Position
from mixwright.pretrain.ranks import ControlWord, PendingControlWord, Ranks
from mixwright.pretrain.rpo.config import RpoConfig
from mixwright.pretrain.rpo.figures import PairWindow
from mixwright.pretrain.rpo.groups import BASE
from mixwright.pretrain.rpo.layout import PackedGroups, lay_out
from mixwright.pretrain.rpo.objective import (
    Objective,
    PairFigures,
    StepScope,
    WholeStep,
)
from mixwright.pretrain.rpo.order import order_digest, pairs_of_step
from mixwright.pretrain.rpo.preferences import Preferences
from mixwright.pretrain.schedules import learning_rate


@dataclass(frozen=True)
class MicroBatch:
    """P pairs as the model reads them; `place_P` are their places in the step, `reference_P2` the reference's sums."""

    packed: PackedGroups
    reference_P2: Tensor
    place_P: Tensor


@dataclass(frozen=True)
class RpoRecord:
    """One optimizer step, known alike on all ranks. `figures` are None between reports (no device wait for them)."""

    step: int
    position: Position
    lr: float
    grad_norm: float
    step_seconds: float
    figures: dict[str, Any] | None
    stop_requested: bool


@dataclass
class RpoTrainer:
    """The parts of a running job that one step needs."""

    config: RpoConfig
    num_steps: int
    engine: Engine
    objective: Objective
    ranks: Ranks
    preferences: Preferences
    stop_requested: Callable[[], bool]

    def train_step(self, step: int, window: PairWindow) -> tuple[float, float, ControlWord]:
        """One optimizer step; returns the gradient norm, the learning rate and what all ranks know of the step."""
        lr = learning_rate(self.config.schedule, self.config.optimizer.lr, step, self.num_steps)
        seed_step(self.config.run.seed, step, self.ranks.rank)
        index_S = self.step_pairs(step)
        control = self._announce(step, index_S)
        scope = self._scope(step, index_S)
        batches = self.micro_batches(index_S)
        reward_S2 = self._rewards_of_step(batches) if self.objective.sees_whole_step else None
        for batch in batches:
            found = self.engine.forward(batch.packed)
            whole = None if reward_S2 is None else WholeStep(reward_S2, batch.place_P)
            loss, figures = self.objective(found, batch.reference_P2, scope, whole)
            if step == 0:
                self._check_start(figures)
            self.engine.backward(loss * self.ranks.size)  # DeepSpeed takes the mean over ranks
            window.add(figures)
            grad_norm = self.engine.step(lr)  # the last micro-batch of the step updates and returns the norm
        return grad_norm or 0.0, lr, control.wait()

    def step_pairs(self, step: int) -> NDArray[np.int64]:
        """Pairs of the whole step, in order."""
        pairs = self.preferences.train
        return pairs_of_step(len(pairs), self.config.training.pairs_per_step, self.config.run.seed, step)

    def micro_batches(self, index_S: NDArray[np.int64]) -> list[MicroBatch]:
        """This rank's pairs of a step."""
        mine = rank_positions(len(index_S), self.ranks.rank, self.ranks.size)
        size = self.config.training.micro_batch_pairs
        places = [np.arange(start, min(start + size, mine.stop)) for start in range(mine.start, mine.stop, size)]
        return [self._micro_batch(index_S, place_P) for place_P in places]

    def _micro_batch(self, index_S: NDArray[np.int64], place_P: NDArray[np.int64]) -> MicroBatch:
        device, index_P = self.ranks.device, index_S[place_P]
        groups = [self.preferences.train_group(int(index)) for index in index_P]
        reference_P2 = torch.from_numpy(self.preferences.reference.train_n2[index_P]).to(device)
        packed = lay_out(groups, self.config.training.layout).to(device)
        return MicroBatch(packed, reference_P2, torch.from_numpy(place_P).to(device))

    def _scope(self, step: int, index_S: NDArray[np.int64]) -> StepScope:
        sft = self.objective.sft
        from_base = sft is not None and sft.place == BASE
        num_base_tokens = self.preferences.num_base_tokens(index_S, from_base=from_base)
        return StepScope(len(index_S), num_base_tokens, seed=mix_key(self.config.run.seed, step) >> 1)

    @torch.no_grad()
    def _rewards_of_step(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Rewards of all pairs of the step over all ranks, in order, [S, 2]: a forward before the one that trains."""
        found = [self.objective.rewards(self.engine.forward(batch.packed), batch.reference_P2) for batch in batches]
        return self.ranks.gather(torch.cat(found).T.contiguous()).T

    def _check_start(self, figures: PairFigures) -> None:
        """A policy that has not moved has the reference's log-probabilities, so the loss of DPO is ln 2.

        Losses differ in slope (that of `ipo` is 1 / beta), so what they are of is compared.
        """
        log_ratio_P2 = figures.logp_P2 - figures.reference_P2
        found = float(log_ratio_P2.abs().sum() / figures.length_P2.sum().clamp(min=1))
        allowed = self.config.reference.tolerance_in(self.config.model.dtype)
        if not found <= allowed:
            raise TrainingError(
                f"the policy before the first step is {found:.3g} nats per token from the reference log-probabilities "
                f"(reference.tolerance: {allowed:g}): they do not belong together; remove the reference-* folder "
                "beside the pairs"
            )

    def _announce(self, step: int, index_S: NDArray[np.int64]) -> PendingControlWord:
        mine = rank_positions(len(index_S), self.ranks.rank, self.ranks.size)
        digest = order_digest(step, index_S[mine.start : mine.stop], mine.start)
        return PendingControlWord(self.ranks, digest, 0, self.stop_requested())


def train(trainer: RpoTrainer, start: Position) -> Iterator[RpoRecord]:
    """Train from `start` to the last step, one record per optimizer step."""
    window, position = PairWindow(), start
    trainer.engine.train()
    for step in range(start.step, trainer.num_steps):
        began = time.perf_counter()
        try:
            grad_norm, lr, word = trainer.train_step(step, window)
        except NonFiniteLoss as error:
            raise NonFiniteLoss(f"step {step}: {error}; training stops, the last checkpoint is intact") from None
        _check_digest(trainer, step, word)
        position = Position(step + 1, chain_digest(position.run_digest, word.digest))
        figures = window.take(trainer.ranks) if _report_is_due(trainer, step) or word.stop else None
        yield RpoRecord(step, position, lr, grad_norm, time.perf_counter() - began, figures, word.stop)
        if word.stop:
            return


def _report_is_due(trainer: RpoTrainer, step: int) -> bool:
    every = (trainer.config.training.report_every, trainer.config.checkpoint.every)
    return step + 1 == trainer.num_steps or any((step + 1) % period == 0 for period in every)


def _check_digest(trainer: RpoTrainer, step: int, word: ControlWord) -> None:
    """What all ranks trained on together is what the order prescribes."""
    expected = order_digest(step, trainer.step_pairs(step))
    if word.digest != expected:
        raise PlanMismatch(
            f"step {step}: the ranks trained on pairs with digest {word.digest:016x}, the order says {expected:016x}"
        )
