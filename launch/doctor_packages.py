"""Checks of `mixwright doctor` on what is installed: Python, packages, torch and its engines, compilers."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet

from mixwright.launch.finding import Finding

PACKAGE = "mixwright"
CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
"""Beside the folders in a checkout; an installed wheel has none."""
INSTALL = "run `make install`, or `pip install --constraint constraints.txt mixwright`"
MOST_NAMED = 6


def python() -> Iterator[Finding]:
    """The interpreter against what the package asks for."""
    wanted, found = metadata(PACKAGE)["Requires-Python"], ".".join(map(str, sys.version_info[:3]))
    if SpecifierSet(wanted).contains(found, prereleases=True):
        yield Finding("python", "ok", f"{found} at {sys.executable}")
    else:
        yield Finding("python", "fail", f"{found}, expected {wanted}", "make the environment with a newer Python")


def packages() -> Iterator[Finding]:
    """What the package requires, and in a checkout the versions that it is tested with."""
    needed = [Requirement(text) for text in requires(PACKAGE) or ()]
    wrong = [problem for one in needed if _is_meant(one) and (problem := _problem(one))]
    if wrong:
        yield Finding("packages", "fail", f"{PACKAGE} {version(PACKAGE)} needs other versions: {_some(wrong)}", INSTALL)
    else:
        yield Finding("packages", "ok", f"{PACKAGE} {version(PACKAGE)}, all requirements are met")
    if CONSTRAINTS.is_file():
        yield tested_versions(CONSTRAINTS.read_text(encoding="utf-8").splitlines())


def tested_versions(lines: Iterable[str]) -> Finding:
    """Installed versions beside the lines of a constraints file."""
    pinned = [one for line in lines if (one := _requirement(line)) is not None and _is_meant(one)]
    other = [problem for one in pinned if _installed(one.name) and (problem := _problem(one))]
    if other:
        found = f"{len(other)} of {len(pinned)} differ from constraints.txt: {_some(other)}"
        return Finding("tested versions", "warn", found, f"{INSTALL}, unless it is on purpose")
    return Finding("tested versions", "ok", f"as in constraints.txt ({len(pinned)} pins)")


def _requirement(line: str) -> Requirement | None:
    try:
        return Requirement(line.partition("#")[0].strip())
    except InvalidRequirement:
        return None


def _is_meant(requirement: Requirement) -> bool:
    """Whether it holds on this machine, and not for an extra only."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _problem(requirement: Requirement) -> str:
    found = _installed(requirement.name)
    if not found:
        return f"{requirement.name} is not installed"
    # A build of torch for another accelerator (2.13.0+cpu) is the same version.
    if requirement.specifier.contains(found.partition("+")[0], prereleases=True):
        return ""
    return f"{requirement.name} {found} ({requirement.specifier})"


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _some(texts: list[str]) -> str:
    return ", ".join(texts[:MOST_NAMED]) + (f" and {len(texts) - MOST_NAMED} more" if len(texts) > MOST_NAMED else "")


def torch_and_kernels() -> Iterator[Finding]:
    """torch, the accelerator that it sees, and the engine that the kernels will run on."""
    try:
        import torch
    except ImportError as error:
        yield Finding("torch", "fail", f"cannot be imported: {error}", INSTALL)
        return
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        built_for = f"CUDA {torch.version.cuda}, {len(names)} GPU(s): {_some(sorted(set(names)))}"
    else:
        built_for = "CUDA " + torch.version.cuda if torch.version.cuda else "CPU only"
        built_for += ", no GPU in use"
    yield Finding("torch", "ok", f"{torch.__version__}, {built_for}, {torch.get_num_threads()} threads")
    yield from _gpu_that_torch_misses(has_gpu)
    yield _engine(has_gpu)


def _gpu_that_torch_misses(has_gpu: bool) -> Iterator[Finding]:
    if not has_gpu and Path("/dev/nvidiactl").exists():
        yield Finding(
            "gpu",
            "warn",
            "there is an NVIDIA device, but torch does not use it",
            "install a CUDA build of torch that the driver supports; see CUDA_VISIBLE_DEVICES",
        )


def _engine(has_gpu: bool) -> Finding:
    triton = _installed("triton")
    if not has_gpu:
        return Finding("kernels", "ok", f"engine: CPU (Triton {triton or 'is not installed'}, used on CUDA only)")
    if not triton:
        return Finding("kernels", "fail", "there is a GPU, but Triton is not installed", INSTALL)
    return Finding("kernels", "ok", f"engine: Triton {triton} (float64: torch)")


def deepspeed() -> Iterator[Finding]:
    """DeepSpeed, and what it compiles its operators with."""
    found = _installed("deepspeed")
    if not found:
        yield Finding("deepspeed", "fail", "is not installed", INSTALL)
    else:
        yield Finding("deepspeed", "ok", found)
    compiler = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    missing = [name for name, path in (("a C++ compiler", compiler), ("ninja", ninja)) if not path]
    if missing:
        yield Finding(
            "compiler",
            "warn",
            f"{' and '.join(missing)} not found: DeepSpeed's shared-memory all-reduce cannot be built, ranks on CPUs "
            "then use gloo",
            "install g++ (Debian: apt install g++) and ninja (pip install ninja)",
        )
    else:
        yield Finding("compiler", "ok", f"{compiler}, {ninja}")
