"""Bodies of the journal's entries: what is recorded of a run, and by whom.

| type | writer | says |
|---|---|---|
| GENESIS | leader | what the run is: seed, shape of a step, domains; entry 0 |
| LEASE | controller, leader | who holds a role from here on; an older holder must stop writing |
| POLICY | controller (entry after GENESIS: leader) | an accepted proposal: a program of integer mixtures |
| REJECT | controller | a refused proposal and the reason |
| CANCEL | controller | a POLICY that must no longer be committed |
| COMMIT | leader | a POLICY is in force from `effective_step` on |
| DECISION | controller | what an online policy decided, with everything that it decided from |
| PASS | leader | a decision did not come in time: the program goes on |
| PAUSE | controller | online decisions are held, or go on again |
| REPORT | leader | per-domain loss sums of a window of steps, or of a validation |
| CHECKPOINT | leader | a checkpoint was written |
| END | leader | the run is over, and why |
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

from pydantic import Field, model_validator

from mixwright.data_mixing.config_file import StrictModel
from mixwright.data_mixing.domain import Cap, Domain
from mixwright.data_mixing.loss_weighting import LossWeighting

PROPORTION_TOTAL = 1 << 31
"""Mixtures are stored as integers with this sum, so that the plan is exact integer arithmetic."""
MAX_COUNT = 1 << 62
"""Counts are below it, so that they fit into int64, and a product of two into a float."""


class Genesis(StrictModel):
    """What a run is. `rows_per_step` rows of `sequence_length + 1` tokens make one optimizer step."""

    run: str
    seed: int = Field(ge=0, lt=1 << 63)
    plan_version: Literal[1] = 1
    sequence_length: int = Field(gt=0, lt=MAX_COUNT)
    rows_per_step: int = Field(gt=0, lt=MAX_COUNT)
    num_steps: int = Field(gt=0, lt=MAX_COUNT)
    store_fingerprint: str
    domains: tuple[Domain, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct_names(self) -> Genesis:
        names = [domain.name for domain in self.domains]
        if len(set(names)) != len(names):
            raise ValueError("domain names must be distinct")
        return self


class Segment(StrictModel):
    """From `start_step` on: one mixture, as integers in catalogue order with sum PROPORTION_TOTAL."""

    start_step: int = Field(ge=0)
    proportions: tuple[int, ...]

    @model_validator(mode="after")
    def _sums_to_total(self) -> Segment:
        if min(self.proportions, default=-1) < 0 or sum(self.proportions) != PROPORTION_TOTAL:
            raise ValueError(f"proportions must be non-negative integers with sum {PROPORTION_TOTAL}")
        return self


class Mark(StrictModel):
    """A boundary between two steps at which an online policy measures: before `step`, after the one before it.

    Ranks close a loss report there; `evaluate` adds a validation. `is_perturbation` tells what the steps before it
    were for. At `decide` the program ends: a decision is due,
    which ranks wait (`sync`) or not (`bridge`).
    """

    step: int = Field(ge=0)
    evaluate: bool = False
    is_perturbation: bool = False
    decide: Literal["", "sync", "bridge"] = ""
    timeout_s: float = Field(default=30.0, gt=0)


class PolicyEntry(StrictModel):
    """An accepted proposal. The first segment of its `program` starts at 0.

    Steps of `program` and `marks` are training steps, or, when `counts_from_commit`, steps since the effective step.
    `document` is what the user submitted; `caps` overrides the catalogue's cap by domain name. `loss_weighting` None
    leaves the weighting in force as it is.
    `at_step` asks for an effective step; None means as soon as possible. A shadow is never committed.
    `root` is the entry of the online policy that this one carries on, by the DECISION of entry `decision_lsn`.
    `request_id` is chosen by whoever submits, so that a request that is sent twice is journaled once.
    """

    document: dict[str, Any]
    program: tuple[Segment, ...] = Field(min_length=1)
    counts_from_commit: bool = False
    marks: tuple[Mark, ...] = ()
    root: int | None = Field(default=None, ge=0)
    decision_lsn: int | None = Field(default=None, ge=0)
    caps: dict[str, Cap] = Field(default_factory=dict)
    loss_weighting: LossWeighting | None = None
    at_step: int | None = Field(default=None, ge=0)
    shadow: bool = False
    author: str = ""
    why: str = ""
    request_id: str = ""

    @model_validator(mode="after")
    def _program_is_ordered(self) -> PolicyEntry:
        starts = [segment.start_step for segment in self.program]
        if starts[0] != 0 or any(a >= b for a, b in itertools.pairwise(starts)):
            raise ValueError(f"program must start at step 0 and have increasing start steps, found {starts[:10]}")
        marks = [mark.step for mark in self.marks]
        if any(a >= b for a, b in itertools.pairwise(marks)):
            raise ValueError(f"marks must have increasing steps, found {marks[:10]}")
        return self

    def origin(self, effective_step: int) -> int:
        """The training step that step 0 of program and marks stands for, when committed at `effective_step`."""
        return effective_step if self.counts_from_commit else 0


class Reject(StrictModel):
    """A refused proposal: what was submitted and why it cannot be taken."""

    document: Any
    reason: str
    author: str = ""
    request_id: str = ""


class Cancel(StrictModel):
    """A POLICY that was withdrawn before it was committed."""

    policy_lsn: int = Field(ge=0)
    author: str = ""
    why: str = ""
    request_id: str = ""


class Commit(StrictModel):
    """The policy of entry `policy_lsn` is in force from `effective_step` on.

    `plan_digest` fingerprints the plan's derived state at `effective_step` (cursors and credits), so that
    replay can prove that it derives the same.
    """

    policy_lsn: int = Field(ge=0)
    effective_step: int = Field(ge=0, lt=MAX_COUNT)
    plan_digest: str


class Decision(StrictModel):
    """What online policy `policy_lsn` decided at the boundary before `step`, and from what.

    `window` and `state` are all that it looked at, `proposal` is what it wanted, `shares` (one per arm) what came of it
    after the guard; `stretches` are what is read until the next decision, none while decisions are held. `action` says
    whether the mixture was chosen by the policy; `reason` why not.
    """

    policy_lsn: int = Field(ge=0)
    step: int = Field(ge=0, lt=MAX_COUNT)
    decision: int = Field(ge=0)
    window: dict[str, Any]
    state: dict[str, Any]
    proposal: dict[str, Any]
    shares: tuple[float, ...]
    stretches: tuple[dict[str, Any], ...]
    action: Literal["propose", "hold", "fallback"]
    reason: str = ""
    shadow: bool = False


class Pass(StrictModel):
    """No decision came in time at the boundary before `step`: policy `policy_lsn` goes on with its last mixture."""

    policy_lsn: int = Field(ge=0)
    step: int = Field(ge=0, lt=MAX_COUNT)
    reason: str


class Pause(StrictModel):
    """Online policies hold their mixture from their next decision on (`held`), or decide again."""

    held: bool
    author: str = ""
    why: str = ""
    request_id: str = ""


class DomainLoss(StrictModel):
    """Sums over one domain: `loss_sum` and `loss_square_sum` over tokens, in nats of plain cross-entropy."""

    loss_sum: float
    loss_square_sum: float
    num_tokens: int = Field(ge=0, lt=MAX_COUNT)
    num_rows: int = Field(ge=0, lt=MAX_COUNT)


class Report(StrictModel):
    """Per-domain losses of steps [first_step, last_step], over all ranks; domains with no row are left out.

    `digest` is the sum (mod 2**64, hex) of the step digests of the rows really trained on; "" for validation.
    A validation is one of the model after `last_step`, -1 before the first step. `learning_rate` is the mean over the
    steps of a training report.
    """

    kind: Literal["train", "validation"]
    first_step: int = Field(ge=-1, lt=MAX_COUNT)
    last_step: int = Field(ge=-1, lt=MAX_COUNT)
    domains: dict[str, DomainLoss]
    digest: str = ""
    attempt: int = Field(ge=0)
    learning_rate: float | None = None


class Checkpoint(StrictModel):
    """A checkpoint after `step` optimizer steps; `tag` is its folder, `digest` the run digest up to it."""

    step: int = Field(ge=0, lt=MAX_COUNT)
    tag: str
    digest: str


class Lease(StrictModel):
    """`holder` has this role from here on; `epoch` grows by one with each holder of the role."""

    role: Literal["controller", "trainer"]
    holder: str
    epoch: int = Field(ge=0)


class End(StrictModel):
    """The run is over after `step` steps."""

    step: int = Field(ge=0, lt=MAX_COUNT)
    reason: Literal["complete", "exhausted"]
    digest: str


EntryBody = (
    Genesis | PolicyEntry | Reject | Cancel | Commit | Decision | Pass | Pause | Report | Checkpoint | Lease | End
)

BODY_TYPES: dict[str, type[StrictModel]] = {
    "GENESIS": Genesis, "POLICY": PolicyEntry, "REJECT": Reject, "CANCEL": Cancel, "COMMIT": Commit,
    "DECISION": Decision, "PASS": Pass, "PAUSE": Pause, "REPORT": Report,
    "CHECKPOINT": Checkpoint, "LEASE": Lease, "END": End,
}  # fmt: skip
