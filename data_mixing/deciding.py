"""Deciding for the online policies of a run, as their decisions fall due; every decision is journaled with its input.

A decision is two entries: DECISION says what was decided and from what, and the POLICY that follows carries it out. A
controller that dies in between is completed by the next one, which finds the DECISION without its POLICY.
"""

from __future__ import annotations

from typing import Any, cast

from mixwright.data_mixing.decide import Decided, perturbation_share
from mixwright.data_mixing.entries import Decision, EntryBody, Genesis, PolicyEntry
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.online import OnlineDocument, OnlineKind, Window
from mixwright.data_mixing.policy import parse
from mixwright.data_mixing.rounds import Round, due_shadow_step, due_step, window_of

HELD = "decisions are held"
RESUMED = "decisions go on"
AFFORDABLE_PERTURBATION = 0.2


def due_entry(history: RunHistory, made: EntryBody | None = None) -> EntryBody | None:
    """The next entry that a controller owes the run's online policies; None when nothing is due.

    `made` is what an earlier call returned and something that was journaled meanwhile kept out: a decision is not made
    again from the same window and state, or a policy that takes longer than reports are apart would never decide.
    """
    if not history.has_genesis or history.end is not None:
        return None
    active = history.active_root()
    for root in [*([] if active is None else [active]), *history.shadow_roots()]:
        body = _unfinished(history, root) or _due_decision(history, root, made)
        if body is not None:
            return body
    return None


def round_of(policy: PolicyEntry, genesis: Genesis) -> Round:
    """The online policy of a POLICY entry; raises PolicyRejected when this installation does not take it."""
    document, kind = parse(policy.document)
    return Round.of(cast(OnlineKind, kind), cast(OnlineDocument, document), genesis)


def cost_remarks(policy: PolicyEntry, genesis: Genesis) -> list[str]:
    """What a user should know about the price of an online policy."""
    if not policy.marks or policy.root is not None:
        return []
    round_ = round_of(policy, genesis)
    share = perturbation_share(round_.kind.stretches(round_.document, round_.arms.initial_K, 1, round_.key(1)))
    if share <= AFFORDABLE_PERTURBATION:
        return []
    return [f"{share:.0%} of the steps perturb the mixture in order to learn; more than 20% is rarely worth it"]


def recompute(decision: Decision, policy: PolicyEntry, genesis: Genesis) -> Decided:
    """A journaled decision once more, from what it was made from; `policy` is its online policy's entry."""
    return round_of(policy, genesis).decide(Window.model_validate(decision.window), decision.state)


def differences(decision: Decision, decided: Decided) -> list[str]:
    """What a recomputed decision has that the journaled one has not, one line a figure."""
    again: dict[str, Any] = {
        "action": decided.action,
        "shares": decided.shares,
        "proposal": decided.proposal.model_dump(mode="json"),
        "stretches": tuple(stretch.model_dump(mode="json") for stretch in decided.stretches),
    }
    journaled = {name: getattr(decision, name) for name in again}
    return [
        f"{name}: journaled {journaled[name]!r}, recomputed {value!r}"
        for name, value in again.items()
        if journaled[name] != value
    ]


def _unfinished(history: RunHistory, root: int) -> PolicyEntry | None:
    """The POLICY of the newest decision, when there is none yet."""
    known = history.decisions.get(root)
    if known is None:
        return None
    lsn, decision = known
    for policy_lsn in reversed(history.policies):
        if policy_lsn < lsn:
            break
        if history.policies[policy_lsn].decision_lsn == lsn:
            return None
    policy = history.policies[root]
    return round_of(policy, history.genesis).next_policy(root, policy, lsn, decision)


def _due_decision(history: RunHistory, root: int, made: EntryBody | None) -> Decision | None:
    policy, known = history.policies[root], history.decisions.get(root)
    if known is not None and not known[1].stretches:
        return None if history.is_held else _resumed(history, root, known[1])
    step = due_shadow_step(history, root) if policy.shadow else due_step(history)
    if step is None or (known is not None and known[1].step >= step):
        return None
    round_ = round_of(policy, history.genesis)
    window = window_of(round_, history, root, step)
    state = _state(known[1]) if known else {}
    if history.is_held:
        return _held(root, policy, window, state)
    looked_at = (root, step, window.model_dump(mode="json"), state)
    if isinstance(made, Decision) and (made.policy_lsn, made.step, made.window, made.state) == looked_at:
        return made
    decided = round_.decide(window, state)
    return Decision(
        policy_lsn=root,
        step=step,
        decision=window.decision,
        window=window.model_dump(mode="json"),
        state=state,
        proposal=decided.proposal.model_dump(mode="json"),
        shares=decided.shares,
        stretches=tuple(stretch.model_dump(mode="json") for stretch in decided.stretches),
        action=decided.action,
        reason=decided.reason,
        shadow=policy.shadow,
    )


def _state(decision: Decision) -> dict[str, Any]:
    """What a decision left for the next one; a held one leaves what it found."""
    state: dict[str, Any] = decision.proposal.get("state", decision.state)
    return state


def _held(root: int, policy: PolicyEntry, window: Window, state: dict[str, Any]) -> Decision:
    """The mixture stays for good: no more rounds until people let decisions go on."""
    return Decision(
        policy_lsn=root,
        step=window.step,
        decision=window.decision,
        window=window.model_dump(mode="json"),
        state=state,
        proposal={},
        shares=window.shares,
        stretches=(),
        action="hold",
        reason=HELD,
        shadow=policy.shadow,
    )


def _resumed(history: RunHistory, root: int, held: Decision) -> Decision | None:
    """A new round with the mixture that was held."""
    step = history.last_step + 1
    if step >= history.genesis.num_steps:
        return None
    policy = history.policies[root]
    round_ = round_of(policy, history.genesis)
    decision = held.decision + 1
    stretches = round_.kind.stretches(round_.document, held.shares, decision, round_.key(decision))
    return Decision(
        policy_lsn=root,
        step=step,
        decision=held.decision,
        window={},
        state=_state(held),
        proposal={},
        shares=held.shares,
        stretches=tuple(stretch.model_dump(mode="json") for stretch in stretches),
        action="hold",
        reason=RESUMED,
        shadow=policy.shadow,
    )
