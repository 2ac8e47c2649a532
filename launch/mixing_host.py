"""The process that a run's mixing service lives in: `python -m mixwright.launch.mixing_host --run RUN_DIR`.

Starts a private local Ray, or attaches to the cluster of `--address` or RAY_ADDRESS, creates the controller's actor and
looks after both. It ends, and its own Ray with it, when told by SIGTERM (`mix down`), when the run is over, when the
trainer that it was started for (`--watch`) is gone for a while, or when its Ray or controller is beyond repair.
Training never waits for it. Exit codes: 0 ended as told, 3 the service could not be provided.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from mixwright.data_mixing.answers import one_line
from mixwright.data_mixing.errors import MixingError, ServiceUnavailable
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.journal import read_entries
from mixwright.data_mixing.run_token import create_token, token_digest
from mixwright.data_mixing.service import (
    ServiceRecord,
    State,
    check_listening,
    host_lock,
    is_watched_alive,
    listen_address,
    read_record,
    write_record,
)
from mixwright.launch import ray_environment
from mixwright.launch.metrics_endpoint import MetricsPage, MetricsServer

logger = logging.getLogger("mixing_host")

START_TIMEOUT_S = 120.0
GRACE_S = 30.0
"""How long a service outlives its trainer, so that a trainer that is started again finds it."""
LOOP_INTERVAL_S = 1.0
PING_INTERVAL_S = 5.0
PING_TIMEOUT_S = 10.0
UNHEALTHY_S = 30.0
"""Ray restarts a killed controller within 2 s and moves one off a dead node within 15 s (spec/mixing.md 3.4)."""
SHUTDOWN_TIMEOUT_S = 10.0
NICENESS = 5
"""Ray's idle processes take about 5 % of a core; the trainer goes first."""
FOLDER_PREFIX = "mixwright-"
LONGEST_TEMPORARY_ROOT = 28
"""Characters of a folder in which Ray's socket paths still fit into the 107 bytes that the kernel allows."""


class MixingHost:
    """Starts, watches and ends the service of one run. Holds the run's service lock while it works."""

    def __init__(
        self, run_dir: Path, address: str | None, is_watched: bool, grace_s: float, metrics: tuple[str, int] | None
    ) -> None:
        self._run_dir, self._is_watched, self._grace_s = run_dir, is_watched, grace_s
        self._address = None if address in (None, "", "local") else address
        self._holder = f"controller-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._stop_requested = threading.Event()
        self._record = ServiceRecord(
            state="starting",
            run=run_dir.name,
            host=socket.gethostname(),
            pid=os.getpid(),
            private=self._address is None,
            watched=is_watched,
        )
        self._actor: Any = None
        self._metrics_address, self._metrics = metrics, MetricsPage(run_dir)

    def serve(self) -> int:
        """Provide the service until there is a reason to end; returns the exit code."""
        self._install_signals()
        self._open_metrics()
        previous = read_record(self._run_dir)
        self._write("starting")
        if previous is not None and previous.private:
            remove_ray_folder(previous.ray_folder)
        try:
            self._start()
            self._install_signals()  # ray.init has put its own in their place
            self._write("ready")
            self._metrics.is_up = True
            logger.info("ready at %s as %s", self._record.address, self._holder)
            reason = self._watch()
        except MixingError as error:
            logger.error("%s", error)
            return self._end("failed", str(error))
        except SystemExit:  # SIGTERM while ray.init had its handler in place
            reason = "it was told to end"
        logger.info("ends: %s", reason)
        return self._end("stopped", reason)

    def _open_metrics(self) -> None:
        """Answer Prometheus from now on, when asked to. The service goes on without when that cannot be."""
        if self._metrics_address is None:
            return
        try:
            server = MetricsServer(self._metrics, *self._metrics_address)
        except ServiceUnavailable as error:
            logger.error("%s", error)
            return
        self._record = self._record.model_copy(update={"metrics": server.url})
        logger.info("metrics at %s", server.url)

    def _install_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop_requested.set()

    def _start(self) -> None:
        watchdog = threading.Timer(START_TIMEOUT_S, self._give_up)
        watchdog.daemon = True
        watchdog.start()
        try:
            digest = token_digest(create_token(self._run_dir))
            address = self._start_private() if self._address is None else self._attach(self._address)
            # Imported by now, with the environment that Ray needs.
            from mixwright.data_mixing import controller

            self._actor, self._holder = controller.create_controller(
                self._record.run, self._run_dir / "journal", self._holder, digest, START_TIMEOUT_S
            )
            update = {"address": address, "actor": controller.actor_name(self._record.run)}
            self._record = self._record.model_copy(update={**update, "namespace": controller.NAMESPACE})
        finally:
            watchdog.cancel()

    def _start_private(self) -> str:
        folder = make_ray_folder()
        token_path = folder / "auth_token"
        write_token(token_path)
        self._record = self._record.model_copy(update={"ray_folder": folder, "token_path": token_path})
        self._write("starting")
        ray_environment.apply(ray_environment.private_ray(token_path))
        from mixwright.data_mixing import controller

        # Ray makes its folder writable for everybody; the one around it is ours alone.
        return controller.start_private_ray(folder / "ray")

    def _attach(self, address: str) -> str:
        ray_environment.apply(ray_environment.attached_ray(os.environ))
        token_path = ray_environment.token_file(os.environ)
        self._record = self._record.model_copy(update={"token_path": token_path})
        from mixwright.data_mixing import controller

        return controller.attach_ray(address, PING_TIMEOUT_S)

    def _give_up(self) -> None:
        """Timer thread: the start hangs in Ray. Ray's own reaper ends what this process has started."""
        self._write("failed", f"Ray did not start within {START_TIMEOUT_S:g} s")
        os._exit(3)

    def _watch(self) -> str:
        """Why the service is to end. Raises ServiceUnavailable when it can no longer be provided."""
        pinged = healthy = watched = going_on = time.monotonic()
        while not self._stop_requested.wait(LOOP_INTERVAL_S):
            now = time.monotonic()
            if not self._is_watched or is_watched_alive(self._run_dir):
                watched = now
            if now - watched > self._grace_s:
                return "its trainer is gone"
            if now - pinged < PING_INTERVAL_S:
                continue
            pinged = now
            is_over = self._ping()
            self._metrics.is_up = is_over is not None
            healthy = now if is_over is not None else healthy
            going_on = now if not is_over else going_on
            if now - going_on > self._grace_s:
                return "the run is over"
            if now - healthy > UNHEALTHY_S:
                raise ServiceUnavailable(f"the controller has not answered for {now - healthy:.0f} s")
        return "it was told to end"

    def _ping(self) -> bool | None:
        """Whether the run is over; None when the controller does not answer now. Raises when it never will."""
        from mixwright.data_mixing import controller

        if self._record.private:
            check_listening(self._record.address, PING_TIMEOUT_S)
        try:
            pong = controller.call(self._actor, "ping", {}, PING_TIMEOUT_S)
            self._metrics.append_seconds = pong.get("append_seconds")
            return bool(pong["is_over"])
        except MixingError as error:
            logger.warning("%s", error)
        newest = self._lease_holder()
        if newest and newest != self._holder:
            raise ServiceUnavailable(f"another controller, {newest}, has taken over the run")
        return None

    def _lease_holder(self) -> str:
        history = RunHistory()
        with contextlib.suppress(MixingError):
            for entry in read_entries(self._run_dir / "journal"):
                history.apply(entry)
        lease = history.leases.get("controller")
        return lease.holder if lease else ""

    def _write(self, state: State, message: str = "") -> None:
        self._record = self._record.model_copy(update={"state": state, "message": message})
        try:
            write_record(self._run_dir, self._record)
        except ServiceUnavailable as error:
            logger.error("%s", error)

    def _end(self, state: State, message: str) -> int:
        """Shut down within SHUTDOWN_TIMEOUT_S, whatever state Ray is in."""
        self._write(state, message)
        worker = threading.Thread(target=self._shut_down_ray, name="shutdown", daemon=True)
        worker.start()
        worker.join(SHUTDOWN_TIMEOUT_S)
        if state == "failed" and self._record.ray_folder is not None:
            keep_ray_logs(self._record.ray_folder, self._run_dir / "logs" / "ray")
        remove_ray_folder(self._record.ray_folder)
        return 0 if state == "stopped" else 3

    def _shut_down_ray(self) -> None:
        if "mixwright.data_mixing.controller" not in sys.modules:
            return
        from mixwright.data_mixing import controller

        try:
            controller.leave_ray(self._actor)
        except Exception as error:  # whatever Ray raises, this process ends now and its reaper cleans up
            logger.warning("Ray did not shut down in order: %s", one_line(error))


def make_ray_folder() -> Path:
    """A new folder that only this user can enter, with a path that is short enough for sockets below it."""
    root = tempfile.gettempdir()
    try:
        short = root if len(root) <= LONGEST_TEMPORARY_ROOT else "/tmp"  # nosec B108  # mkdtemp makes it ours alone
        return Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=short))
    except OSError as error:
        raise ServiceUnavailable(f"no folder for Ray can be made in {root}: {error.strerror}") from None


def write_token(path: Path) -> None:
    """A new secret in a file that only this user can read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))


def keep_ray_logs(folder: Path, target: Path) -> None:
    """Copy what Ray's processes wrote to where a user can read it."""
    with contextlib.suppress(OSError, shutil.Error):
        shutil.copytree(folder / "ray" / "session_latest" / "logs", target, dirs_exist_ok=True)
        logger.info("Ray's own logs are in %s", target)


def remove_ray_folder(folder: Path | None) -> None:
    """Remove what a private Ray has left; its processes end with their host, by themselves if need be."""
    if folder is not None and folder.name.startswith(FOLDER_PREFIX):
        shutil.rmtree(folder, ignore_errors=True)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the run's folder")
    parser.add_argument("--address", help="a Ray cluster HOST:PORT, auto, or local (default: RAY_ADDRESS, else local)")
    parser.add_argument("--watch", action="store_true", help="end when the trainer in service.watch is gone")
    parser.add_argument("--grace", type=float, default=GRACE_S, help="seconds to outlive the trainer or the run")
    parser.add_argument("--metrics", metavar="[HOST:]PORT", type=listen_address, help="answer Prometheus there")
    return parser.parse_args(arguments)


def main() -> int:
    """Serve unless another host of the run does so already."""
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    run_dir: Path = arguments.run.resolve()
    os.nice(NICENESS)
    with host_lock(run_dir) as is_ours:
        if not is_ours:
            logger.info("%s has a mixing service already", run_dir)
            return 0
        address = arguments.address or os.environ.get("RAY_ADDRESS")
        code = MixingHost(run_dir, address, arguments.watch, arguments.grace, arguments.metrics).serve()
        logging.shutdown()
        # Not through the interpreter's exit handlers: Ray's would wait for a broken cluster.
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
