"""Random histories of a run: domains, caps, policies of every kind that decides nothing, commits, refusals, reports.

A log is built as the service builds one (`accept`, `commit_body`), in memory: entries with their hash chain, no files.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.domain import Cap
from mixwright.data_mixing.entries import (
    Cancel,
    Checkpoint,
    DomainLoss,
    EntryBody,
    Genesis,
    Lease,
    Pause,
    Reject,
    Report,
)
from mixwright.data_mixing.entry_file import NO_HASH, Entry, sealed
from mixwright.data_mixing.errors import MixingError, PolicyRejected
from mixwright.data_mixing.history import HistoryState, RunHistory
from mixwright.data_mixing.leader import commit_body
from tests.data_mixing.plan_cases import genesis

NUM_STEPS = 36


@dataclass
class RandomLog:
    """A log, and what the history was after each entry (of the entry's number)."""

    genesis: Genesis
    history: RunHistory = field(default_factory=RunHistory)
    entries: list[Entry] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    states: list[HistoryState] = field(default_factory=list)

    def append(self, body: EntryBody, writer: str = "leader") -> int:
        prev = self.entries[-1].hash if self.entries else NO_HASH
        entry, raw = sealed(len(self.entries), body, writer, 1.5 * len(self.entries), prev)
        self.history.apply(entry)
        self.entries.append(entry)
        self.raw.append(raw)
        self.states.append(self.history.state())
        return entry.lsn


@st.composite
def random_logs(draw: st.DrawFn, max_changes: int = 7) -> RandomLog:
    """A valid log, decided by one number: its shrunk form would tell no more than its printed entries."""
    return make_log(random.Random(draw(st.integers(0, 2**48))), max_changes)


def make_log(chance: random.Random, max_changes: int = 7) -> RandomLog:
    sizes = [chance.choice((1, 2, 3, 7, 16, 31, 64, 100, 151)) for _ in range(chance.randint(1, 7))]
    caps = {i: _cap(chance) for i in range(len(sizes)) if chance.random() < 0.3}
    run = genesis(
        sizes, rows_per_step=chance.randint(1, 24), num_steps=NUM_STEPS, seed=chance.getrandbits(63), caps=caps
    )
    log = RandomLog(run)
    log.append(run)
    log.append(Lease(role="trainer", holder="leader", epoch=0))
    _begin(log, chance)
    for _ in range(chance.randint(0, max_changes)):
        _something_happens(log, chance)
    return log


def _begin(log: RandomLog, chance: random.Random) -> None:
    """The first policy that the run can take; one that reads everything always can."""
    names = [domain.name for domain in log.genesis.domains]
    allowed = {name: {"on_exhaust": "allow"} for name in names}
    for document in (
        {**random_document(names, chance), "shadow": False},
        {"kind": "temperature", "temperature": 1, "caps": allowed},
    ):
        try:
            lsn = log.append(accept(document, log.genesis, history=log.history))
        except PolicyRejected:
            continue
        log.append(commit_body(log.history, lsn, log.history.policies[lsn], 0))
        return
    raise AssertionError("a policy without caps was refused")


def _something_happens(log: RandomLog, chance: random.Random) -> None:
    names = [domain.name for domain in log.genesis.domains]
    match chance.randrange(8):
        case 0:
            loss = DomainLoss(loss_sum=chance.random(), loss_square_sum=1.0, num_tokens=8, num_rows=1)
            step = min(log.history.last_step + 1 + chance.randrange(3), NUM_STEPS - 1)
            log.append(Report(kind=chance.choice(("train", "validation")), first_step=step, last_step=step,
                              domains={chance.choice(names): loss}, attempt=0))  # fmt: skip
        case 1:
            log.append(Pause(held=not log.history.is_held), "controller")
        case 2:
            log.append(Checkpoint(step=max(log.history.last_step + 1, 0), tag="t", digest="0"))
        case _:
            _change(log, random_document(names, chance), chance)


def _change(log: RandomLog, document: dict[str, Any], chance: random.Random) -> None:
    """A policy is proposed, and refused, withdrawn, or committed some steps ahead."""
    try:
        policy = accept(document, log.genesis, history=log.history, request_id=f"{chance.getrandbits(32):x}")
    except PolicyRejected as error:
        log.append(Reject(document=document, reason=str(error)), "controller")
        return
    lsn = log.append(policy, "controller")
    if policy.shadow or chance.random() < 0.1:
        return
    if chance.random() < 0.1:
        log.append(Cancel(policy_lsn=lsn), "controller")
        return
    soonest = max(log.history.commits[-1].effective_step, log.history.last_step + 1)
    effective_step = max(policy.at_step or 0, soonest + chance.choice((0, 0, 1, 2, 5)))
    try:
        body = commit_body(log.history, lsn, policy, effective_step)
    except MixingError:  # the run ends before this step
        return
    log.append(body)


def random_document(names: list[str], chance: random.Random) -> dict[str, Any]:
    """A policy document that is valid by itself, if not for every run."""
    document = _program(names, chance)
    if chance.random() < 0.35:
        document["caps"] = {name: _cap(chance).model_dump() for name in chance.sample(names, min(2, len(names)))}
    if chance.random() < 0.2:
        document["loss_weighting"] = {"strategy": "linupper", "r": chance.choice((0.5, 2.0))}
    if chance.random() < 0.15:
        document["at_step"] = chance.randrange(NUM_STEPS)
    if chance.random() < 0.1:
        document["shadow"] = True
    return document


def _program(names: list[str], chance: random.Random) -> dict[str, Any]:
    match chance.randrange(6):
        case 0:
            return {"kind": "temperature", "temperature": chance.choice((0.3, 1, 5, 1000))}
        case 1:
            return {"kind": "unimax", "max_epochs": chance.choice((1, 2, 4.5))}
        case 2:
            return {"kind": "keep", "loss_weighting": {"strategy": "quadratic"}}
        case 3:
            steps = sorted(chance.sample(range(NUM_STEPS), chance.randint(1, 4)))
            points = [{"step": step, "mixture": _mixture(names, chance)} for step in steps]
            for point in points[1:]:
                point["ramp"] = chance.choice(("hold", "linear", "cosine"))
            return {"kind": "schedule", "points": points}
        case _:
            return {"kind": "static", "mixture": _mixture(names, chance)}


def _mixture(names: list[str], chance: random.Random) -> dict[str, float]:
    numbers = {name: chance.choice((0, 1e-9, 0.1, 1, 1, 3, 1e6)) for name in names if chance.random() < 0.8}
    return numbers if any(numbers.values()) else {chance.choice(names): 1.0}


def _cap(chance: random.Random) -> Cap:
    action = chance.choice(("renormalise", "renormalise", "stop", "allow"))
    return Cap(max_epochs=chance.choice((0.3, 0.5, 1, 1.5, 2, 3.25, 40, None)), on_exhaust=action)
