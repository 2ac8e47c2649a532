"""Files that are either complete or not there: atomic writes, one preparer at a time, clear words if storage fails."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mixwright.data_mixing.errors import DataError

logger = logging.getLogger(__name__)

_DISK_FULL = {
    errno.ENOSPC: "no space left on device",
    errno.EDQUOT: "disk quota exceeded",
    errno.EFBIG: "file too large",
}

_STAYS = frozenset({
    errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM,
})  # fmt: skip
"""Errors that last until somebody changes files or permissions. Any other number (EIO, ESTALE, EROFS, ENOTCONN ...) may
pass. That is the safe side: a passing error taken for a lasting one costs hours of work, the reverse disk space."""

_CONTINUES = "run the same command again: it continues"


class Resumable(DataError):
    """Work stopped for want of disk, memory or a connection: what is done is kept, and the same call continues."""


@contextmanager
def atomic_file(path: Path, durable: bool = False) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` only once it is complete; `durable` also survives a power cut.

    Raises DataError when it cannot be written (disk full, no permission); nothing is left behind then.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        _discard(part)
        raise write_error(path, error) from None
    except BaseException:
        _discard(part)
        raise


def _discard(part: Path) -> None:
    """Remove what was begun; where even that fails (its folder is a file), the error before it is the one to tell."""
    with suppress(OSError):
        part.unlink()


def is_complete(path: Path) -> bool:
    """Whether an atomic file was written. One that was not durable can be empty after a power cut."""
    return path.is_file() and path.stat().st_size > 0


def write_error(path: Path, error: OSError) -> DataError:
    """The one clear line for an error while `path` was written; Resumable when the disk is full or it may pass."""
    if error.errno in _DISK_FULL:
        reason = _DISK_FULL[error.errno]
        free = shutil.disk_usage(path.parent).free
        return Resumable(f"{path}: {reason} ({free:,} bytes are free there); free some and {_CONTINUES}")
    return storage_error(f"{path}: cannot be written", error)


def storage_error(what: str, error: OSError) -> DataError:
    """`what: reason` as one clear line; Resumable when the error may pass without a change to any file.

    Libraries raise OSError without a number for contents that they cannot read: that stays.
    """
    line = f"{what}: {' '.join((error.strerror or str(error)).split())}"
    if isinstance(error, ConnectionError | TimeoutError) or (error.errno or errno.ENOENT) not in _STAYS:
        return Resumable(f"{line}; once that is over, {_CONTINUES}")
    return DataError(line)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; raises DataError when another one holds it. Ends with the process."""
    lock = _locked(folder)
    try:
        yield
    finally:
        os.close(lock)


def _locked(folder: Path) -> int:
    path = folder / "lock"
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise write_error(path, error) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise DataError(f"{folder}: another process is at work here; wait for it to end") from None
        except OSError as error:  # Lustre without -o flock, some FUSE
            logger.warning("%s: no file locks here (%s): see that nobody else works on it", folder, error.strerror)
        # The folder may have been removed by its last holder between open and lock.
        if path.exists() and path.stat().st_ino == os.fstat(lock).st_ino:
            return lock
        os.close(lock)


def clear(folder: Path) -> None:
    """Remove all that is in a held folder except its lock."""
    for path in folder.iterdir():
        if path.name == "lock":
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
