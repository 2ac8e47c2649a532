"""Checks of `mixwright doctor` on the machine: Ray's token and cluster, shared memory, limits, clock."""

from __future__ import annotations

import ctypes
import resource
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mixwright.data_mixing.errors import ServiceUnavailable
from mixwright.data_mixing.service import TOKEN_REMEDY, check_listening
from mixwright.launch import ray_environment
from mixwright.launch.finding import Finding

PROBE_MODULE = "mixwright.launch.ray_probe"
PROBE_TIMEOUT_S, CONNECT_TIMEOUT_S = 15.0, 2.0
SHARED_MEMORY = Path("/dev/shm")  # nosec B108  # only looked at
LEAST_SHARED_BYTES = 256 << 20
"""A private Ray's object store takes 80 MB, DeepSpeed's all-reduce and pinned batches some more."""
FEWEST_FILES, FILES = 1024, 4096
CLOCK_MOMENT_S = 0.25
LARGEST_DRIFT_S = 0.01
_TIME_ERROR = 5
_TIMEX_BYTES = 512


def ray_token(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Ray and the token that a cluster of others would be asked with; a private Ray draws its own."""
    try:
        found = f"{version('ray')}"
    except PackageNotFoundError:
        yield Finding("ray", "fail", "is not installed", "run `make install`, or `pip install 'ray>=2.60'`")
        return
    yield Finding("ray", "ok", found)
    try:
        settings = ray_environment.attached_ray(environment)
    except ServiceUnavailable as error:
        yield Finding("ray token", "fail", str(error), TOKEN_REMEDY)
        return
    path = ray_environment.token_file(environment)
    if environment.get("RAY_AUTH_TOKEN"):
        yield Finding("ray token", "ok", "in RAY_AUTH_TOKEN")
    elif settings and path is not None:
        yield _token_mode(path)
    else:
        mode = environment.get("RAY_AUTH_MODE")
        said = f"RAY_AUTH_MODE={mode}: " if mode else ""
        yield Finding("ray token", "ok", f"{said}none is set; a private Ray makes its own, a shared cluster needs one")


def _token_mode(path: Path) -> Finding:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        found = f"{path} has mode {mode:04o}: others of this machine can read it, and run code in the cluster with it"
        return Finding("ray token", "warn", found, f"chmod 600 {path}")
    return Finding("ray token", "ok", f"{path}, mode {mode:04o}")


def ray_address(address: str, timeout_s: float = PROBE_TIMEOUT_S) -> Iterator[Finding]:
    """Whether the cluster at `address`, if any, answers and takes our token."""
    if address in ("", "local"):
        yield Finding("ray address", "ok", "none is set: runs start a private Ray on this machine")
        return
    if address == "auto":
        yield Finding("ray address", "ok", "auto: the cluster that this node is part of, found when it is needed")
        return
    try:
        check_listening(address, CONNECT_TIMEOUT_S)
    except ServiceUnavailable as error:
        yield _unreachable(str(error))
        return
    command = [sys.executable, "-m", PROBE_MODULE, address, str(CONNECT_TIMEOUT_S)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        yield _unreachable(f"the Ray cluster at {address} gives no answer within {timeout_s:g} s")
        return
    if done.returncode == 0:
        yield Finding("ray address", "ok", f"{address} answers and takes our token")
        return
    said = done.stdout.strip() or f"the attempt ended with code {done.returncode}: {done.stderr.strip()[-300:]}"
    yield _unreachable(said)


def _unreachable(found: str) -> Finding:
    remedy = "start the cluster, correct RAY_ADDRESS or --address, or leave both out for a private Ray"
    return Finding("ray address", "fail", found, remedy)


def shared_memory(folder: Path = SHARED_MEMORY) -> Iterator[Finding]:
    """Room in /dev/shm, which Ray's object store and ranks on one machine share."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        remedy = "mount a tmpfs there (in a container: --shm-size)"
        yield Finding("shared memory", "warn", f"{folder}: {error.strerror}", remedy)
        return
    found = f"{folder}: {size(usage.free)} free of {size(usage.total)}"
    if usage.free < LEAST_SHARED_BYTES:
        remedy = "free it, or make it larger (docker run --shm-size=8g; Kubernetes: an emptyDir of medium Memory)"
        yield Finding("shared memory", "warn", f"{found}: Ray falls back to disk", remedy)
    else:
        yield Finding("shared memory", "ok", found)


def open_files() -> Iterator[Finding]:
    """The limit of open files: each of Ray's processes and each mapped row file needs some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"limit {_count(soft)} (could be raised to {_count(hard)})"
    remedy = f"ulimit -n {FILES * 16 if hard < 0 else min(hard, FILES * 16)}, or LimitNOFILE= of the service"
    if 0 <= soft < FEWEST_FILES:
        yield Finding("open files", "fail", f"{found}: Ray needs {FEWEST_FILES} or more", remedy)
    elif 0 <= soft < FILES:
        yield Finding("open files", "warn", f"{found}: a store of many files or many workers may need more", remedy)
    else:
        yield Finding("open files", "ok", found)


def clock(moment_s: float = CLOCK_MOMENT_S) -> Iterator[Finding]:
    """Whether wall clock and monotonic clock go alike, and whether the kernel calls the wall clock synchronised.

    No decision depends on clocks; times in the journal and the pace shown do.
    """
    wall, monotonic = time.time(), time.monotonic()
    time.sleep(moment_s)
    drift = abs((time.time() - wall) - (time.monotonic() - monotonic))
    if drift > LARGEST_DRIFT_S:
        found = f"wall and monotonic clock went apart by {1000 * drift:.0f} ms in {moment_s:g} s"
        yield Finding("clock", "warn", found, "something sets the clock in jumps: let one time service slew it")
    else:
        yield Finding("clock", "ok", f"wall and monotonic clock agree ({1000 * drift:.2f} ms in {moment_s:g} s)")
    match is_synchronised():
        case True:
            yield Finding("time service", "ok", "the kernel's clock is synchronised")
        case False:
            remedy = "start chrony or systemd-timesyncd, on every node of a cluster"
            yield Finding("time service", "warn", "the kernel's clock is not synchronised", remedy)
        case None:
            yield Finding("time service", "ok", "cannot be read here")


def is_synchronised() -> bool | None:
    """What the kernel says (adjtimex, read only); None when it does not say."""
    try:
        adjtimex = ctypes.CDLL(None, use_errno=True).adjtimex
    except (OSError, AttributeError):
        return None
    state = adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))  # all zeros: `modes` asks for no change
    return None if state < 0 else state != _TIME_ERROR


def size(num_bytes: int) -> str:
    """Bytes for people."""
    return f"{num_bytes / (1 << 30):.1f} GiB" if num_bytes >= 1 << 30 else f"{num_bytes / (1 << 20):.0f} MiB"


def _count(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY or limit < 0 else f"{limit:,}"
