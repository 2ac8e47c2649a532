"""Errors of the mixing service. Each crosses process borders, so each can be pickled.

Exit codes of the command line: 0 ok, 2 bad input or rejected, 3 unavailable (`exit_code` on the class).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MixingError(Exception):
    """Base of every error that a user of the mixing service may meet; the message is one clear line."""

    exit_code = 2


class ConfigError(MixingError):
    """A configuration file is wrong: names file, key, value, what was expected, the nearest valid name."""


class DataError(MixingError):
    """A source document, store or manifest is unusable: names file:line or domain."""


class StoreChanged(DataError):
    """The token store is not the one that the run was started on."""


class PolicyRejected(MixingError):
    """A policy is not acceptable; the one in force stays."""


class JournalError(MixingError):
    """The journal cannot be read or written: names the entry file."""


class JournalConflict(JournalError):
    """Another writer has taken over this role (controller or trainer) of the run."""


class PlanMismatch(MixingError):
    """The rows that were trained on are not the rows that the plan prescribes."""


class DomainExhausted(MixingError):
    """A domain reached its repetition cap and its action is `stop`."""

    def __init__(self, domain: str, step: int, max_epochs: float) -> None:
        self.domain, self.step, self.max_epochs = domain, step, max_epochs
        super().__init__(f"domain {domain!r} reached max_epochs={max_epochs:g} at step {step} (on_exhaust: stop)")

    def __reduce__(self) -> tuple[type[DomainExhausted], tuple[str, int, float]]:
        return type(self), (self.domain, self.step, self.max_epochs)


class AccessRefused(MixingError):
    """A verb that changes something was sent without the run's token, or with a wrong one."""


class ServiceUnavailable(MixingError):
    """The controller or its Ray cluster cannot be reached within the time limit."""

    exit_code = 3


def nearest(name: str, valid: Iterable[str]) -> str:
    """The hint `; did you mean 'x'?` for a misspelt name, or the list of valid names when none is near."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    shown = ", ".join(names[:16]) + (", ..." if len(names) > 16 else "")
    return f"; valid names: {shown}"
