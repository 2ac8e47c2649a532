"""The dashboard as a web application: one static page, JSON for its panels, two guarded verbs."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from mixwright.data_mixing.answers import one_line
from mixwright.data_mixing.errors import ConfigError, MixingError, ServiceUnavailable
from mixwright.data_mixing.plain_data import parse_json
from mixwright.launch.dashboard import compare, submission
from mixwright.launch.dashboard.commit_detail import commit_detail, entry_detail
from mixwright.launch.dashboard.guard import Guard, Refused, check_writer
from mixwright.launch.dashboard.inspector import Inspector
from mixwright.launch.dashboard.journal_view import LANES
from mixwright.launch.dashboard.panels import PANELS, events
from mixwright.launch.dashboard.run_view import RunView, encode, tag_of

STATIC = Path(__file__).parent / "static"
MEDIA_TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8",
               ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}  # fmt: skip
logger = logging.getLogger(__name__)

FOLLOW_INTERVAL_S = 0.5
NUM_THREADS = 4
"""That answer requests. Panels of a run are built one at a time; each thread keeps memory for the largest of them."""
COUNT_EVERY = 50
MAX_EVENTS_PER_PAGE = 200

Tag = Annotated[str | None, Header(alias="if-none-match")]


def create_app(run_dirs: Sequence[Path], *, host: str = "127.0.0.1", token: str | None = None) -> FastAPI:
    """An application that shows these runs. Submitting is possible with `token` alone; None switches it off."""
    views = [RunView(run_dir) for run_dir in run_dirs]
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=_following(views))
    app.state.views = views
    _add_errors(app)
    _add_static(app)
    _add_panels(app, views, token is not None)
    _add_inspector(app, views)
    _add_submission(app, views, token)
    app.add_middleware(Guard, host=host)
    return app


def _following(views: Sequence[RunView]) -> Callable[[FastAPI], Any]:
    """The runs' files are followed by one thread for as long as the application runs; few others answer."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        current_default_thread_limiter().total_tokens = NUM_THREADS
        stopping = threading.Event()
        thread = threading.Thread(target=follow, args=(views, stopping), name="follow", daemon=True)
        thread.start()
        yield
        stopping.set()
        await run_in_threadpool(thread.join)

    return lifespan


def follow(views: Sequence[RunView], stopping: threading.Event) -> None:
    """Read what is new in every run, all of it when it is much, until told to stop."""
    turn = 0
    while not stopping.is_set():
        found = [_advance(view) for view in views]
        if turn % COUNT_EVERY == 0:
            for view in views:
                view.count_left()
        turn += 1
        if not any(found):
            stopping.wait(FOLLOW_INTERVAL_S)


def _advance(view: RunView) -> bool:
    """Read on; a run that cannot be read says why on its page and stops no other."""
    if view.has_given_up:
        return False
    try:
        return view.advance()
    except Exception as error:  # whatever it is, people should see it where they look
        logger.exception("%s cannot be followed", view.run_dir)
        view.give_up(one_line(error))
        return False


def _add_errors(app: FastAPI) -> None:
    """Every error is JSON with one line."""

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return _json({"error": error.message}, error.status)

    async def mixing(_: Request, error: Exception) -> Response:
        return _json({"error": str(error)}, 503 if isinstance(error, ServiceUnavailable) else 400)

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        return _json({"error": f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}"}, 400)

    async def unknown(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _json({"error": error.detail}, error.status_code)

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(MixingError, mixing)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, unknown)


def _add_static(app: FastAPI) -> None:
    """The page's files, read once; a name is looked up among them and is never a path."""
    files = {path.name: path.read_bytes() for path in sorted(STATIC.iterdir()) if path.suffix in MEDIA_TYPES}
    tags = {name: tag_of((content,)) for name, content in files.items()}

    def file(name: str, tag: str | None) -> Response:
        if name not in files:
            raise HTTPException(404, "there is no such file")
        return _tagged(files[name], tags[name], tag, MEDIA_TYPES[Path(name).suffix])

    @app.get("/")
    def page(if_none_match: Tag = None) -> Response:
        return file("index.html", if_none_match)

    @app.get("/static/{name}")
    def static(name: str, if_none_match: Tag = None) -> Response:
        return file(name, if_none_match)


def _add_panels(app: FastAPI, views: Sequence[RunView], may_submit: bool) -> None:
    @app.get("/api/poll")
    def poll(if_none_match: Tag = None) -> Response:
        """The one request that a page repeats: a tag for each panel of each run, and nothing else."""
        runs = [{name: tag_of(version) for name, version in view.versions().items()} for view in views]
        names = [
            {"name": view.name, "left": view.num_left, "panels": run} for view, run in zip(views, runs, strict=True)
        ]
        tree = {"runs": names, "submit": may_submit}
        return _tagged(encode(tree), tag_of((str(tree),)), if_none_match)

    @app.get("/api/runs/{run}/panels/{name}")
    def panel(run: int, name: str, if_none_match: Tag = None) -> Response:
        if name not in PANELS:
            raise HTTPException(404, f"there is no panel {name[:40]!r}")
        tag, body = _find(views, run).panel(name, PANELS[name])
        return _tagged(body, tag, if_none_match)

    @app.get("/api/runs/{run}/events")
    def page_of_events(
        run: int, before: int | None = None, lanes: str = ",".join(LANES), count: int = MAX_EVENTS_PER_PAGE
    ) -> Response:
        return _json(events(_find(views, run), before, lanes.split(","), min(count, MAX_EVENTS_PER_PAGE)))

    @app.get("/api/runs/{run}/commits/{lsn}")
    def commit(run: int, lsn: int) -> Response:
        return _json(commit_detail(_find(views, run), lsn))

    @app.get("/api/runs/{run}/entries/{lsn}")
    def entry(run: int, lsn: int) -> Response:
        return _json(entry_detail(_find(views, run), lsn))

    @app.get("/api/compare")
    def comparison() -> Response:
        return _json(compare.compare(views))


def _add_inspector(app: FastAPI, views: Sequence[RunView]) -> None:
    inspectors = [Inspector(view) for view in views]

    @app.get("/api/runs/{run}/rows")
    def rows(
        run: int,
        step: int,
        rank: Annotated[str, Query(max_length=40)] = "0/1",
        first: int = 0,
        characters: int = 400,
    ) -> Response:
        _find(views, run)
        return _json(inspectors[run].rows(step, rank, first, characters))

    @app.get("/api/runs/{run}/uses")
    def uses(run: int, row: Annotated[str, Query(max_length=200)]) -> Response:
        _find(views, run)
        return _json(inspectors[run].uses(row))


def _add_submission(app: FastAPI, views: Sequence[RunView], token: str | None) -> None:
    async def read(request: Request) -> submission.Submission:
        check_writer(request.scope, token)
        body = await request.body()
        try:
            tree = parse_json(body, strict=True)
        except ValueError as error:
            raise ConfigError(f"request: not valid JSON: {one_line(error)}") from None
        return submission.read_submission(tree)

    @app.post("/api/runs/{run}/preview")
    async def preview(run: int, request: Request) -> Response:
        asked = await read(request)
        return _json(await run_in_threadpool(submission.preview, _find(views, run), asked))

    @app.post("/api/runs/{run}/submit")
    async def submit(run: int, request: Request) -> Response:
        asked = await read(request)
        return _json(await run_in_threadpool(submission.submit, _find(views, run).run_dir, asked))


def _find(views: Sequence[RunView], run: int) -> RunView:
    if not 0 <= run < len(views):
        raise HTTPException(404, f"there is no run {run}; the dashboard shows runs 0 to {len(views) - 1}")
    return views[run]


def _json(tree: Any, status: int = 200) -> Response:
    return Response(encode(tree), status, {"cache-control": "no-store"}, "application/json")


def _tagged(body: bytes, tag: str, known: str | None, media_type: str = "application/json") -> Response:
    """The body, or 304 when the page has it already."""
    headers = {"etag": tag, "cache-control": "no-cache"}
    return Response(status_code=304, headers=headers) if tag == known else Response(body, 200, headers, media_type)
