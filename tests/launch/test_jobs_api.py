"""Requests to the Jobs API against servers that refuse, break, freeze or are something else; logs that are cut off."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from aiohttp import web

from mixwright.data_mixing.errors import ConfigError, MixingError, ServiceUnavailable
from mixwright.launch.job_log import JobLog, progress_of
from mixwright.launch.job_manifest import JobManifest
from mixwright.launch.jobs_api import ClusterUnreachable, JobsApi, connect, token_headers
from mixwright.launch.supervise import UNREACHABLE, Limits
from mixwright.launch.supervisor import Supervisor

Handler = Callable[[web.Request], object]


@contextmanager
def server(handler: Handler) -> Iterator[str]:
    """The URL of a real server whose every request goes to `handler`."""
    loop, started, found = asyncio.new_event_loop(), threading.Event(), []

    async def start() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        found.append(runner.addresses[0][1])
        started.set()

    def serve() -> None:
        loop.run_until_complete(start())
        loop.run_forever()

    threading.Thread(target=serve, daemon=True).start()
    assert started.wait(10)
    yield f"http://127.0.0.1:{found[0]}"
    loop.call_soon_threadsafe(loop.stop)


def answering(status: int, text: str) -> Handler:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, text=text)

    return answer


@pytest.mark.parametrize(
    ("status", "text", "kind", "said"),
    [
        (401, "Unauthorized: Missing authentication token", ServiceUnavailable, "refuses our token (Unauthorized"),
        (403, "Forbidden: Invalid authentication token", ServiceUnavailable, "ray get-auth-token"),
        (500, "Traceback\n  line\nTimeoutError: no agent", ClusterUnreachable, "answers 500: TimeoutError: no agent"),
        (503, "", ClusterUnreachable, "answers 503: Service Unavailable"),
        (400, "bad", ServiceUnavailable, "answers 400: bad"),
        (404, "nothing here", ServiceUnavailable, "is not the dashboard of a Ray cluster"),
        (200, "<html>hello</html>", ServiceUnavailable, "is not the dashboard of a Ray cluster"),
        (200, "{}", ServiceUnavailable, "is not the dashboard of a Ray cluster"),
    ],
)
def test_each_refusal_is_one_line_and_says_whether_it_may_pass(
    status: int, text: str, kind: type[MixingError], said: str
) -> None:
    with server(answering(status, text)) as url, pytest.raises(kind) as refused:
        JobsApi(url, {}).jobs()
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert type(refused.value) is kind
    assert refused.value.exit_code == 3


def test_a_head_that_lists_jobs_but_takes_none_is_told_of_once(tmp_path: Path) -> None:
    async def answer(request: web.Request) -> web.Response:
        if request.method == "GET":
            return web.json_response([])
        return web.Response(status=500, text="No available agent to submit job, please try again later.")

    said: list[str] = []
    manifest = JobManifest(stage="pretrain", run="exp", run_dir=tmp_path, config={}, code="tests")
    limits = Limits(first_pause_s=0.1, unreachable_s=3.0)
    with server(answer) as url:
        assert Supervisor(JobsApi(url, {}), manifest, "python", limits, said.append).run() == UNREACHABLE
    assert "No available agent" in said[0]
    assert [line.split(" for ")[0] for line in said[1:]] == ["the cluster has taken no job"]


def test_a_frozen_head_is_given_up_after_the_time_limit() -> None:
    with socket.socket() as frozen:
        frozen.bind(("127.0.0.1", 0))
        frozen.listen()
        with pytest.raises(ClusterUnreachable, match="does not answer: timed out"):
            JobsApi(f"http://127.0.0.1:{frozen.getsockname()[1]}", {}, timeout_s=0.2).jobs()


def test_a_closed_port_and_rays_client_protocol_are_refused() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(ClusterUnreachable, match="Connection refused"):
        connect(None, {"RAY_ADDRESS": closed, "HOME": "/nowhere"})
    with pytest.raises(ConfigError, match="client protocol is not supported"):
        connect("ray://head:10001", {})


def test_requests_carry_the_token_of_rays_first_place() -> None:
    seen: list[str | None] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization"))
        return web.Response(text="[]")

    with server(answer) as url:
        connect(url, {"RAY_AUTH_TOKEN": "first", "RAY_AUTH_MODE": "token"})
        connect(url, {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "first"})
    assert seen == ["Bearer first", None]


def test_a_token_comes_from_a_file_and_never_from_nowhere(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n")
    assert token_headers({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}) == {"Authorization": "Bearer secret"}
    with pytest.raises(ServiceUnavailable, match="cannot be read"):
        token_headers({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")})


def test_a_log_that_is_cut_off_goes_on_without_a_gap_and_without_repetition() -> None:
    text = "".join(f"line {number}\n" for number in range(40)) + "unfinished"
    cuts = iter([130, 131, 260])

    async def answer(request: web.Request) -> web.StreamResponse:
        if not request.path.endswith("/tail"):
            return web.Response(text=json.dumps({"logs": text}))
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        end = next(cuts, 270)
        for start in range(0, end, 50):
            await socket.send_str(text[start : min(start + 50, end)])
        await socket.close()
        return socket

    with server(answer) as url:
        log, lines = JobLog(JobsApi(url, {}), "job", retry_s=0.01), []
        deadline = time.monotonic() + 20
        while len(lines) < 28 and time.monotonic() < deadline:
            lines += log.lines()
        rest = log.rest()
    assert lines == text[:270].splitlines()[: len(lines)]
    assert [*lines, *rest] == text.splitlines()


@pytest.mark.parametrize(
    ("line", "step"),
    [
        ("step 12/100  loss 3.1  [wiki 3.0]  2,000 tok/s  ETA 0:10  policy 2", 12),
        ("sampling: 1,024 of 20,000, about 2.0 min left", 0),
        ("reference log-probabilities (train): 38 of 38", 0),
        ("model: 28,192 parameters, 2 rank(s), ZeRO 0", None),
        ("(TrainController pid=7) step 12/100", None),
        ("a stepping stone", None),
    ],
)
def test_progress_is_read_from_the_lines_of_ranks(line: str, step: int | None) -> None:
    assert progress_of(line) == step


def test_our_token_follows_no_redirection_and_no_file_is_read(tmp_path: Path) -> None:
    seen: list[str] = []

    async def elsewhere(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization", ""))
        return web.json_response([])

    with server(elsewhere) as other:

        async def answer(request: web.Request) -> web.Response:
            return web.Response(status=302, headers={"Location": f"{other}/api/jobs/"})

        with server(answer) as url, pytest.raises(ServiceUnavailable, match="answers 302"):
            JobsApi(url, {"Authorization": "Bearer secret"}).jobs()
    assert seen == []
    (tmp_path / "api").mkdir()
    with pytest.raises(ServiceUnavailable):
        JobsApi(f"file://{tmp_path}", {}).jobs()
