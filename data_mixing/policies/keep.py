"""`keep`: the mixture in force stays; what changes is how samples are weighted, or the caps."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from mixwright.data_mixing.entries import Genesis, PolicyEntry, Segment
from mixwright.data_mixing.errors import PolicyRejected
from mixwright.data_mixing.policy import PolicyDocument


class Document(PolicyDocument):
    """Nothing but the keys that every policy has, of which `loss_weighting` or `caps` must be given."""

    kind: Literal["keep"]

    @model_validator(mode="after")
    def _changes_something(self) -> Document:
        if self.loss_weighting is None and not self.caps:
            raise ValueError("keep changes nothing: expected loss_weighting or caps")
        return self


def compile_program(document: Document, genesis: Genesis) -> tuple[Segment, ...]:
    """Raises PolicyRejected: a run does not begin with `keep`."""
    raise PolicyRejected("kind: keep needs a mixture in force, and this run has none yet")


def kept(policy: PolicyEntry) -> PolicyEntry:
    """The policy to go on with; raises PolicyRejected for an online one, which a commit would end."""
    if policy.marks or policy.root is not None:
        raise PolicyRejected(
            "kind: keep cannot take over from an online policy, which would stop learning; submit that policy again "
            "with loss_weighting (and `initial`, to go on from a mixture)"
        )
    return policy
