"""`mixwright mix plan show` and `trace`: the rows that a run reads, from its journal alone."""

from __future__ import annotations

from typing import Annotated

import typer

from mixwright.data_mixing.errors import ConfigError, nearest
from mixwright.launch.help_text import examples
from mixwright.launch.json_output import print_json
from mixwright.launch.mix_options import AsJson, Run

app = typer.Typer(help="Look at the rows that a run reads.", no_args_is_help=True)


@app.command(
    "show",
    epilog=examples(
        "mixwright mix plan show --step 500",
        "mixwright mix plan show --run runs/exp --step 500 --rank 3/8 --limit 100",
        "mixwright mix plan show --step 500 --json",
    ),
)
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
        print_json({"step": step, "policy": plan.policy_lsn(step), "digest": digest, "rows": rows})
        return
    title = f"step {step}, policy {plan.policy_lsn(step)}, digest of the whole step {digest}"
    mix_tables.console().print(mix_tables.rows_view(names, refs, title, limit))


@app.command(
    "trace",
    epilog=examples("mixwright mix plan trace code:17", "mixwright mix plan trace code:17 --until 1000 --json"),
)
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
        print_json(uses)
    else:
        mix_tables.console().print(mix_tables.uses_view(uses, f"{what} in steps 0 to {until_step - 1}"))


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
