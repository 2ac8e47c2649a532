"""What an online policy is: it says what to read between two decisions, and decides from what the losses did.

A kind is one file in `policies/` with `Document` (an OnlineDocument), `stretches` and `propose`. Both functions are
pure: no clock, no RNG object, no input or output. State goes from one decision to the next as plain JSON data, so that
a decision can be recomputed from the journal (DESIGN.md contract 3).

Policies act on *arms*: each arm is one domain or several that are mixed in proportion to their rows. K arms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mixwright.data_mixing.config_file import StrictModel
from mixwright.data_mixing.mixture import Mixture
from mixwright.data_mixing.policy import PolicyDocument

MAX_ARMS = 16
"""Perturbing or exploring more arms than this one by one costs more than it can tell."""

Losses = tuple[float | None, ...]
"""Nats per token of plain cross-entropy, one per arm; None where nothing was measured or it was not finite."""


class Guard(StrictModel):
    """Limits on every decision, whatever the policy proposes.

    `floor` is the smallest share of an arm, `max_l1_change` the largest sum of absolute changes of the shares in one
    decision. A decision that sees fewer tokens than `min_tokens` holds. After an error, and after `timeout_s`, the
    mixture is held, or replaced by `fallback` if there is one.
    """

    floor: float = Field(default=0.005, ge=0, lt=1)
    max_l1_change: float = Field(default=0.5, gt=0, le=2)
    min_tokens: int = Field(default=0, ge=0)
    timeout_s: float = Field(default=30.0, gt=0)
    fallback: Mixture | None = None


class OnlineDocument(PolicyDocument):
    """Keys of every online policy.

    `initial` is the mixture to start from (default: all arms alike). `target` says how much the validation loss of
    each domain counts (default: all arms alike). `arms` names groups of domains by their names or globs; default: each
    domain is an arm, or, above MAX_ARMS domains, the part of their names before the first '-', '_' or '.'. With
    `decide: sync` the trainer waits at the end of a round for the decision (at most guard.timeout_s); with `bridge`
    it goes on with the mixture so far.
    """

    initial: Mixture | None = None
    target: Mixture | None = None
    arms: dict[str, tuple[str, ...]] | None = None
    decide: Literal["sync", "bridge"] = "sync"
    guard: Guard = Guard()

    def check_arms(self, names: tuple[str, ...]) -> None:
        """Check keys that name arms against the run's; raises PolicyRejected."""

    def start(self, names: tuple[str, ...]) -> Sequence[float] | None:
        """Shares of the arms [K] to start from when `initial` is not given; None: all arms alike."""
        return None


class Stretch(StrictModel):
    """`num_steps` steps of one mixture, shares [K] with sum 1; validated at its end when `evaluate` is set."""

    num_steps: int = Field(gt=0)
    shares: tuple[float, ...]
    evaluate: bool = False
    is_perturbation: bool = False


class Interval(StrictModel):
    """What happened in steps [first_step, last_step], which were read with one mixture.

    rows: really read of each arm, [K]. before, after: validation losses [K] at the two ends, always on the same rows.
    train_loss: mean training loss [K]; train_tokens [K]. learning_rate: mean over the steps, None where unknown.
    """

    first_step: int = Field(ge=0)
    last_step: int = Field(ge=0)
    rows: tuple[int, ...]
    before: Losses
    after: Losses
    train_loss: Losses
    train_tokens: tuple[int, ...]
    learning_rate: float | None = None
    is_perturbation: bool = False

    @property
    def num_steps(self) -> int:
        return self.last_step - self.first_step + 1


class Window(StrictModel):
    """All that a decision may look at; journaled with it.

    `step` is the boundary of the decision: steps before it are done. `decision` counts the decisions of this policy
    from 0. `shares` [K] is the mixture that the last decision chose (outside perturbations). `rows_available` [K] are
    the training rows of each arm. `intervals` are those since the last decision, in order, without gaps.
    """

    step: int = Field(ge=0)
    decision: int = Field(ge=0)
    arms: tuple[str, ...]
    shares: tuple[float, ...]
    intervals: tuple[Interval, ...]
    rows_available: tuple[int, ...]
    num_steps: int = Field(gt=0)
    tokens_per_row: int = Field(gt=0)
    target: tuple[float, ...] | None = None


class Proposal(StrictModel):
    """What a policy wants: shares [K] >= 0 with a positive sum, its state, and figures for people to look at.

    `held` gives the reason when the policy keeps the mixture because the window tells too little.
    """

    shares: tuple[float, ...]
    state: dict[str, Any] = Field(default_factory=dict)
    diagnostics: dict[str, Any] = Field(default_factory=dict)
    held: str = ""


class OnlineKind(Protocol):
    """What the file of an online policy provides."""

    Document: type[OnlineDocument]

    def stretches(self, document: Any, shares: Sequence[float], decision: int, key: int) -> tuple[Stretch, ...]:
        """What is read from decision `decision - 1` (0: from the commit) up to decision `decision`.

        `shares` [K] is the mixture just decided; `key` seeds keyed permutations (never an RNG object).
        """
        ...

    def propose(self, document: Any, window: Window, state: Mapping[str, Any]) -> Proposal:
        """The decision; `state` is that of the last proposal, {} at the first."""
        ...


def loss_array(losses: Losses) -> NDArray[np.float64]:
    """Losses [K] with NaN for None."""
    return np.array([np.nan if loss is None else loss for loss in losses], dtype=np.float64)
