"""Libraries that stand between a process and the system (LD_PRELOAD), built when a drill needs them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def build_library(source: str, folder: Path) -> Path:
    """The library made of a C file of this folder. Skips the drill where there is no compiler."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip(f"needs gcc, to build {source}")
    library = folder / f"{Path(source).stem}.so"
    path = Path(__file__).with_name(source)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(path), "-ldl"], check=True)
    return library
