"""`mixwright mix hold|resume|rollback|replay-policy`: people over online policies.

Exit codes: 0 ok, 2 bad input or rejected, 3 the service is unavailable; `replay-policy`: 1 when a decision comes out
otherwise than the journal says.
"""

from __future__ import annotations

from typing import Annotated

import typer

from mixwright.data_mixing.errors import ConfigError, nearest
from mixwright.launch.ending import EXIT_NOT_WELL
from mixwright.launch.help_text import examples
from mixwright.launch.json_output import print_answer, print_json
from mixwright.launch.mix_options import ANSWER_TIMEOUT_S, AsJson, Author, Run, Timeout, Why, user_name

app = typer.Typer()

Lsn = Annotated[int, typer.Argument(metavar="ENTRY", help="journal entry")]


@app.command(epilog=examples("mixwright mix hold --why 'losses look odd'", "mixwright mix hold --run runs/exp"))
def hold(
    run: Run = None,
    why: Why = None,
    author: Author = None,
    timeout: Timeout = ANSWER_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Keep the mixture of the online policy in force from its next decision on, until `mix resume`."""
    lsn = _pause(run, True, why, author, timeout)
    text = f"decisions are held (entry {lsn}): the mixture stays from the next decision on"
    print_answer({"lsn": lsn, "held": True}, text, as_json)


@app.command(epilog=examples("mixwright mix resume --run runs/exp --why 'it was the logger'"))
def resume(
    run: Run = None,
    why: Why = None,
    author: Author = None,
    timeout: Timeout = ANSWER_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Let the online policy decide again."""
    lsn = _pause(run, False, why, author, timeout)
    print_answer({"lsn": lsn, "held": False}, f"decisions go on (entry {lsn})", as_json)


@app.command(
    epilog=examples("mixwright mix rollback 4", "mixwright mix rollback 4 --run runs/exp --why 'it was better'")
)
def rollback(
    lsn: Lsn,
    run: Run = None,
    why: Why = None,
    author: Author = None,
    timeout: Timeout = ANSWER_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Submit an earlier policy again: its document, or, of a decision, its mixture for the rest of the run."""
    from mixwright.data_mixing.client import MixingClient
    from mixwright.launch.runs import find_run

    client = MixingClient(find_run(run), timeout)
    answer = client.roll_back(lsn, author=user_name() if author is None else author, why=why or "")
    lines = [f"policy {answer['lsn']} is accepted: back to policy {lsn}", *answer["remarks"]]
    print_answer(answer, "\n  ".join(lines), as_json)


@app.command(epilog=examples("mixwright mix replay-policy --run runs/exp", "mixwright mix replay-policy 23 --json"))
def replay_policy(
    lsn: Annotated[int | None, typer.Argument(metavar="[ENTRY]", help="a DECISION (default: all of them)")] = None,
    run: Run = None,
    as_json: AsJson = False,
) -> None:
    """Recompute decisions from their journaled input and print what comes out otherwise. Works with Ray down."""
    from mixwright.data_mixing.deciding import differences, recompute
    from mixwright.data_mixing.entries import Decision
    from mixwright.data_mixing.journal import read_entries
    from mixwright.launch.runs import find_run, open_history

    run_dir = find_run(run)
    history = open_history(run_dir)[1]
    bodies = {entry.lsn: entry.body for entry in read_entries(run_dir / "journal")}
    made = {number: body for number, body in bodies.items() if isinstance(body, Decision)}
    if lsn is not None and lsn not in made:
        raise ConfigError(f"entry {lsn} is no decision of run {run_dir.name!r}{nearest(str(lsn), map(str, made))}")
    found: dict[int, list[str]] = {}
    for number, decision in made.items() if lsn is None else [(lsn, made[lsn])]:
        if decision.proposal:  # people's own decisions, to hold and to resume, are not computed
            policy = history.policies[decision.policy_lsn]
            found[number] = differences(decision, recompute(decision, policy, history.genesis))
    if as_json:
        print_json([{"lsn": number, "differences": lines} for number, lines in found.items()])
    else:
        for number, lines in found.items():
            typer.echo("\n  ".join([f"decision {number}: {'differs' if lines else 'the same'}", *lines]))
        if not found:
            typer.echo(f"run {run_dir.name!r} has no decision of an online policy")
    if any(found.values()):
        raise typer.Exit(EXIT_NOT_WELL)


def _pause(run: Run, held: bool, why: str | None, author: str | None, timeout: float) -> int:
    from mixwright.data_mixing.client import MixingClient
    from mixwright.launch.runs import find_run

    client = MixingClient(find_run(run), timeout)
    answer = client.pause(held, author=user_name() if author is None else author, why=why or "")
    lsn: int = answer["lsn"]
    return lsn
