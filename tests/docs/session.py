"""A reader at a terminal: one bash for a page, in a folder that is prepared as the page says."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from mixwright.data_mixing.service import read_record
from mixwright.pretrain.rundir import read_history
from tests.docs import tables
from tests.docs.commands import ROOT, Command, commands_of
from tests.docs.unrun import check_unrun

TIMEOUT_S = 400.0
BIN = Path(sys.executable).parent
Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Started:
    """A command in the background: its process group, and where its output and exit code go."""

    process_group: int
    output: Path
    code: Path

    def printed(self) -> str:
        """The end of it so far."""
        return _end_of(self.output)


class Shell:
    """bash with job control, as at a terminal: `cd`, `export`, `&` and `%1` last from one command to the next."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder, self._scratch, self._count = folder, home / f"shell-{folder.name}", 0
        self._scratch.mkdir(parents=True)
        with (self._scratch / "bash.log").open("w") as log:
            self._bash = subprocess.Popen(
                ["bash", "--noprofile", "--norc"], stdin=subprocess.PIPE, stdout=log, stderr=log, text=True, cwd=folder,
                env=environment(home), start_new_session=True, preexec_fn=_hear_ctrl_c,
            )  # fmt: skip
        for line in ("set -m", _own_port("deepspeed"), _own_port("torchrun")):
            self._type(line)

    def run(self, text: str) -> tuple[int, str]:
        """Exit code and everything that was printed."""
        command, output, code = self._files(text)
        self._type(f". {command} >{output} 2>&1 </dev/null; {_write('$?', code)}")
        return int(self._await(code, output)), output.read_text(errors="replace")

    def start(self, text: str) -> Started:
        """Run it beside what follows."""
        command, output, code = self._files(text)
        group = code.with_suffix(".pid")
        # Where Ctrl-C kills the command, bash would end with it and not tell the exit code: hence the trap.
        typed = f"{{ trap : INT; . {command} >{output} 2>&1 </dev/null; {_write('$?', code)}; }}"
        self._type(f"{typed} & {_write('$!', group)}")
        return Started(int(self._await(group, output)), output, code)

    def interrupt(self, started: Started) -> int:
        """Ctrl-C; the exit code."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.process_group, signal.SIGINT)
        code = int(self._await(started.code, started.output))
        self._type(f"wait {started.process_group} 2>/dev/null")  # `%1` is free again
        return code

    def close(self) -> None:
        """End what is still running in this terminal, the command that nobody waits for any more included."""
        for process in psutil.Process(self._bash.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._type("exit")
        self._bash.communicate(timeout=60)

    def _type(self, line: str) -> None:
        assert self._bash.stdin is not None
        self._bash.stdin.write(line + "\n")
        self._bash.stdin.flush()

    def _files(self, text: str) -> tuple[Path, Path, Path]:
        self._count += 1
        command, output, code = (self._scratch / f"{self._count:03}.{kind}" for kind in ("sh", "out", "code"))
        command.write_text(text + "\n")
        return command, output, code

    def _await(self, path: Path, output: Path) -> str:
        await_that(path.exists, f"no end within {TIMEOUT_S:g} s", lambda: _end_of(output))
        return path.read_text()


def _hear_ctrl_c() -> None:
    """A test that was itself started in the background inherits SIGINT ignored, and bash cannot take that back."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end_of(output: Path) -> str:
    return output.read_text(errors="replace")[-4000:] if output.exists() else ""


def _write(value: str, path: Path) -> str:
    """Shell text that writes a number to a file, whole or not at all."""
    return f"echo {value} >{path}.part; mv {path}.part {path}"


def await_that(
    is_so: Callable[[], Any], otherwise: str, shown: Callable[[], str] = lambda: "", every_s: float = 0.05
) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline, f"{otherwise}\n{shown()}"
        time.sleep(every_s)


def environment(home: Path) -> dict[str, str]:
    """That of a reader who has activated the virtual environment; what is slow to make is taken from the real home."""
    from mixwright.pretrain.engine import extensions_folder  # deepspeed, seconds that only these tests need

    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))},
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "HOME": str(home), "SHELL": "/bin/bash", "TERM": "dumb",
        "COLUMNS": "160", "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(extensions_folder())),
        "MPLCONFIGDIR": os.environ.get("MPLCONFIGDIR", str(home / "matplotlib")),
    }  # fmt: skip


def _own_port(program: str) -> str:
    """Shell text that lets a launcher take a free port instead of 29500: a test is not alone on its machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f'{program}() {{ command {program} --master_port {probe.getsockname()[1]} "$@"; }}'


def workplace(folder: Path) -> Path:
    """A checkout as a reader sees it, whose configs may be written beside and whose runs are its own."""
    folder.mkdir(parents=True)
    shutil.copytree(ROOT / "configs", folder / "configs")
    for name, text, smaller in tables.SMALLER:
        whole = (folder / name).read_text()
        assert whole.count(text) == 1, f"{name} has no {text!r} any more"
        (folder / name).write_text(whole.replace(text, smaller))
    (folder / "launch").symlink_to(ROOT / "launch")
    (folder / ".venv").symlink_to(Path(sys.prefix))
    (folder / "runs").mkdir()
    return folder


def named(table: Mapping[str, Entry], command: Command) -> Entry | None:
    """The entry of the command, if there is one."""
    return next((entry for start, entry in table.items() if command.plain.startswith(start)), None)


def with_added(command: Command) -> str:
    """The command with what the table appends, before a comment, a redirection or `&`."""
    added = named(tables.ADDED, command)
    if not added:
        return command.text
    *before, last = command.text.split("\n")
    match = re.match(r"^(.*?)(\s+(?:\d?>|&|#|\|).*)?$", last)
    assert match
    return "\n".join([*before, f"{match[1]} {added}{match[2] or ''}"])


def follow(page: str, shell: Shell) -> list[Command]:
    """Type every command of the page; raises AssertionError at the first that does not do what the page says.

    Returns those that were typed, in order: all but those that `tables.NOT_HERE` lists.
    """
    beside: list[Started] = []
    typed: list[Command] = []
    for command in commands_of(page, (ROOT / page).read_text(encoding="utf-8")):
        if named(tables.NOT_HERE, command) is not None:
            check_unrun(command)
            continue
        typed.append(command)
        if (text := named(tables.INTERRUPTED, command)) is not None:
            run_until_interrupted(shell, command, text)
        elif (until := named(tables.UNTIL_THE_PAGE_ENDS, command)) is not None:
            beside.append(shell.start(with_added(command)))
            await_run(shell.folder, until, beside[-1])
        else:
            run(shell, command)
    for started in beside:
        assert not started.code.exists() or started.code.read_text().strip() == "0", started.printed()
        shell.interrupt(started)
    return typed


def run(shell: Shell, command: Command) -> None:
    code, output = shell.run(with_added(command))
    expected = named(tables.EXIT_CODES, command) or 0
    assert code == expected, f"{command}\nended with {code}, not {expected}:\n{output[-4000:]}"
    if (until := named(tables.WAIT, command)) is not None:
        await_run(shell.folder, until)


def run_until_interrupted(shell: Shell, command: Command, text: str) -> None:
    """What goes on until Ctrl-C must print `text` before and end with 0 or 130; a page that it serves must open."""
    started = shell.start(with_added(command))
    await_that(lambda: text in started.printed() or started.code.exists(), f"{command}: no {text!r}", started.printed)
    if served := re.search(r"http://127\.0\.0\.1:\d+/", started.printed()):
        with urllib.request.urlopen(served[0], timeout=60) as answer:
            assert answer.status == 200
    code = shell.interrupt(started)
    assert text in started.printed(), f"{command}\n{started.printed()}"
    assert code in (0, 130), f"{command}\nended with {code}:\n{started.printed()}"


def await_run(folder: Path, until: tables.Until, job: Started | None = None) -> None:
    """Until the run's service takes policies and its journal tells of the step."""
    run_dir = folder / until.run_dir

    def is_so() -> bool:
        assert job is None or not job.code.exists(), f"ended early:\n{job.printed()}"
        if not (run_dir / "journal").is_dir():
            return False
        reports = read_history(run_dir).reports
        record = read_record(run_dir)
        return bool(reports) and reports[-1].last_step >= until.step and record is not None and record.state == "ready"

    otherwise = f"{until.run_dir} did not come to step {until.step} with a service"
    await_that(is_so, otherwise, job.printed if job else lambda: "", every_s=0.5)


@contextlib.contextmanager
def terminal(folder: Path, home: Path) -> Iterator[Shell]:
    shell = Shell(folder, home)
    try:
        yield shell
    finally:
        shell.close()
