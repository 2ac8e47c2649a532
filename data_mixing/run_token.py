"""The run's token: whoever may read `service.token` in the run folder may change what the run reads.

The service's host draws it once per run. The controller is given its SHA-256 only, because what an actor is created
with can be listed by everybody in a Ray cluster; a client sends the token itself with each verb that changes something.
Verbs that only read need none.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from mixwright.data_mixing.errors import AccessRefused, ServiceUnavailable

logger = logging.getLogger(__name__)

TOKEN_FILE = "service.token"  # nosec B105  # the name of a file
TOKEN_VARIABLE = "MIXWRIGHT_RUN_TOKEN"  # nosec B105  # the name of a variable
"""For a machine, or a user, that cannot read the file."""
GUARDED_VERBS = frozenset({"submit", "cancel", "pause", "roll_back", "end"})
_NUM_BYTES = 32


def create_token(run_dir: Path) -> str:
    """The run's token, drawn now unless it has one. To be called by the holder of the run's service lock.

    Raises ServiceUnavailable when the file cannot be written, or is there and holds no token.
    """
    path = run_dir / TOKEN_FILE
    try:
        if not path.exists():
            _write(path, secrets.token_urlsafe(_NUM_BYTES))
        elif path.stat().st_mode & 0o077:
            logger.warning("%s: others than its owner could read it; it was for everybody until now", path)
            path.chmod(0o600)
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not ASCII"
        raise ServiceUnavailable(f"{path}: the run's token cannot be kept there: {reason}") from None
    if not token:
        raise ServiceUnavailable(f"{path}: is empty; remove it, and a new token is drawn")
    return token


def find_token(run_dir: Path, environment: Mapping[str, str] = os.environ) -> str:
    """The token to send: of MIXWRIGHT_RUN_TOKEN, else of the file; "" when this user has neither."""
    given = environment.get(TOKEN_VARIABLE, "").strip()
    if given:
        return given
    try:
        return (run_dir / TOKEN_FILE).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def token_digest(token: str) -> str:
    """What the controller knows of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def check_token(verb: str, token: object, digest: str, run_dir: Path) -> None:
    """Raise AccessRefused unless `token` is the one of `digest`. Takes the same time however wrong it is."""
    given = token if isinstance(token, str) else ""
    # A lone surrogate is no text that a token could be made of; it must not break the comparison.
    found = hashlib.sha256(given.encode("utf-8", "surrogatepass")).hexdigest()
    if not secrets.compare_digest(found, digest):
        what = "another token was sent" if given else "none was sent"
        raise AccessRefused(
            f"{verb}: needs the run's token, and {what}; expected the one in {run_dir / TOKEN_FILE}, "
            f"or the same in {TOKEN_VARIABLE}"
        )


def _write(path: Path, token: str) -> None:
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(token + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
