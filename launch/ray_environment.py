"""The environment that Ray needs in a process, to be applied before Ray is imported.

A private Ray is reachable by one user on one machine: its servers listen on 127.0.0.1 only, and take only requests
with a token that is in a file of mode 0600. A cluster that others started is used with the token that they gave us.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from mixwright.data_mixing.errors import ServiceUnavailable
from mixwright.data_mixing.service import TOKEN_REMEDY

Settings = dict[str, str | None]
"""Environment variables to set, or to remove (None)."""


def private_ray(token_path: Path) -> Settings:
    """Settings of a process that starts, or uses, a private Ray with this token."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_AUTH_TOKEN": None,  # nosec B105  # says that there is none
        "RAY_ADDRESS": None,
        # Off, this makes 127.0.0.1 the node's address, so that all of Ray's servers bind to it and to nothing else.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Ray kills its largest worker when the machine's memory runs short. The memory is the trainer's, the victim
        # would be the controller.
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def attached_ray(environment: Mapping[str, str], token_path: Path | None = None) -> Settings:
    """Settings of a process that uses a cluster which others started, given its environment.

    `token_path` is where the service's host found the token. Ray itself looks for a token only when told to, and
    aborts the process when it then finds none, so both are settled here. Raises ServiceUnavailable.
    """
    mode = environment.get("RAY_AUTH_MODE", "").lower()
    if mode and mode != "token":
        return {}
    found = token_file(environment) or token_path
    if found is not None and not _is_readable(found):
        raise ServiceUnavailable(f"the Ray token file {found} cannot be read")
    if environment.get("RAY_AUTH_TOKEN") or found is not None:
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(found) if found else None}
    if mode == "token":
        raise ServiceUnavailable(f"RAY_AUTH_MODE=token, but there is no token: {TOKEN_REMEDY}")
    return {}


def token_file(environment: Mapping[str, str]) -> Path | None:
    """The file that Ray would read its token from; None when there is none."""
    if environment.get("RAY_AUTH_TOKEN_PATH"):
        return Path(environment["RAY_AUTH_TOKEN_PATH"])
    default = Path.home() / ".ray" / "auth_token"
    return default if default.is_file() else None


def apply(settings: Settings) -> None:
    """Change this process's environment; its children inherit it."""
    for name, value in settings.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _is_readable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.R_OK)
