"""`static`: one mixture for the rest of the run."""

from __future__ import annotations

from typing import Literal

from mixwright.data_mixing.entries import Genesis, Segment
from mixwright.data_mixing.mixture import Mixture, segments, shares
from mixwright.data_mixing.policy import PolicyDocument


class Document(PolicyDocument):
    """`mixture`: relative numbers by domain name or glob."""

    kind: Literal["static"]
    mixture: Mixture


def compile_program(document: Document, genesis: Genesis) -> tuple[Segment, ...]:
    """One segment. Raises PolicyRejected."""
    return segments([(0, shares(document.mixture, genesis.domains, "mixture"))])
