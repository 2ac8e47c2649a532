"""Policies against synthetic worlds: no model and no journal, the same `first_stretches` and `decide` as a live run.

A run costs a few numpy calls for each stretch, however many steps it has: thousands of rounds a minute.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.apportion import Apportionment, integer_proportions
from mixwright.data_mixing.arms import Arms, arms_of
from mixwright.data_mixing.decide import decide, first_stretches
from mixwright.data_mixing.domain import Domain
from mixwright.data_mixing.entries import PROPORTION_TOTAL, Genesis
from mixwright.data_mixing.online import Interval, Losses, OnlineDocument, OnlineKind, Stretch, Window
from mixwright.data_mixing.permutation import mix_key
from mixwright.data_mixing.policy import PolicyDocument, PolicyKind, parse
from mixwright.data_mixing.worlds import Scene, World, build

Floats = NDArray[np.float64]

_LEARNING_RATE = 1e-3
_TOKENS_PER_ROW = 1024
_ROWS_OF_A_DOMAIN = 1 << 24


@dataclass(frozen=True, eq=False)
class Outcome:
    """One policy in one scene: regret to the best dynamic mixture in nats of mean loss, what was read, how it went.

    share_K: mean mixture really read. last_share_K: the last decided mixture. perturbed: part of all steps.
    """

    regret: float
    share_K: Floats
    last_share_K: Floats
    num_decisions: int
    num_held: int
    num_validations: int
    perturbed: float


def simulate(document: Mapping[str, Any], world: World, seed: int, scene: Scene | None = None) -> Outcome:
    """A policy document in the scene of `seed`; raises PolicyRejected as a submission would."""
    parsed, kind = parse(document)
    scene = scene or build(world, seed)
    trainer = _Trainer(scene)
    if isinstance(parsed, OnlineDocument):
        _run_online(cast(OnlineKind, kind), parsed, trainer)
    else:
        for stretch in _program(kind, parsed, scene):
            trainer.read(stretch)
    return trainer.outcome()


class _Trainer:
    """What a run would do with stretches: counts rows exactly as the plan does, lets losses fall, measures them."""

    def __init__(self, scene: Scene) -> None:
        num_domains = scene.world.num_domains
        self.scene, self.step = scene, 0
        self.shares: Floats = np.full(num_domains, 1 / num_domains)
        self._fallen_K = np.zeros(num_domains)
        self._credits = np.zeros(num_domains, dtype=np.int64)
        self._rows_K = np.zeros(num_domains, dtype=np.int64)
        self._validation: Losses | None = None
        self.num_decisions = self.num_held = self.num_validations = self.num_perturbed = 0

    @property
    def steps_left(self) -> int:
        return self.scene.world.num_steps - self.step

    def validate(self) -> Losses:
        """Measured losses, once for each step."""
        if self._validation is None:
            self._validation = tuple((self._true_loss() + self.scene.noise_TK[self.step]).tolist())
            self.num_validations += 1
        return self._validation

    def read(self, stretch: Stretch) -> Interval:
        """Train on a stretch, or on what the run has left of it."""
        world, num_steps = self.scene.world, min(stretch.num_steps, self.steps_left)
        before = self._validation
        apportionment = Apportionment(integer_proportions(stretch.shares), self._credits)
        count_K = apportionment.counts(num_steps * world.rows_per_step)
        self._credits = apportionment.carried(num_steps * world.rows_per_step, count_K)
        first, end = self.step, self.step + num_steps
        start_loss_K = self._true_loss()
        self._fallen_K = self._fallen_K + self.scene.fallen(first, end, count_K / count_K.sum())
        self._rows_K = self._rows_K + count_K
        self.step, self._validation = end, None
        self.num_perturbed += num_steps * stretch.is_perturbation
        train_loss_K = (start_loss_K + self._true_loss()) / 2
        unmeasured: Losses = (None,) * len(count_K)
        return Interval(
            first_step=first,
            last_step=end - 1,
            rows=tuple(count_K.tolist()),
            before=before or unmeasured,
            after=self.validate() if stretch.evaluate else unmeasured,
            train_loss=tuple(float(loss) if rows else None for loss, rows in zip(train_loss_K, count_K, strict=True)),
            train_tokens=tuple((count_K * _TOKENS_PER_ROW).tolist()),
            learning_rate=float(self.scene.rate_T[first:end].mean()) * _LEARNING_RATE,
            is_perturbation=stretch.is_perturbation,
        )

    def outcome(self) -> Outcome:
        """After the last step."""
        return Outcome(
            regret=self.scene.regret(self._true_loss()),
            share_K=self._rows_K / self._rows_K.sum(),
            last_share_K=self.shares,
            num_decisions=self.num_decisions,
            num_held=self.num_held,
            num_validations=self.num_validations,
            perturbed=self.num_perturbed / self.scene.world.num_steps,
        )

    def _true_loss(self) -> Floats:
        return self.scene.loss(self._fallen_K, self.step)


def _run_online(kind: OnlineKind, document: OnlineDocument, trainer: _Trainer) -> None:
    scene = trainer.scene
    arms = arms_of(document, _domains(scene.world))
    key = mix_key(scene.seed, 0)
    stretches = first_stretches(kind, document, arms, key)
    shares: tuple[float, ...] = arms.initial_K
    state: dict[str, Any] = {}
    while trainer.steps_left:
        trainer.shares = np.array(shares)
        intervals = _round(trainer, stretches)
        if not trainer.steps_left:
            return
        window = _window(trainer, arms, shares, intervals)
        key = mix_key(scene.seed, window.decision + 1)
        decided = decide(kind, document, window, state, key, arms.fallback_K)
        shares, state, stretches = decided.shares, decided.proposal.state, decided.stretches
        trainer.num_decisions += 1
        trainer.num_held += decided.action != "propose"


def _round(trainer: _Trainer, stretches: Sequence[Stretch]) -> tuple[Interval, ...]:
    if stretches[0].evaluate:
        trainer.validate()
    intervals = []
    for stretch in stretches:
        if trainer.steps_left:
            intervals.append(trainer.read(stretch))
    return tuple(intervals)


def _window(trainer: _Trainer, arms: Arms, shares: tuple[float, ...], intervals: tuple[Interval, ...]) -> Window:
    return Window(
        step=trainer.step,
        decision=trainer.num_decisions,
        arms=arms.names,
        shares=shares,
        intervals=intervals,
        rows_available=arms.rows_K,
        num_steps=trainer.scene.world.num_steps,
        tokens_per_row=_TOKENS_PER_ROW,
        target=arms.target_K,
    )


def _domains(world: World) -> tuple[Domain, ...]:
    return tuple(
        Domain(name=f"domain{index}", num_rows=_ROWS_OF_A_DOMAIN, fingerprint="") for index in range(world.num_domains)
    )


def _program(kind: PolicyKind, document: PolicyDocument, scene: Scene) -> Iterator[Stretch]:
    """The stretches of a policy without feedback."""
    world = scene.world
    genesis = Genesis(
        run="simulation", seed=scene.seed, sequence_length=_TOKENS_PER_ROW, rows_per_step=world.rows_per_step,
        num_steps=world.num_steps, store_fingerprint="", domains=_domains(world),
    )  # fmt: skip
    program = [segment for segment in kind.compile_program(document, genesis) if segment.start_step < world.num_steps]
    ends = [*(segment.start_step for segment in program[1:]), world.num_steps]
    for segment, end in zip(program, ends, strict=True):
        shares = tuple(share / PROPORTION_TOTAL for share in segment.proportions)
        yield Stretch(num_steps=end - segment.start_step, shares=shares)
