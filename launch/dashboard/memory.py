"""Memory of a server that lives for days: what it gives back, the machine should get."""

from __future__ import annotations

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Of glibc's `mallopt`."""
LARGE_BYTES = 128 << 10


def give_memory_back() -> None:
    """One heap for all threads, and large blocks outside of it; to be called before there are threads.

    By default glibc has a heap for each thread, each with holes where panels were built, and takes ever larger blocks
    from them. Elsewhere (musl, macOS) nothing is changed.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(M_TRIM_THRESHOLD, LARGE_BYTES)
