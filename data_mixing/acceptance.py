"""Accepting a policy document: checked against a run, compiled into the entry that the journal stores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from mixwright.data_mixing.domain import Cap
from mixwright.data_mixing.entries import Genesis, Mark, PolicyEntry, Segment
from mixwright.data_mixing.errors import PolicyRejected
from mixwright.data_mixing.forecast import dead_end, expected_commits, expected_plan, first_open_step
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.mixture import assign
from mixwright.data_mixing.online import OnlineDocument, OnlineKind
from mixwright.data_mixing.policies import keep
from mixwright.data_mixing.policy import PolicyDocument, PolicyKind, parse
from mixwright.data_mixing.rounds import Round


def accept(document: Any, genesis: Genesis, *, history: RunHistory | None = None, request_id: str = "") -> PolicyEntry:
    """Check a document (a mapping, or YAML text) against a run and compile it.

    `history` is the run so far (None: it has not begun). Raises PolicyRejected with one line that names the key.
    """
    history = history or RunHistory()
    parsed, kind = parse(document)
    before = _kept(parsed, history)
    program, marks = (before.program, ()) if before else _compile(parsed, kind, genesis)
    _check_at_step(parsed.at_step, genesis, first_open_step(history))
    entry = PolicyEntry(
        document=parsed.model_dump(mode="json", exclude_unset=True),
        program=program,
        counts_from_commit=bool(marks),
        marks=marks,
        caps={**(before.caps if before else {}), **_expand_caps(parsed.caps, genesis)},
        loss_weighting=parsed.loss_weighting,
        at_step=parsed.at_step,
        shadow=parsed.shadow,
        author=parsed.author,
        why=parsed.why,
        request_id=request_id,
    )
    plan = expected_plan(genesis, history, (history.last_lsn + 1, entry))
    reason = dead_end(plan, first_open_step(history))
    if reason:
        raise PolicyRejected(reason)
    return entry


def _kept(document: PolicyDocument, history: RunHistory) -> PolicyEntry | None:
    """The policy whose mixture a `keep` goes on with: the one that will be in force then. Raises PolicyRejected."""
    expected = expected_commits(history)
    return keep.kept(expected[-1].policy) if isinstance(document, keep.Document) and expected else None


def _compile(
    document: PolicyDocument, kind: PolicyKind, genesis: Genesis
) -> tuple[tuple[Segment, ...], tuple[Mark, ...]]:
    """Program and marks; a policy that decides nothing while the run goes on has no marks. Raises PolicyRejected."""
    if isinstance(document, OnlineDocument):
        return Round.of(cast(OnlineKind, kind), document, genesis).first_program()
    return kind.compile_program(document, genesis), ()


def _check_at_step(at_step: int | None, genesis: Genesis, first_open: int) -> None:
    if at_step is None:
        return
    if at_step >= genesis.num_steps:
        raise PolicyRejected(f"at_step: step {at_step} is not in the run, which has steps 0 to {genesis.num_steps - 1}")
    if at_step < first_open:
        raise PolicyRejected(
            f"at_step: step {at_step} has passed, the first open step is {first_open}; "
            "leave at_step out for as soon as possible"
        )


def _expand_caps(caps: Mapping[str, Cap], genesis: Genesis) -> dict[str, Cap]:
    for pattern, cap in caps.items():
        if cap.max_epochs is not None and not math.isfinite(cap.max_epochs):
            raise PolicyRejected(f"caps.{pattern}.max_epochs: expected a finite number, found {cap.max_epochs}")
    assigned = assign(caps, genesis.domains, "caps")
    return {genesis.domains[index].name: caps[pattern] for pattern, members in assigned.items() for index in members}
