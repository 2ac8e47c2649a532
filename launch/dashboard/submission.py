"""Policies from the page: the preview from the journal, the submission through the run's own service.

The same code as `mixwright mix submit` and its --dry-run; the page adds nothing and may do nothing more.
"""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mixwright.data_mixing.client import MixingClient
from mixwright.data_mixing.config_file import StrictModel, validate
from mixwright.data_mixing.errors import PolicyRejected
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.policy import plain_mapping, read_text
from mixwright.launch.dashboard.run_view import RunView
from mixwright.launch.mix_options import ANSWER_TIMEOUT_S
from mixwright.launch.mix_preview import preview_of


class Submission(StrictModel):
    """What the form sends: a policy as YAML text, and what the command line has options for."""

    document: str
    author: str = ""
    why: str = ""
    at_step: int | None = None
    shadow: bool = False
    request_id: str | None = None

    def mapping(self) -> dict[str, Any]:
        """The document with the form's own fields in it. Raises PolicyRejected."""
        document = plain_mapping(read_text(self.document))
        given = {"author": self.author, "why": self.why, "at_step": self.at_step, "shadow": self.shadow}
        return {**document, **{key: value for key, value in given.items() if value not in ("", None, False)}}


def read_submission(tree: Any) -> Submission:
    """The request's JSON as a Submission; raises MixingError naming the key that is wrong."""
    if not isinstance(tree, dict):
        raise PolicyRejected(f"request: expected an object, found {type(tree).__name__}")
    return validate(Submission, tree, "request")


def preview(view: RunView, submission: Submission) -> dict[str, Any]:
    """What the policy would do, from what was read of the journal. Raises PolicyRejected as the service would."""
    with view.lock:
        history, plan = _frozen(view.journal.history), view.journal.plan
    if plan is not None:
        history.adopt(plan)  # the view has derived it already
    return asdict(preview_of(history, submission.mapping()))


def _frozen(history: RunHistory) -> RunHistory:
    """A copy that stays as it is while the journal is read on: a preview may take seconds."""
    frozen = copy.copy(history)
    for name, value in vars(history).items():
        if isinstance(value, (list, dict, set, deque)):
            setattr(frozen, name, value.copy())
    return frozen


def submit(run_dir: Path, submission: Submission) -> dict[str, Any]:
    """Entry number and remarks. Raises PolicyRejected, or ServiceUnavailable when there is no controller."""
    return MixingClient(run_dir, ANSWER_TIMEOUT_S).submit(submission.mapping(), submission.request_id)
