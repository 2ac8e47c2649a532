from __future__ import annotations

import pytest

from mixwright.launch.console import RunConsole
from mixwright.pretrain.progress import Progress


def progress(step: int, **changes: object) -> Progress:
    values = {"loss": 3.21, "domain_losses": {"[red]x": 2.5, "b": 4.0}, "policy_lsn": 7, **changes}
    return Progress(step=step, num_steps=10, tokens_per_step=100, **values)  # type: ignore[arg-type]


def test_the_line_shows_step_losses_speed_and_policy(capsys: pytest.CaptureFixture[str]) -> None:
    RunConsole(quiet=False).progress(progress(10))
    line = capsys.readouterr().out
    assert "step 10/10  loss 3.210  [[red]x 2.50 b 4.00]" in line
    assert line.rstrip().endswith("policy 7")


def test_names_and_reasons_are_text_and_never_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console = RunConsole(quiet=False)
    console.say("why: [bold]more[/bold] code [/]")
    console.table("t", ["domain", "x"], [["[link=file]a[/link]", "1"]])
    shown = capsys.readouterr().out
    assert "why: [bold]more[/bold] code [/]" in shown
    assert "[link=file]a[/link]" in shown


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    console = RunConsole(quiet=True)
    console.say("x")
    console.progress(progress(10))
    console.close()
    assert capsys.readouterr().out == ""


def test_many_domains_are_counted_instead_of_listed(capsys: pytest.CaptureFixture[str]) -> None:
    RunConsole(quiet=False).progress(progress(10, domain_losses={f"d{i}": 1.0 for i in range(9)}))
    assert "d5 1.00 +3]" in capsys.readouterr().out
