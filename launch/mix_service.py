"""`mixwright mix up` and `down`: the mixing service of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixwright.data_mixing.errors import ConfigError, ServiceUnavailable
from mixwright.launch.help_text import examples
from mixwright.launch.json_output import print_json
from mixwright.launch.mix_options import ANSWER_TIMEOUT_S, AsJson, Run

START_TIMEOUT_S = 120.0
STILL_WAITING_S = 10.0

app = typer.Typer()


@app.command(
    epilog=examples(
        "mixwright mix up --run runs/exp",
        "mixwright mix up --run runs/exp --metrics 9464",
        "mixwright mix up --run runs/exp --address 10.0.0.5:6379 --timeout 300",
    )
)
def up(
    run: Run = None,
    address: Annotated[
        str | None, typer.Option(help="a Ray cluster HOST:PORT, auto, or local (default: RAY_ADDRESS, else local)")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="[HOST:]PORT", help="answer Prometheus there (without HOST: on this machine)")
    ] = None,
    timeout: Annotated[float, typer.Option(help="seconds to wait until it is ready")] = START_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Start the mixing service of a run, unless it is there. It stays until `mix down` or the end of the run."""
    from mixwright.data_mixing.service import start_service, wait_for_end
    from mixwright.launch.runs import find_run, open_history

    run_dir = find_run(run)
    _check_metrics(metrics)
    end = open_history(run_dir)[1].end
    if end is not None:
        raise ConfigError(f"{run_dir}: the run is {end.reason} after step {end.step}; it takes no more policies")
    wait_for_end(run_dir, timeout)
    service = start_service(run_dir, address=address, watch_pid=None, metrics=metrics)
    status = service.wait(min(timeout, STILL_WAITING_S))
    if status.state == "starting" and timeout > STILL_WAITING_S:
        typer.echo(f"{status.message}; waiting up to {timeout:g} s", err=True)
        status = service.wait(timeout - STILL_WAITING_S)
    if status.state != "ready":
        raise ServiceUnavailable(status.message)
    _say_ready(run_dir, status.message, metrics, as_json)


def _check_metrics(metrics: str | None) -> None:
    from mixwright.data_mixing.service import listen_address

    try:
        _ = metrics is None or listen_address(metrics)
    except ValueError as error:
        raise ConfigError(f"--metrics: {error}") from None


def _say_ready(run_dir: Path, message: str, metrics: str | None, as_json: bool) -> None:
    from mixwright.data_mixing.service import LOG, read_record

    record = read_record(run_dir)
    if record is None:
        raise ServiceUnavailable(f"{run_dir}: the service's record is gone")
    if metrics is not None and not record.metrics:
        typer.echo(f"the service answers Prometheus nowhere: see {run_dir / LOG}", err=True)
    if as_json:
        print_json({"message": message, **record.model_dump(mode="json", exclude={"message"})})
        return
    typer.echo(message)
    lasts = "it ends with its trainer" if record.watched else "it stays until `mix down` or the end of the run"
    typer.echo(f"actor {record.actor} in namespace {record.namespace}, host process {record.pid}; {lasts}")
    if record.metrics:
        typer.echo(f"metrics at {record.metrics}")


@app.command(epilog=examples("mixwright mix down --run runs/exp"))
def down(
    run: Run = None,
    timeout: Annotated[float, typer.Option(help="seconds to wait")] = ANSWER_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """End the mixing service of a run. Training goes on under the committed policies."""
    from mixwright.launch.runs import find_run

    run_dir = find_run(run)
    had_service, message = _end_service(run_dir, timeout)
    if as_json:
        print_json({"ended": had_service, "message": message})
    else:
        typer.echo(message)


def _end_service(run_dir: Path, timeout: float) -> tuple[bool, str]:
    """Whether there was a service, and what became of it. Raises ServiceUnavailable."""
    from mixwright.data_mixing.client import MixingClient
    from mixwright.data_mixing.service import has_host, read_record, stop_service, write_record

    record = read_record(run_dir)
    if record is None or (not has_host(run_dir) and (record.private or record.state != "ready")):
        return False, f"run {run_dir.name!r} has no mixing service"
    if stop_service(run_dir, timeout):
        return True, f"the mixing service of run {run_dir.name!r} has ended"
    if record.private:
        raise ServiceUnavailable(
            f"the mixing service of run {record.run!r} is on {record.host!r}: run this command there"
        )
    # Its host process is dead or on another machine; the actor lives in the cluster.
    MixingClient(run_dir, timeout).end()
    if not has_host(run_dir):
        write_record(run_dir, record.model_copy(update={"state": "stopped", "message": "it was told to end"}))
    return True, f"controller {record.actor} at {record.address} has ended"
