"""One decision of an online policy: ask the kind, guard what it proposes, lay out what is read until the next one.

Pure functions of their arguments. Whatever the losses are and whatever a kind does with them, `decide` returns a
mixture that can be trained on, and says in words why it is not the one that the policy wanted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mixwright.data_mixing.arms import Arms
from mixwright.data_mixing.guard import Shares, guarded, normalised
from mixwright.data_mixing.online import OnlineDocument, OnlineKind, Proposal, Stretch, Window

logger = logging.getLogger(__name__)

Action = Literal["propose", "hold", "fallback"]


@dataclass(frozen=True)
class Decided:
    """shares [K] after the guard; what is read up to the next decision; the proposal with the state to go on from."""

    shares: tuple[float, ...]
    proposal: Proposal
    stretches: tuple[Stretch, ...]
    action: Action
    reason: str


def first_stretches(kind: OnlineKind, document: OnlineDocument, arms: Arms, key: int) -> tuple[Stretch, ...]:
    """What is read from the commit up to decision 0, starting from the document's initial mixture.

    Raises PolicyRejected when the document cannot work with so many arms.
    """
    return kind.stretches(document, arms.initial_K, 0, key)


def decide(
    kind: OnlineKind,
    document: OnlineDocument,
    window: Window,
    state: Mapping[str, Any],
    key: int,
    fallback: Sequence[float] | None = None,
) -> Decided:
    """Decision `window.decision` of a policy; `state` and `key` as in OnlineKind, `fallback` is Arms.fallback_K.

    Never raises for bad numbers: then the mixture is held, or moved towards `fallback` where there is one.
    """
    num_arms = len(window.arms)
    current_K = normalised(window.shares, num_arms)
    proposal, wanted_K, failure = _ask(kind, document, window, state, current_K)
    action: Action = "hold" if proposal.held else "propose"
    if failure and fallback is not None:
        action, wanted_K = "fallback", normalised(fallback, num_arms)
    share_K = current_K if action == "hold" else guarded(current_K, wanted_K, document.guard)
    shares = tuple(share_K.tolist())
    stretches = _next_stretches(kind, document, window, shares, key)
    return Decided(shares, proposal, stretches, action, failure or proposal.held)


def perturbation_share(stretches: Sequence[Stretch]) -> float:
    """Part of the steps that are read only to learn from them."""
    num_steps = sum(stretch.num_steps for stretch in stretches)
    return sum(stretch.num_steps for stretch in stretches if stretch.is_perturbation) / num_steps if num_steps else 0.0


def _ask(
    kind: OnlineKind, document: OnlineDocument, window: Window, state: Mapping[str, Any], current_K: Shares
) -> tuple[Proposal, Shares, str]:
    """The kind's proposal, its shares, and what went wrong ("" if nothing); after a failure the state stays."""
    held = Proposal(shares=tuple(current_K.tolist()), state=dict(state))
    num_tokens = sum(sum(interval.train_tokens) for interval in window.intervals)
    if len(current_K) == 1:
        return held.model_copy(update={"held": "there is one arm"}), current_K, ""
    if not window.intervals or num_tokens < document.guard.min_tokens:
        reason = (
            f"{num_tokens:,} tokens since the last decision, guard.min_tokens asks for {document.guard.min_tokens:,}"
        )
        return held.model_copy(update={"held": reason}), current_K, ""
    try:
        with np.errstate(all="ignore"):
            proposal = kind.propose(document, window, state)
        wanted_K = normalised(proposal.shares, len(current_K))
        json.dumps([proposal.state, proposal.diagnostics], allow_nan=False)
    except Exception as error:  # a kind may be anyone's code; the job goes on whatever it does
        logger.warning("the policy failed in decision %d", window.decision, exc_info=True)
        failure = f"the policy failed: {type(error).__name__}: {' '.join(str(error).split())}"[:500]
        return held.model_copy(update={"held": failure}), current_K, failure
    return proposal, wanted_K, ""


def _next_stretches(
    kind: OnlineKind, document: OnlineDocument, window: Window, shares: tuple[float, ...], key: int
) -> tuple[Stretch, ...]:
    """The kind's stretches; one without perturbations when the run ends before another decision."""
    steps_left = max(1, window.num_steps - window.step)
    try:
        stretches = kind.stretches(document, shares, window.decision + 1, key)
    except Exception:
        logger.warning("the policy could not lay out decision %d", window.decision + 1, exc_info=True)
        steps_so_far = sum(interval.num_steps for interval in window.intervals)
        return (Stretch(num_steps=min(steps_left, max(1, steps_so_far)), shares=shares, evaluate=True),)
    if sum(stretch.num_steps for stretch in stretches) >= steps_left:
        return (Stretch(num_steps=steps_left, shares=shares),)
    return stretches
