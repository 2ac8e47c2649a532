"""Checks of `mixwright doctor` on a file system: what the journal, the store and checkpoints count on."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from mixwright.launch.claim_names import GO, READY, START_TIMEOUT_S
from mixwright.launch.doctor_machine import size
from mixwright.launch.finding import Finding

CLAIM_MODULE = "mixwright.launch.claim_names"
CLAIMS = 200
FLUSHES, BLOCK_BYTES = 15, 4096
SLOW_FLUSH_S = 0.05
REPLACEMENTS = 200
SCARCE_BYTES, LITTLE_BYTES = 1 << 30, 10 << 30
LARGEST_SKEW_S = 2.0
OTHER_FILE_SYSTEM = "put runs on another file system: a local disk, or NFS 4, Lustre, GPFS, CephFS"


def examine_folder(folder: Path) -> Iterator[Finding]:
    """All checks of the file system that `folder` is on, in a folder of their own that is removed."""
    try:
        scratch = Path(tempfile.mkdtemp(prefix=".mixwright-doctor-", dir=folder))
    except OSError as error:
        remedy = "name a folder that exists and can be written with --folder"
        yield Finding("folder", "fail", f"{folder}: no files can be made there: {error.strerror}", remedy)
        return
    try:
        yield Finding("folder", "ok", f"{folder.resolve()}{_kind(folder)}")
        yield free_space(folder)
        yield flush_latency(scratch)
        yield from exclusive_claims(scratch)
        yield atomic_rename(scratch)
        yield memory_map(scratch)
        yield timestamps(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def free_space(folder: Path) -> Finding:
    """Room for checkpoints and stores."""
    usage = shutil.disk_usage(folder)
    found = f"{size(usage.free)} free of {size(usage.total)}"
    remedy = "free some: a checkpoint takes about 16 bytes per parameter, and `checkpoint.keep` of them stay"
    if usage.free < LITTLE_BYTES:
        return Finding("free space", "fail" if usage.free < SCARCE_BYTES else "warn", found, remedy)
    return Finding("free space", "ok", found)


def flush_latency(folder: Path) -> Finding:
    """Median time until a small file is on disk: what a journal entry costs."""
    seconds = [_flush(folder / f"flush-{number}") for number in range(FLUSHES)]
    median = statistics.median(seconds)
    found = f"{1000 * median:.1f} ms (median of {FLUSHES}, longest {1000 * max(seconds):.1f} ms)"
    if median > SLOW_FLUSH_S:
        remedy = (
            "journal entries will take as long; use another file system, or report less often (mixing.report_every)"
        )
        return Finding("fsync", "warn", found, remedy)
    return Finding("fsync", "ok", found)


def _flush(path: Path) -> float:
    with path.open("wb", buffering=0) as file:
        began = time.perf_counter()
        file.write(bytes(BLOCK_BYTES))
        os.fsync(file.fileno())
        return time.perf_counter() - began


def exclusive_claims(folder: Path) -> Iterator[Finding]:
    """Two processes claim the same names: each must go to exactly one. The journal's safety rests on it."""
    first, second = _race(folder)
    for name, how, needed_by in (
        ("exclusive create", "created", "locks and checkpoints"),
        ("hard links", "linked", "the journal and the extension of stores"),
    ):
        yield judge(name, first[how], second[how], needed_by)


def judge(name: str, first: list[int], second: list[int], needed_by: str) -> Finding:
    """What came of the race for names."""
    twice, claimed = set(first) & set(second), set(first) | set(second)
    if twice:
        found = f"{len(twice)} of {CLAIMS} names went to two processes at once: two writers could own one journal"
        return Finding(name, "fail", found, OTHER_FILE_SYSTEM)
    if len(claimed) < CLAIMS:
        found = f"only {len(claimed)} of {CLAIMS} names could be claimed; {needed_by} need it"
        return Finding(name, "fail", found, OTHER_FILE_SYSTEM)
    return Finding(name, "ok", f"{CLAIMS} names claimed by two processes, {len(first)} and {len(second)}, none twice")


def _race(folder: Path) -> list[dict[str, list[int]]]:
    """What each of two processes got."""
    claims = [
        subprocess.Popen([sys.executable, "-m", CLAIM_MODULE, str(folder), me, str(CLAIMS)], stdout=subprocess.PIPE)
        for me in ("a", "b")
    ]
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while sum(path.name.startswith(READY) for path in folder.iterdir()) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        (folder / GO).touch()
        return [json.loads(claim.communicate(timeout=START_TIMEOUT_S)[0]) for claim in claims]
    finally:
        for claim in claims:
            with contextlib.suppress(ProcessLookupError):
                claim.kill()
            claim.wait()


def atomic_rename(folder: Path) -> Finding:
    """A reader beside a writer that replaces a file sees one version or another, whole, and always a file."""
    path = folder / "replaced"
    bodies = [str(version % 10).encode() * BLOCK_BYTES for version in range(REPLACEMENTS)]
    path.write_bytes(bodies[0])
    done, torn = threading.Event(), []

    def read() -> None:
        while not done.is_set():
            try:
                body = path.read_bytes()
            except OSError as error:
                torn.append(f"it was missing ({error.strerror})")
                return
            if len(body) != BLOCK_BYTES or len(set(body)) != 1:
                torn.append("half of it was another version")
                return

    reader = threading.Thread(target=read)
    reader.start()
    for body in bodies:
        temporary = folder / "replacement"
        temporary.write_bytes(body)
        temporary.replace(path)
    done.set()
    reader.join()
    if torn:
        return Finding("atomic rename", "fail", f"while a file was replaced {torn[0]}", OTHER_FILE_SYSTEM)
    return Finding("atomic rename", "ok", f"{REPLACEMENTS} replacements, every read saw one version")


def memory_map(folder: Path) -> Finding:
    """Rows are read through memory maps."""
    path = folder / "mapped"
    body = os.urandom(16 * BLOCK_BYTES)
    path.write_bytes(body)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            is_same = mapped[:] == body
    except OSError as error:
        return Finding("mmap", "fail", f"files cannot be mapped: {error.strerror}", OTHER_FILE_SYSTEM)
    if not is_same:
        return Finding("mmap", "fail", "a mapped file shows other bytes than were written", OTHER_FILE_SYSTEM)
    return Finding("mmap", "ok", "a mapped file shows what was written")


def timestamps(folder: Path) -> Finding:
    """The file server's clock against this machine's."""
    path = folder / "stamp"
    before = time.time()
    path.touch()
    skew = path.stat().st_mtime - before
    if abs(skew) > LARGEST_SKEW_S:
        which = "ahead of" if skew > 0 else "behind"
        found = f"the file system's clock is {abs(skew):.1f} s {which} this machine's"
        return Finding("file times", "warn", found, "let one time service set both; make and caches go by file times")
    return Finding("file times", "ok", f"within {max(abs(skew), 0.01):.2f} s of this machine's clock")


def _kind(folder: Path) -> str:
    """The type of file system, from the longest mount point that is above the folder (Linux)."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return ""
    resolved = folder.resolve()
    above = [(fields[1], fields[2]) for fields in mounts if resolved.is_relative_to(fields[1])]
    return f" ({max(above, key=lambda mount: len(mount[0]))[1]})" if above else ""
