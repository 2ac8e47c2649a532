"""The Ray Jobs API of a cluster over HTTP, with time limits, our token, and errors of one line.

Ray's own client would do, but it imports Ray (seconds, for every `list`), waits without limit for a head that is
frozen, and prefers RAY_ADDRESS to the address that it is given.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from mixwright.data_mixing.answers import one_line
from mixwright.data_mixing.errors import ConfigError, ServiceUnavailable
from mixwright.data_mixing.plain_data import parse_json
from mixwright.data_mixing.service import TOKEN_REMEDY
from mixwright.launch import ray_environment

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
TIMEOUT_S = 60.0
"""Of one request: a submission waits for the head's agent."""
FIND_TIMEOUT_S = 60.0

Status = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
LIVE = ("PENDING", "RUNNING")


class ClusterUnreachable(ServiceUnavailable):
    """The head does not answer now; it may come back."""


@dataclass(frozen=True)
class Job:
    """One submission as the cluster tells of it. `exit_code` is the entrypoint's, once it has ended by itself."""

    submission_id: str
    status: Status
    message: str
    exit_code: int | None
    started_ms: int
    metadata: Mapping[str, str]

    @property
    def is_live(self) -> bool:
        return self.status in LIVE


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows nothing: urllib would send our token to wherever it is told to go."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _opener() -> urllib.request.OpenerDirector:
    """Speaks HTTP and HTTPS; `urlopen` would also read `file:` and `ftp:` addresses."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _NoRedirect(),
    ):
        opener.add_handler(handler)
    return opener


_OPENER = _opener()


class JobsApi:
    """Requests to a cluster. `address` is the URL of its dashboard, or what Ray calls an address (HOST:PORT, auto)."""

    def __init__(self, address: str, headers: Mapping[str, str], timeout_s: float = TIMEOUT_S) -> None:
        self._address, self._headers, self._timeout_s = address, dict(headers), timeout_s
        self._url: str | None = None

    @property
    def url(self) -> str:
        """The dashboard's; found anew after the cluster did not answer. Raises ClusterUnreachable."""
        if self._url is None:
            is_url = "://" in self._address
            self._url = (self._address if is_url else _find_dashboard(self._address)).rstrip("/")
        return self._url

    @property
    def headers(self) -> dict[str, str]:
        return dict(self._headers)

    def submit(
        self, entrypoint: str, submission_id: str, environment: Mapping[str, str], metadata: Mapping[str, str]
    ) -> None:
        """Start a job. Raises ServiceUnavailable; after ClusterUnreachable it may have been started all the same."""
        request = {
            "entrypoint": entrypoint,
            "submission_id": submission_id,
            "runtime_env": {"env_vars": dict(environment)},
            "metadata": dict(metadata),
        }
        self._ask("POST", "/api/jobs/", request)

    def job(self, submission_id: str) -> Job | None:
        """A job by its submission id; None when this head does not know it."""
        found = self._ask("GET", f"/api/jobs/{quote(submission_id)}")
        return None if found is None else _job(found)

    def jobs(self) -> list[Job]:
        """All submitted jobs that this head knows, the oldest first."""
        found = self._ask("GET", "/api/jobs/")
        if not isinstance(found, list):
            raise ServiceUnavailable(f"{self.url} is not the dashboard of a Ray cluster: it lists no jobs")
        return sorted((_job(item) for item in found if item.get("submission_id")), key=lambda job: job.started_ms)

    def stop(self, submission_id: str) -> None:
        """Ask a job to stop; nothing happens to one that has ended or is unknown."""
        self._ask("POST", f"/api/jobs/{quote(submission_id)}/stop")

    def log(self, submission_id: str) -> str:
        """All that a job has printed; empty when it is not known."""
        found = self._ask("GET", f"/api/jobs/{quote(submission_id)}/logs")
        return "" if found is None else str(found["logs"] or "")

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON that is answered; None for 404."""
        data = None if body is None else json.dumps(body).encode()
        headers = {**self._headers, "Content-Type": "application/json"}
        try:
            request = urllib.request.Request(self.url + path, data, headers, method=method)
            with _OPENER.open(request, timeout=self._timeout_s) as response:
                return parse_json(response.read())
        except urllib.error.HTTPError as error:
            return self._refused(error)
        except (OSError, http.client.HTTPException) as error:
            self._url, url = None, self._url
            raise ClusterUnreachable(f"the Ray cluster at {url} does not answer: {_reason(error)}") from None
        except ValueError as error:
            raise ServiceUnavailable(
                f"{self._address} is not the dashboard of a Ray cluster: {one_line(error)}"
            ) from None

    def _refused(self, error: urllib.error.HTTPError) -> None:
        with error:
            text = error.read().decode(errors="replace").strip()
        reason = (text.splitlines() or [error.reason])[-1]
        if error.code == 404:
            return
        if error.code in (401, 403):
            raise ServiceUnavailable(f"the Ray cluster at {self._url} refuses our token ({reason}): {TOKEN_REMEDY}")
        kind = ClusterUnreachable if error.code >= 500 else ServiceUnavailable
        raise kind(f"the Ray cluster at {self._url} answers {error.code}: {reason[:300]}")


def connect(address: str | None, environment: Mapping[str, str] = os.environ) -> JobsApi:
    """The cluster at `address`, RAY_API_SERVER_ADDRESS, RAY_ADDRESS or this machine's dashboard.

    Raises ServiceUnavailable when it is not there, or refuses our token.
    """
    named = address or environment.get("RAY_API_SERVER_ADDRESS") or environment.get("RAY_ADDRESS") or DEFAULT_ADDRESS
    if named.startswith("ray://"):
        raise ConfigError(f"{named}: Ray's client protocol is not supported; use http://HOST:8265, HOST:PORT or auto")
    api = JobsApi(named, token_headers(environment))
    api.jobs()
    return api


def token_headers(environment: Mapping[str, str]) -> dict[str, str]:
    """The header that carries the cluster's token, from where Ray would look for it. Raises ServiceUnavailable."""
    settings = ray_environment.attached_ray(environment)
    if "RAY_AUTH_MODE" not in settings:
        return {}
    path = settings["RAY_AUTH_TOKEN_PATH"]
    token = environment.get("RAY_AUTH_TOKEN") or Path(str(path)).read_text(encoding="utf-8")
    return {"Authorization": f"Bearer {token.strip()}"}


def _find_dashboard(address: str) -> str:
    command = [sys.executable, "-m", "mixwright.launch.dashboard_address", address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FIND_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ClusterUnreachable(
            f"the Ray cluster at {address} does not say within a minute where its dashboard is"
        ) from None
    if done.returncode != 0:
        raise ClusterUnreachable(done.stdout or f"no Ray dashboard is known at {address}")
    return done.stdout


def _job(tree: Mapping[str, Any]) -> Job:
    return Job(
        submission_id=tree["submission_id"],
        status=tree["status"],
        message=tree["message"] or "",
        exit_code=tree["driver_exit_code"],
        started_ms=tree["start_time"] or 0,
        metadata=tree["metadata"] or {},
    )


def _reason(error: Exception) -> str:
    """What went wrong, without the wrapping of urllib."""
    return str(getattr(error, "reason", error)) or type(error).__name__
