"""Who may ask the dashboard for what: host names, origins, sizes, the token, and what a page may load.

The server is meant for one person on their own machine. A web page that this person opens elsewhere must neither read
from it (host names: another name may be made to point here) nor write to it (origin, token).
"""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from mixwright.launch.dashboard.run_view import encode

MAX_BODY_BYTES = 256 << 10
"""Of a request: a policy document is a few kilobytes."""

TOKEN_BYTES = 24

CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
}

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class Refused(Exception):
    """A request that is not answered: HTTP status and one line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class Guard:
    """ASGI middleware: checks host name and size of every request, adds the headers that fence the page in."""

    def __init__(self, app: App, host: str) -> None:
        self._app, self._names = app, {"localhost", host, socket.gethostname(), socket.getfqdn()}

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        fenced = _fenced(send)
        try:
            self._check_host(header(scope, b"host"))
            await self._app(scope, _limited(scope, receive), fenced)
        except Refused as refused:
            await refuse(refused, fenced)

    def _check_host(self, host: str) -> None:
        """A name that is not this machine's may be an attacker's that points here; an address cannot be made to."""
        name = _host_name(host)
        if name not in self._names and not _is_address(name):
            raise Refused(421, f"Host: {name[:80]!r} is not a name of this machine")


def check_writer(scope: MutableMapping[str, Any], token: str | None) -> None:
    """Raise Refused unless the request comes from our own page, or from no page, with the token of this start."""
    if token is None:
        raise Refused(403, "submitting is off; start the dashboard with --allow-submit")
    origin, site = header(scope, b"origin"), header(scope, b"sec-fetch-site")
    if origin and urlsplit(origin).netloc != header(scope, b"host"):
        raise Refused(403, f"Origin: a page of {origin[:80]!r} may not submit here")
    if site and site not in ("same-origin", "none"):
        raise Refused(403, f"Sec-Fetch-Site: a {site[:20]} page may not submit here")
    if header(scope, b"content-type").partition(";")[0].strip() != "application/json":
        raise Refused(415, "Content-Type: expected application/json")
    scheme, _, given = header(scope, b"authorization").partition(" ")
    if scheme.lower() != "bearer" or not secrets.compare_digest(given.strip().encode(), token.encode()):
        raise Refused(
            401, "Authorization: expected `Bearer TOKEN` with the token that the dashboard printed at its start"
        )


def new_token() -> str:
    """What a submission must carry; drawn at every start."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def header(scope: MutableMapping[str, Any], name: bytes) -> str:
    """The first header of this name, '' when there is none."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _limited(scope: MutableMapping[str, Any], receive: Receive) -> Receive:
    """`receive` that refuses a body of more than MAX_BODY_BYTES, announced or not."""
    announced = header(scope, b"content-length")
    if announced.isdecimal() and int(announced) > MAX_BODY_BYTES:
        raise Refused(413, f"the request has {announced} bytes, at most {MAX_BODY_BYTES} are taken")
    seen = 0

    async def receive_part() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > MAX_BODY_BYTES:
            raise Refused(413, f"the request has more than {MAX_BODY_BYTES} bytes")
        return message

    return receive_part


def _fenced(send: Send) -> Send:
    added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def send_fenced(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        await send(message)

    return send_fenced


async def refuse(refused: Refused, send: Send) -> None:
    """Answer with status and reason."""
    body = encode({"error": refused.message})
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
