"""`mixwright doctor`: what this machine has of what mixwright needs, and what to do about the rest. Takes seconds."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

from mixwright.launch.ending import EXIT_NOT_WELL
from mixwright.launch.finding import Finding, worst
from mixwright.launch.json_output import print_json
from mixwright.launch.mix_options import AsJson

Check = Callable[[], Iterable[Finding]]
MARKS = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "bold red")}
TOGETHER = 4
"""Checks at a time: most of them wait, for imports, disks and sockets."""


def doctor(
    folder: Annotated[Path, typer.Option(help="a folder of the file system that runs will be on")] = Path(),
    address: Annotated[str | None, typer.Option(help="a Ray cluster HOST:PORT to reach (default: RAY_ADDRESS)")] = None,
    as_json: AsJson = False,
) -> None:
    """Check Python, torch, DeepSpeed, Ray, the file system, shared memory, clock and limits; say how to repair each.

    Exit code 1 when something fails. Nothing is changed; files made below --folder are removed again.
    """
    began = time.monotonic()
    findings = examine(checks(folder, address or os.environ.get("RAY_ADDRESS", "")))
    seconds = time.monotonic() - began
    if as_json:
        print_json({"state": worst(findings), "seconds": round(seconds, 2), "findings": findings})
    else:
        _print(findings, seconds)
    if worst(findings) == "fail":
        raise typer.Exit(EXIT_NOT_WELL)


def checks(folder: Path, address: str) -> dict[str, Check]:
    """All checks by name, in the order in which they are told."""
    from mixwright.launch import doctor_folder, doctor_machine, doctor_packages

    return {
        "python": doctor_packages.python,
        "packages": doctor_packages.packages,
        "torch": doctor_packages.torch_and_kernels,
        "deepspeed": doctor_packages.deepspeed,
        "ray": functools.partial(doctor_machine.ray_token, os.environ),
        "ray address": functools.partial(doctor_machine.ray_address, address),
        "file system": functools.partial(doctor_folder.examine_folder, folder),
        "shared memory": doctor_machine.shared_memory,
        "open files": doctor_machine.open_files,
        "clock": doctor_machine.clock,
    }


def examine(checks: dict[str, Check]) -> list[Finding]:
    """Findings of all checks, in order; a check that itself breaks is a finding too."""

    def attempt(name: str) -> list[Finding]:
        try:
            return list(checks[name]())
        except Exception as error:  # one check must not hide what the others found
            text = " ".join(f"{type(error).__name__}: {error}".split())
            return [Finding(name, "fail", f"the check itself failed: {text}", "report this as a bug")]

    with ThreadPoolExecutor(TOGETHER) as pool:
        return [finding for found in pool.map(attempt, checks) for finding in found]


def _print(findings: Sequence[Finding], seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        mark, style = MARKS[finding.state]
        remedy = f"\n-> {finding.remedy}" if finding.remedy else ""
        table.add_row(Text(mark, style), Text(finding.name, no_wrap=True), Text(finding.found + remedy))
    console.print(table)
    counts = {state: sum(finding.state == state for finding in findings) for state in MARKS}
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    console.print(f"{told}; {seconds:.1f} s")
