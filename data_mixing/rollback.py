"""Going back to an earlier policy: a new document that asks for what the old one asked for."""

from __future__ import annotations

from typing import Any

from mixwright.data_mixing.errors import PolicyRejected, nearest
from mixwright.data_mixing.history import RunHistory

_NOT_CARRIED_OVER = ("at_step", "shadow", "why", "author")


def rollback_document(history: RunHistory, policy_lsn: int) -> dict[str, Any]:
    """The document that policy `policy_lsn` was submitted with, or the mixture that a decision chose, as a `static`.

    An online policy begins anew from its initial mixture. Raises PolicyRejected.
    """
    policy = history.policies.get(policy_lsn)
    if policy is None:
        raise PolicyRejected(
            f"policy {policy_lsn} does not exist{nearest(str(policy_lsn), map(str, history.policies))}"
        )
    if policy.root is None:
        return {key: value for key, value in policy.document.items() if key not in _NOT_CARRIED_OVER}
    proportions = policy.program[-1].proportions
    names = [domain.name for domain in history.genesis.domains]
    return {"kind": "static", "mixture": dict(zip(names, proportions, strict=True))}
