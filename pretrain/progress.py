"""What a job tells whoever watches it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Progress:
    """State after `step` of `num_steps` steps. Losses are those of the last report, in nats per token.

    `policy_lsn` is None where no policy decides what is read.
    """

    step: int
    num_steps: int
    tokens_per_step: int
    loss: float | None
    domain_losses: Mapping[str, float]
    policy_lsn: int | None


class Watcher(Protocol):
    """A place to show a job; the command line's console is one."""

    def say(self, text: str) -> None: ...
    def progress(self, progress: Progress) -> None: ...
    def close(self) -> None: ...
    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None: ...


def stage_progress(say: Callable[[str], None], interval_s: float = 10.0) -> Callable[[str, int, int], None]:
    """Tells of a stage when it begins, now and then with the time that is left, and when it ends."""
    began: dict[str, tuple[float, int]] = {}
    told: dict[str, float] = {}

    def tell(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        start, at_start = began.setdefault(stage, (now, done))
        if done < total and now - told.get(stage, -interval_s) < interval_s:
            return
        told[stage] = now
        speed = (done - at_start) / (now - start) if now > start else 0.0
        left = f", about {(total - done) / speed / 60:.1f} min left" if speed and done < total else ""
        say(f"{stage}: {done:,} of {total:,}{left}")

    return tell
