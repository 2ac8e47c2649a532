"""`user`: a function of your own decides, in a process with limits on the controller's host.

    def propose(params: dict, window: dict, state: dict) -> dict:
        return {"shares": [0.5, 0.5], "state": {}, "diagnostics": {}}

`window` is `online.Window` as plain data, `state` what the last decision returned. The host must allow the function:
MIXWRIGHT_USER_POLICIES="my_lab.policies:*". Replaying a decision calls it again, so it should depend on its arguments
alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError

from mixwright.data_mixing.errors import PolicyRejected
from mixwright.data_mixing.online import OnlineDocument, Proposal, Stretch, Window
from mixwright.data_mixing.sandbox import ALLOW_LIST, UserCodeError, ask, is_allowed


class Document(OnlineDocument):
    """`path`: `module:function`, importable on the controller's host; `params` are handed to it.

    It is asked every `round_steps` steps; `evaluate` validates before. A call may take guard.timeout_s and
    `memory_mib`.
    """

    kind: Literal["user"]
    path: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", max_length=200)
    params: dict[str, Any] = Field(default_factory=dict)
    round_steps: int = Field(default=100, ge=1, strict=True)
    evaluate: bool = Field(default=True, strict=True)
    memory_mib: int = Field(default=1024, ge=64, strict=True)

    def check_arms(self, names: tuple[str, ...]) -> None:
        """Raise PolicyRejected unless this host runs the function."""
        if not is_allowed(self.path):
            raise PolicyRejected(
                f"path: {self.path!r} is not on this host's allow-list; the environment variable {ALLOW_LIST} of the "
                'controller names what may run, such as "my_lab.policies:*"'
            )


def stretches(document: Document, shares: Sequence[float], decision: int, key: int) -> tuple[Stretch, ...]:
    """One stretch."""
    return (Stretch(num_steps=document.round_steps, shares=tuple(shares), evaluate=document.evaluate),)


def propose(document: Document, window: Window, state: Mapping[str, Any]) -> Proposal:
    """What the function returns. Raises UserCodeError."""
    arguments = {"params": document.params, "window": window.model_dump(mode="json"), "state": dict(state)}
    answer = ask(document.path, arguments, document.guard.timeout_s, document.memory_mib)
    try:
        return Proposal.model_validate(answer)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "its answer"
        raise UserCodeError(f"{document.path}: {where}: {problem['msg'].lower()}") from None
