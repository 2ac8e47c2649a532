"""`mixwright mix`: steer what a run reads while it trains, and look at what it has read and will read.

`submit`, `cancel`, `hold`, `resume`, `rollback` and `up` need the run's mixing service; everything else reads the
journal and works with Ray down. Exit codes: 0 ok, 2 bad input or rejected, 3 the service is unavailable.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live

from mixwright.data_mixing.config_file import read_yaml
from mixwright.data_mixing.errors import ConfigError, PolicyRejected, ServiceUnavailable, nearest
from mixwright.launch import mix_online
from mixwright.launch.fit import fit
from mixwright.launch.hard_samples import hard_samples
from mixwright.launch.mix_options import ANSWER_TIMEOUT_S, AsJson, Author, PolicyFile, Run, Timeout, Why, user_name
from mixwright.launch.simulate import simulate

app = typer.Typer(help="Steer what a run reads while it trains, and look at it.", no_args_is_help=True)
plan_app = typer.Typer(help="Look at the rows that a run reads.", no_args_is_help=True)
app.add_typer(plan_app, name="plan")
for command in (mix_online.hold, mix_online.resume, mix_online.rollback, mix_online.replay_policy, simulate, fit):
    app.command()(command)
app.command()(hard_samples)

START_TIMEOUT_S = 120.0
COMMIT_TIMEOUT_S = 600.0
FOLLOW_INTERVAL_S = 0.2
WATCH_INTERVAL_S = 2.0
STILL_WAITING_S = 10.0

"""Commands import what they need when they run: `mixwright --help` should not wait for pyarrow."""


@app.command()
def up(
    run: Run = None,
    address: Annotated[
        str | None, typer.Option(help="a Ray cluster HOST:PORT, auto, or local (default: RAY_ADDRESS, else local)")
    ] = None,
    timeout: Annotated[float, typer.Option(help="seconds to wait until it is ready")] = START_TIMEOUT_S,
) -> None:
    """Start the mixing service of a run, unless it is there. It stays until `mix down` or the end of the run."""
    from mixwright.data_mixing.service import read_record, start_service, wait_for_end
    from mixwright.launch.runs import find_run, open_history

    run_dir = find_run(run)
    end = open_history(run_dir)[1].end
    if end is not None:
        raise ConfigError(f"{run_dir}: the run is {end.reason} after step {end.step}; it takes no more policies")
    wait_for_end(run_dir, timeout)
    service = start_service(run_dir, address=address, watch_pid=None)
    status = service.wait(min(timeout, STILL_WAITING_S))
    if status.state == "starting" and timeout > STILL_WAITING_S:
        typer.echo(f"{status.message}; waiting up to {timeout:g} s", err=True)
        status = service.wait(timeout - STILL_WAITING_S)
    if status.state != "ready":
        raise ServiceUnavailable(status.message)
    record = read_record(run_dir)
    typer.echo(status.message)
    if record is not None:
        lasts = "it ends with its trainer" if record.watched else "it stays until `mix down` or the end of the run"
        typer.echo(f"actor {record.actor} in namespace {record.namespace}, host process {record.pid}; {lasts}")


@app.command()
def down(run: Run = None, timeout: Annotated[float, typer.Option(help="seconds to wait")] = ANSWER_TIMEOUT_S) -> None:
    """End the mixing service of a run. Training goes on under the committed policies."""
    from mixwright.data_mixing.client import MixingClient
    from mixwright.data_mixing.service import has_host, read_record, stop_service, write_record
    from mixwright.launch.runs import find_run

    run_dir = find_run(run)
    record = read_record(run_dir)
    if record is None or (not has_host(run_dir) and (record.private or record.state != "ready")):
        typer.echo(f"run {run_dir.name!r} has no mixing service")
    elif stop_service(run_dir, timeout):
        typer.echo(f"the mixing service of run {run_dir.name!r} has ended")
    elif record.private:
        raise ServiceUnavailable(
            f"the mixing service of run {record.run!r} is on {record.host!r}: run this command there"
        )
    else:
        # Its host process is dead or on another machine; the actor lives in the cluster.
        MixingClient(run_dir, timeout).end()
        if not has_host(run_dir):
            write_record(run_dir, record.model_copy(update={"state": "stopped", "message": "it was told to end"}))
        typer.echo(f"controller {record.actor} at {record.address} has ended")


@app.command()
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
        typer.echo(json.dumps(answer))


@app.command()
def cancel(
    lsn: Annotated[int, typer.Argument(metavar="ENTRY", help="journal entry of the policy")],
    run: Run = None,
    why: Why = None,
    author: Author = None,
    timeout: Timeout = ANSWER_TIMEOUT_S,
) -> None:
    """Withdraw a policy that has not been committed."""
    from mixwright.data_mixing.client import MixingClient
    from mixwright.launch.runs import find_run

    client = MixingClient(find_run(run), timeout)
    answer = client.cancel(lsn, author=user_name() if author is None else author, why=why or "")
    typer.echo(f"policy {lsn} is cancelled (entry {answer['lsn']})")


@app.command()
def status(
    run: Run = None,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="show it until Ctrl-C")] = False,
) -> None:
    """Where a run stands: step, policy in force, policies to come, mixture, tokens and losses per domain."""
    from mixwright.data_mixing.run_status import run_status
    from mixwright.data_mixing.service import service_status
    from mixwright.launch import mix_tables
    from mixwright.launch.runs import find_run, open_history

    run_dir = find_run(run)
    journal, history = open_history(run_dir)
    if as_json:
        service = dataclasses.asdict(service_status(run_dir))
        typer.echo(json.dumps({**run_status(history).model_dump(mode="json"), "service": service}))
        return
    view = mix_tables.status_view(run_status(history), service_status(run_dir).message)
    if not watch:
        mix_tables.console().print(view)
        return
    with Live(view, auto_refresh=False) as live:
        while True:
            time.sleep(WATCH_INTERVAL_S)
            for entry in journal.poll():
                history.apply(entry)
            live.update(mix_tables.status_view(run_status(history), service_status(run_dir).message), refresh=True)


@app.command()
def log(
    run: Run = None,
    since: Annotated[int, typer.Option(help="first entry to show")] = 0,
    verify: Annotated[bool, typer.Option("--verify", help="check every hash and derive every commit anew")] = False,
    as_json: AsJson = False,
) -> None:
    """The run's journal: who changed what, when and why."""
    from mixwright.data_mixing.journal import read_entries
    from mixwright.data_mixing.journal import verify as verify_journal
    from mixwright.data_mixing.run_status import entry_record
    from mixwright.launch import mix_tables
    from mixwright.launch.runs import find_run

    folder = find_run(run) / "journal"
    if verify:
        history = verify_journal(folder)
        typer.echo(f"{folder}: {history.last_lsn + 1} entries are sound, {history.num_commits} commits derive the same")
        return
    entries = read_entries(folder, max(since, 0))
    if as_json:
        typer.echo(json.dumps([entry_record(entry) for entry in entries]))
    else:
        mix_tables.console().print(mix_tables.log_view(entries))


@app.command()
def forecast(
    policy: Annotated[Path | None, typer.Argument(metavar="[POLICY]", help="as if this were submitted now")] = None,
    run: Run = None,
    until: Annotated[int | None, typer.Option(help="step to look ahead to (default: the run's end)")] = None,
    as_json: AsJson = False,
) -> None:
    """What the run will read: tokens and epochs per domain, and which domain reaches its cap when."""
    from mixwright.data_mixing.acceptance import accept
    from mixwright.data_mixing.forecast import expected_commits
    from mixwright.data_mixing.forecast import forecast as forecast_run
    from mixwright.launch import mix_tables
    from mixwright.launch.runs import find_run, open_history

    _, history = open_history(find_run(run))
    genesis, next_step = history.genesis, history.last_step + 1
    new = None
    if policy is not None:
        new = (history.last_lsn + 1, accept(read_yaml(policy), genesis, history=history))
    until_step = genesis.num_steps if until is None else until
    if not next_step < until_step <= genesis.num_steps:
        raise ConfigError(f"--until: expected a step from {next_step + 1} to {genesis.num_steps}, found {until_step}")
    result = forecast_run(genesis, expected_commits(history, new), next_step, until_step)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result)))
    else:
        mix_tables.console().print(mix_tables.forecast_view(result))


@plan_app.command("show")
def plan_show(
    step: Annotated[int, typer.Option(help="the step")],
    run: Run = None,
    rank: Annotated[str, typer.Option(metavar="R/N", help="only the rows of rank R of N")] = "0/1",
    limit: Annotated[int, typer.Option(help="rows to print")] = 32,
    as_json: AsJson = False,
) -> None:
    """The rows of a step, in order. The same on every machine, for any number of ranks."""
    from mixwright.data_mixing.plan import rank_positions
    from mixwright.launch import mix_tables
    from mixwright.launch.runs import find_run, open_history

    _, history = open_history(find_run(run))
    genesis, plan = history.genesis, history.plan()
    check_step(step, genesis.num_steps)
    positions = rank_positions(genesis.rows_per_step, *parse_rank(rank))
    refs, names = plan.rows(step, positions), [domain.name for domain in genesis.domains]
    digest = f"{plan.digest(step):016x}"
    if as_json:
        numbers = zip(
            refs.position_n.tolist(), refs.domain_n.tolist(), refs.epoch_n.tolist(), refs.row_n.tolist(), strict=True
        )
        rows = [{"position": p, "domain": names[d], "epoch": e, "row": r} for p, d, e, r in numbers]
        typer.echo(json.dumps({"step": step, "policy": plan.policy_lsn(step), "digest": digest, "rows": rows}))
        return
    title = f"step {step}, policy {plan.policy_lsn(step)}, digest of the whole step {digest}"
    mix_tables.console().print(mix_tables.rows_view(names, refs, title, limit))


@plan_app.command("trace")
def plan_trace(
    what: Annotated[str, typer.Argument(metavar="DOMAIN:ROW")],
    run: Run = None,
    until: Annotated[int | None, typer.Option(help="look at steps before this one (default: the run's end)")] = None,
    as_json: AsJson = False,
) -> None:
    """The steps that read a row, under the commits so far."""
    from mixwright.data_mixing.trace import trace
    from mixwright.launch import mix_tables
    from mixwright.launch.runs import find_run, open_history

    _, history = open_history(find_run(run))
    genesis = history.genesis
    domain, row = parse_row(what, {d.name: (i, d.num_rows) for i, d in enumerate(genesis.domains)})
    until_step = genesis.num_steps if until is None else until
    check_step(until_step - 1, genesis.num_steps)
    uses = list(trace(history.plan(), domain, row, until_step))
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(use) for use in uses]))
    else:
        mix_tables.console().print(mix_tables.uses_view(uses, f"{what} in steps 0 to {until_step - 1}"))


def preview(run_dir: Path, document: dict[str, Any], as_json: bool) -> None:
    """What a policy would do: its mixture beside the one in force, and the forecast to the run's end."""
    from mixwright.data_mixing.acceptance import accept
    from mixwright.data_mixing.deciding import cost_remarks
    from mixwright.data_mixing.forecast import expected_commits, mixture_change, remarks
    from mixwright.data_mixing.forecast import forecast as forecast_run
    from mixwright.launch import mix_tables
    from mixwright.launch.runs import open_history

    _, history = open_history(run_dir)
    genesis, lsn = history.genesis, history.last_lsn + 1
    before = expected_commits(history)
    policy = accept(document, genesis, history=history)
    after = expected_commits(history, (lsn, policy))
    step = next(commit.effective_step for commit in after if commit.lsn == lsn)
    changes = mixture_change(genesis, before, after, step)
    result = forecast_run(genesis, after, step, genesis.num_steps)
    notes = remarks(genesis, after, lsn) + cost_remarks(policy, genesis)
    if as_json:
        tree = {"step": step, "mixture": [dataclasses.asdict(change) for change in changes], "remarks": notes}
        typer.echo(json.dumps({**tree, "forecast": dataclasses.asdict(result)}))
        return
    mix_tables.console().print(mix_tables.change_view(changes, step), mix_tables.forecast_view(result))
    for note in notes:
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


def check_step(step: int, num_steps: int) -> None:
    """Raise ConfigError unless `step` is in the run."""
    if not 0 <= step < num_steps:
        raise ConfigError(f"step {step} is not in the run, which has steps 0 to {num_steps - 1}")


def parse_rank(text: str) -> tuple[int, int]:
    """`3/8` as (3, 8); raises ConfigError."""
    rank, separator, size = text.partition("/")
    if not (separator and rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise ConfigError(f"--rank: expected R/N with 0 <= R < N, e.g. 3/8, found {text!r}")
    return int(rank), int(size)


def parse_row(text: str, domains: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """`code:17` as (index of the domain, 17), given (index, number of rows) by name; raises ConfigError."""
    name, _, row = text.rpartition(":")
    if name not in domains:
        raise ConfigError(f"{text}: expected DOMAIN:ROW, found domain {name!r}{nearest(name, domains)}")
    index, num_rows = domains[name]
    if not row.isdecimal() or int(row) >= num_rows:
        raise ConfigError(f"{text}: domain {name!r} has rows 0 to {num_rows - 1}, found row {row!r}")
    return index, int(row)
