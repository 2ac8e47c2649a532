"""Two network namespaces with a cable between them and a Ray node in each: a network that can be cut. Needs root."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.pretrain.jobs import BIN

PORT = 6380
OBJECT_STORE_BYTES = 80 << 20
CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Side:
    """A namespace and the end of the cable in it; `peer` is the address at the other end."""

    name: str
    address: str
    peer: str

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """What this thread starts meanwhile, processes and threads, runs on this side."""
        with Path("/proc/thread-self/ns/net").open() as home, Path("/run/netns", self.name).open() as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(home.fileno())

    def connect(self) -> None:
        """Bring this end of the cable up. Ray finds its own address by asking for the way to far away."""
        _ip("-n", self.name, "link", "set", self.name, "up")
        _ip("-n", self.name, "route", "add", "default", "via", self.peer)

    def cut(self) -> None:
        _ip("-n", self.name, "link", "set", self.name, "down")

    def end_processes(self) -> None:
        """kill -9 of everything on this side."""
        for pid in map(int, _ip("netns", "pids", self.name).split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Network:
    """The trainer's side and the side of Ray's head; `environment` holds the token of the cluster."""

    trainer: Side
    head: Side
    environment: dict[str, str]
    folder: Path

    @property
    def address(self) -> str:
        return f"{self.head.address}:{PORT}"

    def is_whole(self) -> bool:
        """Whether the trainer's side reaches Ray's head."""
        with self.trainer.entered():
            try:
                socket.create_connection((self.head.address, PORT), timeout=3).close()
            except OSError:
                return False
            return True

    def start_head(self) -> None:
        here = [f"--node-ip-address={self.head.address}", f"--temp-dir={self.folder}", "--include-dashboard=false"]
        self._start_ray(self.head, ["--head", f"--port={PORT}", *here])

    def start_node(self) -> None:
        """A Ray node on the trainer's side, as whoever runs the cluster starts one."""
        self._start_ray(self.trainer, [f"--address={self.address}", f"--node-ip-address={self.trainer.address}"])

    def _start_ray(self, side: Side, arguments: Sequence[str]) -> None:
        sizes = ["--num-cpus=1", f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats"]
        with side.entered():
            command = [str(BIN / "ray"), "start", *arguments, *sizes]
            done = subprocess.run(
                command, env=os.environ | self.environment, capture_output=True, text=True, timeout=120, check=False
            )
        assert done.returncode == 0, done.stdout + done.stderr


@contextlib.contextmanager
def two_namespaces(folder: Path) -> Iterator[Network]:
    """Both sides connected, with their Ray nodes. Skips the drill where namespaces are not permitted."""
    names = [f"mw{os.getpid()}{end}" for end in "ab"]
    addresses = ["10.77.0.1", "10.77.0.2"]
    sides = [Side(name, *pair) for name, pair in zip(names, [addresses, addresses[::-1]], strict=True)]
    token_path, ray_folder = folder / "cluster-token", Path(tempfile.mkdtemp(prefix="mw-", dir="/tmp"))
    token_path.write_text(secrets.token_hex(32))
    network = Network(*sides, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_path)}, ray_folder)
    try:
        _connect(sides)
        network.start_head()
        network.start_node()
        assert network.is_whole()
        yield network
    finally:
        for side in sides:
            with contextlib.suppress(subprocess.CalledProcessError):
                side.end_processes()
                _ip("netns", "del", side.name)
        shutil.rmtree(ray_folder, ignore_errors=True)


def _connect(sides: Sequence[Side]) -> None:
    try:
        for side in sides:
            _ip("netns", "add", side.name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', None) or error}")
    first, second = sides
    _ip("link", "add", first.name, "netns", first.name, "type", "veth", "peer", second.name, "netns", second.name)
    for side in sides:
        _ip("-n", side.name, "link", "set", "lo", "up")
        _ip("-n", side.name, "addr", "add", f"{side.address}/24", "dev", side.name)
        side.connect()


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


def _enter(descriptor: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.setns(descriptor, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
