"""`mixwright mix submit` and `cancel`: policies on their way into a run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from mixwright.data_mixing.config_file import read_yaml
from mixwright.data_mixing.errors import ConfigError, PolicyRejected, ServiceUnavailable
from mixwright.launch.help_text import examples
from mixwright.launch.json_output import print_answer, print_json
from mixwright.launch.mix_options import ANSWER_TIMEOUT_S, AsJson, Author, PolicyFile, Run, Timeout, Why, user_name

COMMIT_TIMEOUT_S = 600.0
FOLLOW_INTERVAL_S = 0.2
STILL_WAITING_S = 10.0

app = typer.Typer()


@app.command(
    epilog=examples(
        "mixwright mix submit policy.yaml --dry-run",
        'mixwright mix submit policy.yaml --why "anneal" --wait',
        "mixwright mix submit policy.yaml --run runs/exp --at-step 12000 --shadow --json",
    )
)
def submit(
    policy: PolicyFile,
    run: Run = None,
    at_step: Annotated[int | None, typer.Option(help="effective step (default: as soon as possible)")] = None,
    shadow: Annotated[bool, typer.Option("--shadow", help="record it, never commit it")] = False,
    why: Why = None,
    author: Author = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check and show what it would do; submit nothing")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="return when it is committed")] = False,
    timeout: Annotated[
        float | None,
        typer.Option(help=f"seconds (default: {ANSWER_TIMEOUT_S:g} for the answer, {COMMIT_TIMEOUT_S:g} with --wait)"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Propose a policy. It takes effect at a step that the trainer commits, without a restart."""
    from mixwright.data_mixing.client import MixingClient
    from mixwright.launch.runs import find_run

    run_dir = find_run(run)
    document = read_yaml(policy)
    if not dry_run:
        document.setdefault("author", user_name())
    given = {"at_step": at_step, "why": why, "author": author, "shadow": shadow or None}
    document.update({key: value for key, value in given.items() if value is not None})
    if dry_run:
        preview(run_dir, document, as_json)
        return
    if wait and document.get("shadow"):
        raise ConfigError("--wait: a shadow policy is never committed")
    answer = MixingClient(run_dir, timeout or ANSWER_TIMEOUT_S).submit(document)
    if not as_json:
        typer.echo("\n  ".join([f"policy {answer['lsn']} is accepted", *answer["remarks"]]))
    if wait:
        answer["effective_step"] = wait_for_commit(run_dir, answer["lsn"], timeout or COMMIT_TIMEOUT_S)
        if not as_json:
            typer.echo(f"policy {answer['lsn']} is committed: it takes effect at step {answer['effective_step']}")
    if as_json:
        print_json(answer)


@app.command(epilog=examples("mixwright mix cancel 17 --why 'wrong file'", "mixwright mix cancel 17 --run runs/exp"))
def cancel(
    lsn: Annotated[int, typer.Argument(metavar="ENTRY", help="journal entry of the policy")],
    run: Run = None,
    why: Why = None,
    author: Author = None,
    timeout: Timeout = ANSWER_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Withdraw a policy that has not been committed."""
    from mixwright.data_mixing.client import MixingClient
    from mixwright.launch.runs import find_run

    client = MixingClient(find_run(run), timeout)
    answer = client.cancel(lsn, author=user_name() if author is None else author, why=why or "")
    print_answer(answer, f"policy {lsn} is cancelled (entry {answer['lsn']})", as_json)


def preview(run_dir: Path, document: dict[str, Any], as_json: bool) -> None:
    """What a policy would do: its mixture beside the one in force, and the forecast to the run's end."""
    from mixwright.launch import mix_tables
    from mixwright.launch.mix_preview import preview_of
    from mixwright.launch.runs import open_history

    found = preview_of(open_history(run_dir)[1], document)
    if as_json:
        tree = {"step": found.step, "mixture": found.changes, "remarks": found.remarks, "forecast": found.forecast}
        print_json(tree)
        return
    change, outlook = mix_tables.change_view(found.changes, found.step), mix_tables.forecast_view(found.forecast)
    mix_tables.console().print(change, outlook)
    for note in found.remarks:
        typer.echo(note)
    typer.echo("nothing was submitted (--dry-run); the effective step is an estimate")


def wait_for_commit(run_dir: Path, lsn: int, timeout_s: float) -> int:
    """The step from which policy `lsn` holds, once the journal says so.

    Raises PolicyRejected when it never will, ServiceUnavailable when it is not committed in time.
    """
    from mixwright.launch.runs import open_history

    journal, history = open_history(run_dir)
    started = told = time.monotonic()
    while True:
        commit = next((commit for commit in history.commits if commit.lsn == lsn), None)
        if commit is not None:
            return commit.effective_step
        if all(pending != lsn for pending, _ in history.pending()):
            raise PolicyRejected(f"policy {lsn} was cancelled")
        if history.end is not None:
            raise PolicyRejected(f"policy {lsn} was not committed: the run is {history.end.reason}")
        now = time.monotonic()
        if now - started > timeout_s:
            raise ServiceUnavailable(
                f"policy {lsn} is accepted, but no trainer committed it within {timeout_s:g} s "
                f"(last report: step {history.last_step}); it stays pending"
            )
        if now - told > STILL_WAITING_S:
            told = now
            typer.echo(
                f"waiting for the trainer to commit policy {lsn} (last report: step {history.last_step})", err=True
            )
        time.sleep(FOLLOW_INTERVAL_S)
        for entry in journal.poll():
            history.apply(entry)
