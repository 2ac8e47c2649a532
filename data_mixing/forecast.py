"""What a run will read: rows, epochs and exhaustion of every domain, from the plan alone (spec/mixing.md 4.2).

Cursors are a closed form of the step, so a forecast over any number of steps costs a few evaluations of the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mixwright.data_mixing.domain import Cap
from mixwright.data_mixing.entries import Genesis, PolicyEntry
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.plan import CommittedPolicy, Exhaustion, Plan

ASSUMED_LEAD_STEPS = 8
"""Steps between the acceptance of a policy and its effect, where the trainer decides and a forecast must guess."""


@dataclass(frozen=True)
class DomainForecast:
    """One domain over [from_step, until_step). `proportion` is its share of the tokens read in between.

    `epochs` is how often it has been read by `until_step`, from the beginning of the run.
    """

    name: str
    proportion: float
    num_tokens: int
    epochs: float
    exhaustion: Exhaustion | None


@dataclass(frozen=True)
class Forecast:
    """`stop_step` is the first step that cannot be filled; None when `until_step` is reached."""

    from_step: int
    until_step: int
    stop_step: int | None
    domains: tuple[DomainForecast, ...]


@dataclass(frozen=True)
class MixtureChange:
    """A domain's proportion before and after a policy takes effect."""

    name: str
    before: float
    after: float


def forecast(plan: Plan, from_step: int, until_step: int) -> Forecast:
    """What is read in steps [from_step, until_step) of the plan, domains in catalogue order."""
    genesis = plan.genesis
    first_G, last_G = plan.cursors(from_step), plan.cursors(until_step)
    drawn_G = last_G - first_G
    # A policy that begins says anew which of its domains have reached their caps: what was before it does not count.
    events = plan.exhaustion(until_step, plan.policy_step(from_step))
    # A later commit may raise a cap: the last event of a domain is the one that counts.
    by_name = {event.domain: event for event in events}
    stops = [event.step for event in events if event.action == "stop"]
    total = max(int(drawn_G.sum()), 1)
    domains = tuple(
        DomainForecast(
            name=domain.name,
            proportion=int(drawn) / total,
            num_tokens=int(drawn) * genesis.sequence_length,
            epochs=int(last) / domain.num_rows,
            exhaustion=by_name.get(domain.name),
        )
        for domain, drawn, last in zip(genesis.domains, drawn_G, last_G, strict=True)
    )
    return Forecast(from_step, until_step, min(stops, default=None), domains)


def expected_commits(history: RunHistory, new: tuple[int, PolicyEntry] | None = None) -> list[CommittedPolicy]:
    """The commits so far, and the ones to expect for what is pending and for policy `new` (its entry number, itself).

    Expected effective steps are estimates: the trainer decides when it commits.
    """
    soonest = soonest_step(history)
    waiting = dict([*history.pending(), *([new] if new else [])]).items()
    expected = [CommittedPolicy(max(policy.at_step or 0, soonest), lsn, policy) for lsn, policy in waiting]
    return [*history.commits, *sorted(expected, key=lambda commit: (commit.effective_step, commit.lsn))]


def expected_plan(genesis: Genesis, history: RunHistory, new: tuple[int, PolicyEntry] | None = None) -> Plan:
    """The plan of `expected_commits`; what the history's own plan has derived is not derived again."""
    plan = history.plan() if history.commits else Plan(genesis, ())
    for commit in expected_commits(history, new)[len(history.commits) :]:
        plan = plan.extended(commit)
    return plan


def first_open_step(history: RunHistory) -> int:
    """The first step that a policy submitted now could change, if the trainer is no further than it reported."""
    return max(history.last_step + 1, history.commits[-1].effective_step) if history.commits else 0


def soonest_step(history: RunHistory) -> int:
    """About the first step that a policy submitted now will change: the trainer commits some steps ahead."""
    return max(first_open_step(history), history.last_step + 1 + ASSUMED_LEAD_STEPS) if history.commits else 0


def mixture_change(before: Plan, after: Plan, step: int) -> list[MixtureChange]:
    """Proportions of all domains at `step` under two plans of a run, caps included."""
    pairs = zip(
        before.genesis.domains, before.proportions(step).tolist(), after.proportions(step).tolist(), strict=True
    )
    return [MixtureChange(domain.name, old, new) for domain, old, new in pairs]


def dead_end(plan: Plan, from_step: int) -> str | None:
    """Why steps from `from_step` on cannot all be read; None when they can, or when a cap says `stop` itself."""
    last = next((event for event in plan.exhaustion(from_step=from_step) if event.action == "stop"), None)
    if last is None or _cap(plan.genesis, _in_force(plan.commits, last.step), last.domain).on_exhaust == "stop":
        return None
    reached = [f"{event.domain} {event.max_epochs:g} epochs" for event in plan.exhaustion(last.step + 1)]
    return (
        f"caps: from step {last.step} of {plan.genesis.num_steps} on there would be nothing left to read "
        f"({', '.join(dict.fromkeys(reached))}); raise max_epochs, or set on_exhaust: allow (or stop, to end there)"
    )


def remarks(plan: Plan, lsn: int) -> list[str]:
    """What a user should know about accepted policy `lsn`: domains that get nothing, domains that run out.

    `plan` is the expected one, with policy `lsn` in it.
    """
    new = next(commit for commit in plan.commits if commit.lsn == lsn)
    used = {index for segment in new.policy.program for index in np.flatnonzero(segment.proportions).tolist()}
    unused = [domain.name for index, domain in enumerate(plan.genesis.domains) if index not in used]
    lines = [f"these domains get 0: {', '.join(unused)}"] if unused else []
    events = plan.exhaustion(from_step=new.effective_step)
    return lines + [describe(event) for event in events if event.step >= new.effective_step]


def describe(event: Exhaustion) -> str:
    """An exhaustion as a sentence."""
    outcome = "the run ends there" if event.action == "stop" else "its share goes to the other domains"
    return f"{event.domain} reaches {event.max_epochs:g} epochs at step {event.step}: {outcome}"


def _in_force(commits: Sequence[CommittedPolicy], step: int) -> PolicyEntry:
    return next(commit.policy for commit in reversed(commits) if commit.effective_step <= step)


def _cap(genesis: Genesis, policy: PolicyEntry, name: str) -> Cap:
    default = next(domain.cap for domain in genesis.domains if domain.name == name)
    return policy.caps.get(name, default)
