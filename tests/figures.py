"""Measured figures in the documentation: what they were measured on, and where on a page they stand."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("torch", "deepspeed", "ray", "transformers")


def machine(packages: tuple[str, ...] = VERSIONS) -> str:
    """Processors, memory and versions in one line."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores ({platform.machine()}), {memory_gib:.0f} GiB, Python {platform.python_version()}, {versions}"


def commit_of(folder: Path) -> str:
    """The commit in `folder`, and whether files were changed since."""
    hash_ = _git(folder, "rev-parse", "--short", "HEAD")
    return f"{hash_} with local changes" if _git(folder, "status", "--porcelain") else hash_


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def comments(name: str) -> tuple[str, str]:
    """The lines of a page between which the figures called `name` stand."""
    return f"<!-- {name}: figures begin -->", f"<!-- {name}: figures end -->"


def write_figures(page: Path, name: str, block: str) -> None:
    """Replace the figures called `name`, and nothing else. Raises ValueError when their comments are missing."""
    begin, end = comments(name)
    before, found_begin, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"{page}: expected the lines {begin} and {end}")
    page.write_text(f"{before}{begin}\n\n{block}\n\n{end}{after}", encoding="utf-8")
