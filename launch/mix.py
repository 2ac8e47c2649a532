"""`mixwright mix`: steer what a run reads while it trains, and look at what it has read and will read.

`submit`, `cancel`, `hold`, `resume`, `rollback` and `up` need the run's mixing service; everything else reads the
journal and works with Ray down. Exit codes: 0 ok, 2 bad input or rejected, 3 the service is unavailable.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixwright.data_mixing.config_file import read_yaml
from mixwright.data_mixing.errors import ConfigError
from mixwright.launch import mix_online, mix_plan, mix_service, mix_submit
from mixwright.launch.fit import fit
from mixwright.launch.hard_samples import hard_samples
from mixwright.launch.help_text import examples
from mixwright.launch.json_output import plain, print_json
from mixwright.launch.mix_options import AsJson, Run
from mixwright.launch.simulate import simulate

app = typer.Typer(help="Steer what a run reads while it trains, and look at it.", no_args_is_help=True)
for part in (mix_service, mix_submit, mix_online):
    app.add_typer(part.app)
app.add_typer(mix_plan.app, name="plan")


@app.command(
    epilog=examples(
        "mixwright mix status",
        "mixwright mix status --run runs/exp --watch --every 5",
        "mixwright mix status --run runs/exp --json",
    )
)
def status(
    run: Run = None,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="follow it until it is over, or Ctrl-C")] = False,
    every: Annotated[float, typer.Option(min=0.05, help="seconds between two looks at the journal")] = 2.0,
) -> None:
    """Where a run stands: step, policy in force, policies to come, mixture, tokens and losses per domain."""
    from mixwright.data_mixing.run_status import run_status
    from mixwright.data_mixing.service import service_status
    from mixwright.launch import mix_tables
    from mixwright.launch.mix_watch import watch as follow
    from mixwright.launch.runs import find_run, open_history

    run_dir = find_run(run)
    if watch:
        follow(run_dir, every, as_json)
        return
    found = run_status(open_history(run_dir)[1])
    service = service_status(run_dir)
    if as_json:
        print_json({**plain(found), "service": service})
    else:
        mix_tables.console().print(mix_tables.status_view(found, service.message))


@app.command(
    epilog=examples(
        "mixwright mix log", "mixwright mix log --run runs/exp --since 100 --json", "mixwright mix log --verify"
    )
)
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
        num_entries, num_commits = history.last_lsn + 1, history.num_commits
        if as_json:
            print_json({"entries": num_entries, "commits": num_commits})
        else:
            typer.echo(f"{folder}: {num_entries} entries are sound, {num_commits} commits derive the same")
        return
    entries = read_entries(folder, max(since, 0))
    if as_json:
        print_json([entry_record(entry) for entry in entries])
    else:
        mix_tables.console().print(mix_tables.log_view(entries))


@app.command(
    epilog=examples(
        "mixwright mix forecast",
        "mixwright mix forecast policy.yaml --run runs/exp",
        "mixwright mix forecast --until 12000 --json",
    )
)
def forecast(
    policy: Annotated[Path | None, typer.Argument(metavar="[POLICY]", help="as if this were submitted now")] = None,
    run: Run = None,
    until: Annotated[int | None, typer.Option(help="step to look ahead to (default: the run's end)")] = None,
    as_json: AsJson = False,
) -> None:
    """What the run will read: tokens and epochs per domain, and which domain reaches its cap when."""
    from mixwright.data_mixing.acceptance import accept
    from mixwright.data_mixing.forecast import expected_plan
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
    result = forecast_run(expected_plan(genesis, history, new), next_step, until_step)
    if as_json:
        print_json(result)
    else:
        mix_tables.console().print(mix_tables.forecast_view(result))


app.command(
    epilog=examples(
        "mixwright mix simulate configs/policies/odm.yaml --world configs/worlds/linear.yaml --seeds 3",
        "mixwright mix simulate configs/policies/odm.yaml configs/policies/ado.yaml --world configs/worlds/noisy.yaml",
    )
)(simulate)
app.command(
    epilog=examples(
        "mixwright mix fit regmix fit.yaml --out policy.yaml",
        "mixwright mix fit mixing_law fit.yaml --workers 0 --json",
    )
)(fit)
app.command(
    epilog=examples(
        "mixwright mix hard-samples --run runs/exp",
        "mixwright mix hard-samples --run runs/exp --by down-weighted --domain code --count 5",
        "mixwright mix hard-samples --run runs/exp --first-step 1000 --json",
    )
)(hard_samples)
