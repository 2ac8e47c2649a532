"""`mixwright dashboard`: runs in a browser."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixwright.data_mixing.errors import ConfigError
from mixwright.launch.dashboard.memory import give_memory_back
from mixwright.launch.json_output import print_json
from mixwright.launch.mix_options import AsJson

# Commands import what they need when they run: `mixwright --help` should not wait for fastapi.
if TYPE_CHECKING:
    import uvicorn

DEFAULT_PORT = 8642
LOOPBACK = ("127.0.0.1", "localhost", "::1")

RunDirs = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[RUN_DIR]...", help="runs to show (default: the only live one in ./runs)"),
]


def dashboard(
    runs: RunDirs = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = DEFAULT_PORT,
    host: Annotated[str, typer.Option(help="address to listen on; anyone who reaches it can read the runs")] = LOOPBACK[
        0
    ],
    allow_submit: Annotated[
        bool, typer.Option("--allow-submit", help="policies may be submitted from the page, with a token printed here")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show runs in a browser, live or afterwards, from their journals and metrics alone. Several are compared."""
    give_memory_back()
    run_dirs = _run_dirs(runs or [])
    try:
        import uvicorn

        from mixwright.launch.dashboard.app import create_app
        from mixwright.launch.dashboard.guard import new_token
    except ModuleNotFoundError as error:
        raise ConfigError(f"the dashboard needs {error.name}: pip install 'mixwright[dashboard]'") from None
    token = new_token() if allow_submit else None
    listener = _listen(host, port)
    app = create_app(run_dirs, host=host, token=token)
    _announce(run_dirs, host, listener.getsockname()[1], token, as_json)
    _serve(uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=60)), listener)


def _serve(server: uvicorn.Server, listener: socket.socket) -> None:
    """Answer requests until Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


def _run_dirs(named: list[Path]) -> list[Path]:
    """The folders to show; raises ConfigError for one that holds no run."""
    from mixwright.launch.dashboard.run_view import is_run
    from mixwright.launch.runs import find_run

    if not named:
        return [find_run(None)]
    # A preference run keeps no journal; every other folder without one is explained by `find_run`.
    return [folder if is_run(folder) else find_run(folder) for folder in named]


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens; raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"--port: {host}:{port} cannot be listened on: {error.strerror}; choose another (0: any)"
        ) from None


def _announce(run_dirs: list[Path], host: str, port: int, token: str | None, as_json: bool) -> None:
    shown_host = f"[{host}]" if ":" in host else host
    url = f"http://{shown_host}:{port}/"
    if as_json:
        print_json({"url": url, "runs": run_dirs, "token": token})
        return
    typer.echo(f"{', '.join(map(str, run_dirs))}: {url}  (Ctrl-C ends it)")
    if host not in LOOPBACK:
        typer.echo(
            f"anyone who can reach {host}:{port} can read these runs and their text; nothing is encrypted", err=True
        )
    if token is not None:
        typer.echo(f"token for submitting policies, until this ends: {token}")
