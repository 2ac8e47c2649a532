"""The mixing service of a run as other processes see it: whether it is there, how to start it. Needs no Ray.

Ray lives in processes of its own. A Ray driver is ended by Ray's client 60 s after the cluster's head is gone, aborted
when a token is missing, and kept waiting for 40 s by a frozen head; neither a trainer nor a command may suffer that.

    service.json   what the service's host process says about itself (`ServiceRecord`)
    service.lock   held by the host for as long as it lives, however it dies
    service.watch  the trainer on whose behalf the host runs; it ends when that process is gone (`ServiceProcess`)
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mixwright.data_mixing.answers import one_line
from mixwright.data_mixing.config_file import StrictModel, validate
from mixwright.data_mixing.errors import ConfigError, ServiceUnavailable
from mixwright.data_mixing.plain_data import parse_json

RECORD, LOCK, WATCH, LOG = "service.json", "service.lock", "service.watch", "logs/service.log"
HOST_MODULE = "mixwright.launch.mixing_host"
STOP_TIMEOUT_S = 20.0
LOCK_RETRY_S = 1.0
POLL_INTERVAL_S = 0.1
LOCAL_HOST = "127.0.0.1"
MAX_PORT = 65535
TOKEN_REMEDY = (  # nosec B105  # words about a token
    "put the cluster's token (`ray get-auth-token` on its head node) into ~/.ray/auth_token, or set "
    "RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
)

State = Literal["starting", "ready", "failed", "stopped"]


class ServiceRecord(StrictModel):
    """What service.json holds. `address`, `actor` and `namespace` find the controller once `state` is `ready`.

    `private`: the host started a Ray of its own, which only this machine and user can reach; its files are in
    `ray_folder`, its token in `token_path`. `watched`: it ends with the trainer that it was started for. `metrics`:
    where its Prometheus endpoint answers, "" without one.
    """

    state: State
    run: str
    host: str
    pid: int
    private: bool
    watched: bool
    address: str = ""
    namespace: str = ""
    actor: str = ""
    token_path: Path | None = None
    ray_folder: Path | None = None
    metrics: str = ""
    message: str = ""


@dataclass(frozen=True)
class ServiceStatus:
    """How far the service is; `message` is one line for people."""

    state: State
    message: str


def read_record(run_dir: Path) -> ServiceRecord | None:
    """What the newest host of the run wrote; None when there was none. Raises ServiceUnavailable when unreadable."""
    path = run_dir / RECORD
    try:
        tree = parse_json(path.read_text(encoding="utf-8"))
        return validate(ServiceRecord, tree, str(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ConfigError) as error:
        raise ServiceUnavailable(f"{path}: cannot be read: {error}") from None


def write_record(run_dir: Path, record: ServiceRecord) -> None:
    """Replace service.json; readers see the old one or the new one, whole."""
    _replace(run_dir / RECORD, record.model_dump_json(indent=1))


@contextlib.contextmanager
def host_lock(run_dir: Path) -> Iterator[bool]:
    """Hold the run's service lock; yields False when another host holds it. The kernel releases it at any death."""
    with (run_dir / LOCK).open("a+") as file:
        held = False
        # Readers hold the lock for an instant to see whether it is free.
        deadline = time.monotonic() + LOCK_RETRY_S
        while not held:
            held = _try_lock(file.fileno(), fcntl.LOCK_EX)
            if held or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        yield held


def has_host(run_dir: Path) -> bool:
    """Whether a host process of the run is alive."""
    try:
        with (run_dir / LOCK).open() as file:
            return not _try_lock(file.fileno(), fcntl.LOCK_SH)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ServiceUnavailable(f"{run_dir / LOCK}: cannot be read: {error.strerror}") from None


def service_status(run_dir: Path) -> ServiceStatus:
    """State of the run's service, from its files."""
    record = read_record(run_dir)
    hint = f"start it with `mixwright mix up --run {run_dir}`"
    if record is None:
        return ServiceStatus("stopped", f"run {run_dir.name!r} has no mixing service; {hint}")
    if has_host(run_dir):
        return ServiceStatus(record.state, _describe(record, run_dir))
    if record.state in ("failed", "stopped"):
        return ServiceStatus(record.state, f"{_describe(record, run_dir)}; {hint}")
    return ServiceStatus("failed", f"the mixing service of run {record.run!r} was killed; {hint}")


def _describe(record: ServiceRecord, run_dir: Path) -> str:
    match record.state:
        case "ready":
            return f"mixing service at {record.address}: `mixwright mix submit POLICY.yaml --run {run_dir}`"
        case "starting":
            return f"the mixing service of run {record.run!r} is starting"
        case "failed":
            return f"the mixing service of run {record.run!r} failed: {record.message} (see {run_dir / LOG})"
        case "stopped":
            return f"the mixing service of run {record.run!r} has ended" + (
                f": {record.message}" * bool(record.message)
            )


class ServiceProcess:
    """The run's service as its trainer, or `mix up`, holds it: started without waiting, polled, stopped.

    A service that another process started is adopted; `stop` ends it only if it runs on behalf of a trainer.
    """

    def __init__(self, run_dir: Path, command: list[str], is_watched: bool) -> None:
        self.run_dir = run_dir
        self._command, self._is_watched = command, is_watched
        self._process: subprocess.Popen[bytes] | None = None
        self.failure = ""

    def poll(self) -> ServiceStatus:
        """State now; never raises. Starts the host when there is none and this object has not started one before."""
        try:
            return self._state()
        except ServiceUnavailable as error:
            return ServiceStatus("failed", str(error))

    def _state(self) -> ServiceStatus:
        if self._process is None and not self.failure:
            if has_host(self.run_dir):
                return service_status(self.run_dir)
            self._spawn()
        if self._process is None:
            return ServiceStatus("failed", self.failure)
        is_running = self._process.poll() is None
        record = read_record(self.run_dir)
        if record is not None and record.pid == self._process.pid:
            return ServiceStatus(record.state, _describe(record, self.run_dir)) if is_running else self._ended(record)
        if is_running:
            return ServiceStatus("starting", f"the mixing service of run {self.run_dir.name!r} is starting")
        # Another host may have been faster to take the lock.
        return service_status(self.run_dir) if has_host(self.run_dir) else self._ended(None)

    def wait(self, timeout_s: float) -> ServiceStatus:
        """State once the service is ready or has failed, or `starting` after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while (status := self.poll()).state == "starting" and time.monotonic() < deadline:
            time.sleep(POLL_INTERVAL_S)
        if status.state == "starting":
            return ServiceStatus("starting", f"{status.message}, not ready after {timeout_s:g} s")
        return status

    def stop(self) -> None:
        """End the service and its own Ray, waiting up to STOP_TIMEOUT_S; one that was started by hand stays."""
        if self._process is not None:
            _end(self._process)
        elif self._is_watched:
            # An unreadable record leaves nobody to end; a watched host ends by itself when the trainer is gone.
            with contextlib.suppress(ServiceUnavailable):
                record = read_record(self.run_dir)
                if record is not None and record.watched:
                    stop_service(self.run_dir)

    def _spawn(self) -> None:
        log_path = self.run_dir / LOG
        try:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            with log_path.open("ab") as log:
                # A session of its own: Ctrl-C in the trainer's terminal is not for the service.
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
        except OSError as error:
            self.failure = f"the mixing service of run {self.run_dir.name!r} cannot be started: {error}"

    def _ended(self, record: ServiceRecord | None) -> ServiceStatus:
        """Why the host that was started here is gone: it says so itself, or it was killed."""
        if record is not None and record.state in ("failed", "stopped"):
            return ServiceStatus(record.state, _describe(record, self.run_dir))
        code = self._process.returncode if self._process is not None else None
        return ServiceStatus(
            "failed",
            f"the mixing service of run {self.run_dir.name!r} ended with code {code}: {_last_line(self.run_dir / LOG)}",
        )


def start_service(
    run_dir: Path, *, address: str | None = None, watch_pid: int | None = -1, metrics: str | None = None
) -> ServiceProcess:
    """Start the run's mixing service, or adopt the one that is there. Returns at once.

    `address` is a Ray cluster (None: RAY_ADDRESS, else a private local Ray). The service ends when process `watch_pid`
    is gone (default: the caller; None: it runs until `mix down` or the end of the run). `metrics`: `[HOST:]PORT` of a
    Prometheus endpoint (None: there is none).
    """
    command = [sys.executable, "-m", HOST_MODULE, "--run", str(run_dir)]
    if address is not None:
        command += ["--address", address]
    if watch_pid is not None:
        command.append("--watch")
    if metrics is not None:
        command += ["--metrics", metrics]
    service = ServiceProcess(run_dir, command, watch_pid is not None)
    try:
        if watch_pid is not None:
            _replace(run_dir / WATCH, json.dumps(_identity(os.getpid() if watch_pid == -1 else watch_pid)))
        service.poll()
    except ServiceUnavailable as error:
        service.failure = str(error)
    return service


def check_listening(address: str, timeout_s: float) -> None:
    """Raise ServiceUnavailable unless something listens at `address`."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise ServiceUnavailable(f"Ray address {address!r}: expected HOST:PORT, e.g. 10.0.0.5:6379, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
    except (OSError, OverflowError) as error:
        raise ServiceUnavailable(f"no Ray at {address}: {one_line(error)}") from None


def listen_address(text: str) -> tuple[str, int]:
    """`9464` or `0.0.0.0:9464` as (host, port); without a host only this machine is answered. Raises ValueError."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > MAX_PORT:
        raise ValueError(f"expected [HOST:]PORT with a port from 0 to {MAX_PORT}, e.g. 9464, found {text!r}")
    return host.strip("[]") or LOCAL_HOST, int(port)


def is_watched_alive(run_dir: Path) -> bool:
    """Whether the process that the service runs for is alive: the same one, not another with its number."""
    try:
        wanted = parse_json((run_dir / WATCH).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(wanted, dict) and isinstance(wanted.get("pid"), int) and _identity(wanted["pid"]) == wanted


def wait_for_end(run_dir: Path, timeout_s: float) -> None:
    """Wait for a host that is ending already to be gone, up to `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while has_host(run_dir) and time.monotonic() < deadline:
        record = read_record(run_dir)
        if record is not None and record.state in ("starting", "ready"):
            return
        time.sleep(POLL_INTERVAL_S)


def stop_service(run_dir: Path, timeout_s: float = STOP_TIMEOUT_S) -> bool:
    """Ask the run's host on this machine to end, and make it end. False when there is none here."""
    record = read_record(run_dir)
    if record is None or not has_host(run_dir) or record.host != socket.gethostname():
        return False
    deadline = time.monotonic() + timeout_s
    with contextlib.suppress(ProcessLookupError):
        os.kill(record.pid, signal.SIGTERM)
        while has_host(run_dir) and time.monotonic() < deadline:
            time.sleep(POLL_INTERVAL_S)
        if has_host(run_dir):
            os.kill(record.pid, signal.SIGKILL)
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _identity(pid: int) -> dict[str, int | str]:
    """A process by its number and its start time (Linux), which together are not given out twice."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return {"pid": pid, "started": "", "alive": int(_exists(pid))}
    # The command in parentheses may hold spaces; the start time is field 22 of the line, a zombie is dead.
    state, *fields = stat.rpartition(")")[2].split()
    return {"pid": pid, "started": fields[18], "alive": int(state != "Z")}


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # a number that no process can have comes from a damaged file
        return False
    except PermissionError:
        return True
    return True


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # Lustre without -o flock, some FUSE
        raise ServiceUnavailable(
            f"the run folder's file system has no file locks ({error.strerror}), by which a service is found: mount it "
            "with flock, or train without a service (mixing.service: none)"
        ) from None
    return True


def _replace(path: Path, text: str) -> None:
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}"
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ServiceUnavailable(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return "no log"
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "nothing in its log")
