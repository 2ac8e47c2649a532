"""`mixwright submit`: a stage as a job on a Ray cluster, kept going until it is done.

Exit codes: 0 done, 1 failed for good (training diverged, or attempts no longer bring it on), 2 bad input (nothing was
submitted, or the ranks refused), 3 cluster unreachable or token refused, 75 stopped by a user and resumable, 130 left
by Ctrl-C while the job goes on.
"""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixwright.launch.help_text import examples
from mixwright.launch.job_stages import StageName
from mixwright.launch.json_output import print_json
from mixwright.launch.mix_options import AsJson

if TYPE_CHECKING:
    from mixwright.launch.jobs_api import Job, JobsApi

app = typer.Typer(
    help="Send a stage to a Ray cluster and keep it going; list, follow and stop such jobs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Config = Annotated[Path, typer.Argument(help="the stage's configuration")]
Overrides = Annotated[list[str] | None, typer.Argument(help="changes, as key.sub=value")]
Address = Annotated[
    str | None,
    typer.Option(
        help="the cluster: http://HOST:8265 (its dashboard), HOST:PORT or auto "
        "(default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, else this machine's dashboard)"
    ),
]
Workers = Annotated[int, typer.Option(min=1, help="ranks")]
Cpus = Annotated[int, typer.Option(min=1, help="CPUs of each rank")]
Gpus = Annotated[int, typer.Option(min=0, max=1, help="GPUs of each rank")]
Retries = Annotated[int, typer.Option(min=0, help="how often Ray Train restarts the ranks within a job")]
Restarts = Annotated[int, typer.Option(min=0, help="jobs in a row that may fail without a further step")]
Stall = Annotated[float, typer.Option(min=0, help="stop and submit again after so long without progress; 0: never")]
Unreachable = Annotated[float, typer.Option(min=0, help="give up after the cluster has not answered for so long")]
StopSeconds = Annotated[int, typer.Option(min=1, help="time for the checkpoint of a job that is told to stop")]
Python = Annotated[str, typer.Option(help="the interpreter on the cluster (default: the path of this one)")]
Detach = Annotated[bool, typer.Option("--detach", help="submit once, print the id and return")]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="a submission id, a run id, or a run's name")]


def _stage(stage: StageName, example: str, description: str) -> None:
    """A command that submits `stage`; all stages are submitted alike."""

    @app.command(
        stage,
        help=description,
        epilog=examples(
            f"mixwright submit {stage} {example} --workers 2 --address http://head:8265",
            f"mixwright submit {stage} {example} run.name=second --workers 8 --gpus-per-worker 1 --detach",
        ),
    )
    def submit(
        config: Config,
        overrides: Overrides = None,
        address: Address = None,
        workers: Workers = 1,
        cpus_per_worker: Cpus = 1,
        gpus_per_worker: Gpus = 0,
        retries: Retries = 3,
        restarts: Restarts = 5,
        stall_minutes: Stall = 30.0,
        unreachable_minutes: Unreachable = 60.0,
        stop_seconds: StopSeconds = 300,
        python: Python = sys.executable,
        detach: Detach = False,
    ) -> None:
        from mixwright.launch.job_manifest import Resources, make_manifest
        from mixwright.launch.jobs_api import connect
        from mixwright.launch.supervise import Limits
        from mixwright.launch.supervisor import Supervisor, find_or_send_patiently

        resources = Resources(ranks=workers, cpus_per_rank=cpus_per_worker, gpus_per_rank=gpus_per_worker)
        manifest = make_manifest(stage, config, overrides or [], resources, retries, stop_seconds)
        manifest.to_environment()  # raises when it is too large, before anything is sent
        api = connect(address)
        if detach:
            sent = find_or_send_patiently(api, manifest, python)
            typer.echo(sent.name if not sent.status else f"{sent.name}  (already {sent.status})")
            return
        limits = Limits(restarts=restarts, stall_s=stall_minutes * 60, unreachable_s=unreachable_minutes * 60)
        raise typer.Exit(Supervisor(api, manifest, python, limits, _print).run())


_stage("rpo", "configs/rpo/example.yaml", "Align a model with preferences on a cluster (launch/rpo.py).")
_stage("pretrain", "configs/quickstart.yaml", "Pretrain on a cluster (launch/pretrain.py).")
_stage(
    "distill",
    "configs/ensemble/distill.yaml",
    "Distil teachers into a student on a cluster, what comes before its first step included.",
)


@app.command(
    "list", epilog=examples("mixwright submit list", "mixwright submit list --address http://head:8265 --json")
)
def list_jobs(address: Address = None, as_json: AsJson = False) -> None:
    """Jobs of ours that the cluster knows, the newest last. A head that was started anew knows none of before."""
    from mixwright.launch.jobs_api import connect
    from mixwright.launch.supervisor import RUN, STAGE

    jobs = [job for job in connect(address).jobs() if RUN in job.metadata]
    if as_json:
        print_json([_as_json(job) for job in jobs])
        return
    if not jobs:
        typer.echo("the cluster knows no job of ours")
        return
    longest = max(len(job.submission_id) for job in jobs)
    for job in jobs:  # plain lines: an id that a narrow terminal cuts can be copied nowhere
        stage, status = job.metadata[STAGE], _status(job)
        typer.echo(f"{job.submission_id:<{longest}}  {stage:<8}  {status:<9}  since {_time(job.started_ms)}")


@app.command(epilog=examples("mixwright submit status exp", "mixwright submit status exp --json"))
def status(job: JobName, address: Address = None, as_json: AsJson = False) -> None:
    """One line: the job's status, and the last step that it told."""
    from mixwright.launch.job_log import progress_of
    from mixwright.launch.jobs_api import connect

    api = connect(address)
    found = _find(api, job)
    lines = [line for line in api.log(found.submission_id).splitlines() if progress_of(line) is not None]
    last = f"  {lines[-1]}" if lines else ""
    if as_json:
        print_json({**_as_json(found), "progress": last.strip()})
        return
    typer.echo(f"{found.submission_id}  {_status(found)}  since {_time(found.started_ms)}{last}")


@app.command(epilog=examples("mixwright submit logs exp", "mixwright submit logs exp --follow"))
def logs(
    job: JobName,
    follow: Annotated[bool, typer.Option("--follow", help="until the job ends")] = False,
    address: Address = None,
) -> None:
    """Print what a job's ranks have printed."""
    import time

    from mixwright.launch.job_log import JobLog
    from mixwright.launch.jobs_api import connect
    from mixwright.launch.supervisor import LOOK_INTERVAL_S

    api = connect(address)
    name = _find(api, job).submission_id
    log = JobLog(api, name)
    while follow and (now := api.job(name)) is not None and now.is_live:
        for line in log.lines():
            _print(line)
        time.sleep(LOOK_INTERVAL_S)
    for line in log.rest():
        _print(line)


@app.command(epilog=examples("mixwright submit stop exp", "mixwright submit stop exp --address http://head:8265"))
def stop(job: JobName, address: Address = None) -> None:
    """Ask a job to stop: its ranks write a checkpoint and end. Its supervisor then ends, too, with exit code 75."""
    from mixwright.launch.jobs_api import connect

    api = connect(address)
    found = _find(api, job)
    if not found.is_live:
        typer.echo(
            f"{found.submission_id} has ended: {_status(found)}. A supervisor that may send it again ends by Ctrl-C"
        )
        return
    api.stop(found.submission_id)
    typer.echo(f"{found.submission_id} is stopping; the same `mixwright submit` command goes on from its checkpoint")


def _find(api: JobsApi, name: str) -> Job:
    """The newest job that `name` means: a submission id, a run id, or the name of one run. Raises ConfigError."""
    from mixwright.data_mixing.errors import ConfigError, nearest
    from mixwright.launch.supervisor import RUN

    jobs = [job for job in api.jobs() if RUN in job.metadata]
    exact = [job for job in jobs if name in (job.submission_id, job.metadata[RUN])]
    named = exact or [job for job in jobs if job.metadata[RUN].rpartition("-")[0] == name]
    runs = {job.metadata[RUN] for job in named}
    if len(runs) > 1:
        raise ConfigError(f"{name!r} names {len(runs)} runs of this cluster: {', '.join(sorted(runs))}")
    if not named:
        known = {job.submission_id for job in jobs} | {job.metadata[RUN] for job in jobs}
        raise ConfigError(
            f"the cluster knows no job {name!r}" + (nearest(name, known) if known else "; it has none of ours")
        )
    return named[-1]


def _as_json(job: Job) -> dict[str, Any]:
    from mixwright.launch.supervisor import ATTEMPT, RUN, STAGE

    return {
        "job": job.submission_id,
        "run": job.metadata[RUN],
        "stage": job.metadata[STAGE],
        "attempt": int(job.metadata[ATTEMPT]),
        "status": job.status,
        "exit_code": job.exit_code,
        "started_ms": job.started_ms,
    }


def _status(job: Job) -> str:
    code = "" if job.exit_code in (None, 0) else f" (exit code {job.exit_code})"
    return f"{job.status.lower()}{code}"


def _time(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000).strftime("%Y-%m-%d %H:%M:%S") if milliseconds else "-"


def _print(line: str) -> None:
    print(line, flush=True)
