"""What a job tells whoever watches it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Progress:
    """State after `step` of `num_steps` steps. Losses are those of the last report, in nats per token."""

    step: int
    num_steps: int
    tokens_per_step: int
    loss: float | None
    domain_losses: Mapping[str, float]
    policy_lsn: int


class Watcher(Protocol):
    """A place to show a job; the command line's console is one."""

    def say(self, text: str) -> None: ...
    def progress(self, progress: Progress) -> None: ...
    def close(self) -> None: ...
    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None: ...
