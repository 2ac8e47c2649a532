"""`mixwright mix status --watch` on a journal that grows: on a terminal, in a file, as JSON, after the run."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.domain import Cap
from mixwright.data_mixing.entries import Report
from mixwright.data_mixing.run_figures import Pace, RunFollower
from mixwright.launch.watch_view import change_line, share_bar, watch_view
from tests.data_mixing.run_cases import TrainerSide, genesis

COMMAND = str(Path(sys.executable).parent / "mixwright")
TIMEOUT_S = 90.0
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def trainer(tmp_path: Path) -> TrainerSide:
    """30 trained steps of a run with a cap, whose mixture changed at step 20."""
    caps = {"web-a": Cap(max_epochs=1.0)}
    trainer = TrainerSide(tmp_path / "exp", genesis("exp", num_steps=200, caps=caps))
    document = {"kind": "static", "mixture": {"code": 2, "web-a": 1}, "why": "[bold]\x1b[2Jmore"}
    trainer.commit(trainer.journal.append(accept(document, trainer.genesis)).lsn, 20)
    trainer.report(last_step=29)
    return trainer


class Terminal:
    """The command in a terminal of its own, and everything that it has drawn."""

    def __init__(self, *arguments: str, columns: int = 110, lines: int = 30) -> None:
        self.pid, self._descriptor = pty.fork()
        if self.pid == 0:
            # A shell that starts tests in the background ignores Ctrl-C for all that they start.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": str(lines)}
            os.execve(COMMAND, [COMMAND, "mix", "status", "--watch", "--every", "0.1", *arguments], environment)
        fcntl.ioctl(self._descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.raw = ""

    @property
    def text(self) -> str:
        return _ESCAPES.sub("", self.raw)

    def read_until(self, expected: str) -> None:
        """Read what is drawn until `expected` is; an end before is a failure."""
        deadline = time.monotonic() + TIMEOUT_S
        while expected not in self.text:
            assert time.monotonic() < deadline, self.text[-3000:]
            if not self._read():
                raise AssertionError(f"ended without {expected!r}: {self.text[-3000:]}")

    def end(self) -> int:
        """Exit code, once it has ended by itself; one that goes on drawing is a failure."""
        deadline = time.monotonic() + TIMEOUT_S
        while self._read():
            assert time.monotonic() < deadline, self.text[-3000:]
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        os.close(self._descriptor)

    def _read(self) -> bool:
        ready, _, _ = select.select([self._descriptor], [], [], TIMEOUT_S)
        try:
            part = os.read(self._descriptor, 65536) if ready else b""
        except OSError:  # the other end is closed
            return False
        self.raw += part.decode(errors="replace")
        return bool(part)


@pytest.fixture
def terminal(trainer: TrainerSide) -> Iterator[Terminal]:
    terminal = Terminal("--run", str(trainer.run_dir))
    yield terminal
    terminal.close()


def test_a_terminal_follows_the_journal_and_ends_with_the_run(trainer: TrainerSide, terminal: Terminal) -> None:
    terminal.read_until("run exp: running, step 30 of 200")
    terminal.read_until("in force: entry 4: static, from step 20 ([bold] [2Jmore)")
    assert "\x1b[2J" not in terminal.raw
    trainer.report(last_step=39)
    terminal.read_until("step 40 of 200")
    terminal.read_until("tokens/s")
    lsn = trainer.journal.append(accept({"kind": "static", "mixture": {"wiki": 1}}, trainer.genesis)).lsn
    terminal.read_until(f"to come: entry {lsn}: static, as soon as possible")
    trainer.commit(lsn, 50)
    terminal.read_until(f"policy {lsn} from step 50 on")
    trainer.end()
    assert terminal.end() == 0
    assert "run exp: complete, step 200 of 200" in terminal.text


def test_ctrl_c_ends_it_with_the_cursor_shown(terminal: Terminal) -> None:
    terminal.read_until("step 30 of 200")
    os.kill(terminal.pid, signal.SIGINT)
    assert terminal.end() == 130
    assert terminal.raw.rindex("\x1b[?25h") > terminal.raw.rindex("\x1b[?25l")
    assert "Traceback" not in terminal.text


def start(run_dir: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [COMMAND, "mix", "status", "--watch", "--every", "0.1", "--run", str(run_dir), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_without_a_terminal_each_change_is_a_line(trainer: TrainerSide) -> None:
    watch = start(trainer.run_dir)
    assert watch.stdout is not None
    assert watch.stdout.readline().startswith("step 30/200  running  policy 4  loss 2.500 [code 2.50]")
    trainer.report(last_step=39)
    assert watch.stdout.readline().endswith("entry 7 REPORT: train steps 30 to 39: 2.5000 nats/token over 100 tokens\n")
    assert watch.stdout.readline().startswith("step 40/200")
    trainer.end()
    rest, errors = watch.communicate(timeout=TIMEOUT_S)
    assert (watch.returncode, errors) == (0, "")
    assert rest.endswith("END: complete after 200 steps\n")


def test_as_json_each_change_is_an_object(trainer: TrainerSide) -> None:
    watch = start(trainer.run_dir, "--json")
    assert watch.stdout is not None
    first = json.loads(watch.stdout.readline())
    assert (first["status"]["next_step"], first["entries"]) == (30, [])
    assert {domain["name"]: domain["requested"] for domain in first["domains"]}["web-a"] == pytest.approx(1 / 3)
    trainer.end()
    last = json.loads(watch.communicate(timeout=TIMEOUT_S)[0])
    assert (last["status"]["state"], [entry["type"] for entry in last["entries"]]) == ("complete", ["END"])
    assert watch.returncode == 0


@pytest.mark.parametrize(("width", "height"), [(40, 12), (80, 24), (200, 60)])
def test_the_screen_fits_the_terminal(trainer: TrainerSide, width: int, height: int) -> None:
    sizes = {f"domain-{index:03}": 10 + index for index in range(60)}
    wide = TrainerSide(trainer.run_dir.parent / "wide", genesis("wide", sizes=sizes))
    wide.report(last_step=9)
    out = StringIO()
    console = Console(file=out, width=width, height=height, force_terminal=True, color_system=None)
    console.print(watch_view(RunFollower(wide.run_dir / "journal").figures(), console, time.time()))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    shown = [line for line in lines if line.startswith("domain-")]
    assert len(shown) == min(max(height - 12, 3), 60)
    assert len(lines) <= height or height < 20
    assert f"{60 - len(shown)} domains with smaller proportions are not shown" in " ".join(out.getvalue().split())


def test_the_countdown_is_that_of_the_plan(trainer: TrainerSide) -> None:
    out = StringIO()
    console = Console(file=out, width=120, height=30)
    console.print(watch_view(RunFollower(trainer.run_dir / "journal").figures(), console, time.time()))
    step = next(event.step for event in trainer.history.plan().exhaustion() if event.domain == "web-a")
    assert re.search(rf"web-a .* {step - 30} steps", out.getvalue())


def test_a_bar_shows_realised_with_a_mark_at_requested() -> None:
    assert share_bar(0.5, 0.25, 1.0, 20, plain=True).plain == "=====     |         "
    assert share_bar(0.25, 0.5, 1.0, 20, plain=True).plain == "=====|====          "
    assert share_bar(1.0, None, 1.0, 4, plain=True).plain == "   |"
    assert share_bar(0.0, 0.0, 0.0, 4, plain=True).plain == "    "
    assert share_bar(0.0, 0.625, 1.0, 4, plain=False).plain == "━━╸ "


def test_the_pace_begins_anew_with_each_attempt() -> None:
    def report(step: int, attempt: int) -> Report:
        return Report(kind="train", first_step=step - 9, last_step=step, domains={}, attempt=attempt)

    pace = Pace()
    pace.add(100.0, report(9, 0))
    assert pace.steps_per_s is None
    pace.add(105.0, report(19, 0))
    assert pace.steps_per_s == 2.0
    pace.add(9000.0, report(19, 1))
    assert pace.steps_per_s is None
    pace.add(9001.0, report(29, 1))
    assert pace.steps_per_s == 10.0


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0, 86400.0, -86400.0])
def test_the_pace_is_that_of_the_steps_when_the_clock_is_set(jump_s: float) -> None:
    pace, clock = Pace(), 100.0
    for number in range(8):
        clock += jump_s if number == 4 else 5.0
        steps = {"first_step": 10 * number, "last_step": 10 * number + 9}
        pace.add(clock, Report(kind="train", domains={}, attempt=0, **steps))
    assert pace.steps_per_s == pytest.approx(2.0)


def test_a_line_names_a_few_losses_only(trainer: TrainerSide) -> None:
    assert change_line(RunFollower(trainer.run_dir / "journal").figures()) == (
        "step 30/200  running  policy 4  loss 2.500 [code 2.50]"
    )
