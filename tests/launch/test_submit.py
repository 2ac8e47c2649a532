"""Stages as jobs of a real Ray cluster: refused before anything is sent, or kept going whatever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixwright.data_mixing.config_file import validate
from mixwright.data_mixing.errors import ConfigError
from mixwright.data_mixing.plan import run_digest
from mixwright.launch import cli
from mixwright.launch.job_manifest import (
    MAX_BYTES,
    VARIABLE,
    JobManifest,
    Resources,
    make_manifest,
    read_manifest,
    submission_id,
)
from mixwright.launch.job_stages import STAGES
from tests.launch.job_cluster import DRIVER, RANK, JobCluster, job_cluster, processes_of
from tests.pretrain.jobs import BIN, digests, history_of, metrics, write_config
from tests.pretrain.tiny import tiny_tree

NUM_STEPS = 400
PATIENCE_S = 600.0


def manifest_of(path: Path, *overrides: str, **changes: Any) -> JobManifest:
    settings = {"resources": Resources(ranks=2), "retries": 3, "stop_seconds": 60, **changes}
    return make_manifest("pretrain", path, overrides, **settings)


def test_a_manifest_says_the_same_from_any_folder(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    tree = tiny_tree(Path("runs"), Path("store"), mixing__policy="policy.yaml", model__path="model")
    del tree["model"]["config"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump({"kind": "temperature", "temperature": 2.0}))
    monkeypatch.chdir(tmp_path)
    manifest = manifest_of(Path("run.yaml"), "training.num_steps=7", "model.gradient_checkpointing=true")
    monkeypatch.chdir("/")
    config = validate(STAGES["pretrain"].model, read_manifest(manifest.to_environment()).config, "sent")
    assert config.run_dir == manifest.run_dir == tmp_path / "runs" / "tiny"
    assert config.data.store == tmp_path / "store"
    assert config.model.path == str(tmp_path / "model")
    assert config.mixing.policy == {"kind": "temperature", "temperature": 2.0}
    assert (config.training.num_steps, config.model.gradient_checkpointing) == (7, True)


def test_attempts_share_the_run_and_nothing_else(tmp_path: Path) -> None:
    path = write_config(tmp_path, tiny_tree(tmp_path / "runs", tmp_path / "store"))
    one, other = manifest_of(path), manifest_of(path, "run.name=other")
    assert one.run.startswith("tiny-")
    assert one.run != other.run
    assert manifest_of(path, "run.folder=elsewhere").run != one.run
    assert len({submission_id(one.run, 1) for _ in range(20)}) == 20
    assert manifest_of(path, retries=9).digest == one.digest
    assert manifest_of(path, "optimizer.lr=1").digest != one.digest
    assert manifest_of(path, resources=Resources(ranks=3)).digest != one.digest


def test_a_manifest_that_does_not_fit_or_is_damaged_is_refused(tmp_path: Path) -> None:
    mixture = {f"a-rather-long-name-of-a-domain-{number}": 1 for number in range(3000)}
    tree = tiny_tree(tmp_path / "runs", tmp_path / "store", mixing__policy={"kind": "static", "mixture": mixture})
    with pytest.raises(ConfigError, match=f"{MAX_BYTES:,} travel with a job: name domains"):
        manifest_of(write_config(tmp_path, tree)).to_environment()
    with pytest.raises(ConfigError, match="is not set: this is the inside of a cluster job"):
        read_manifest({})
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_manifest({VARIABLE: "{"})
    with pytest.raises(ConfigError, match="stage: input should be 'rpo', 'pretrain' or 'distill'"):
        read_manifest(
            {VARIABLE: json.dumps({"stage": "pretrian", "run": "x", "run_dir": "/x", "config": {}, "code": ""})}
        )


@pytest.mark.parametrize("stage", STAGES)
def test_examples_of_every_stage_come_back_as_they_were_sent(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parents[2]
    monkeypatch.chdir(root)
    example = {"rpo": "rpo/example.yaml", "pretrain": "quickstart.yaml", "distill": "ensemble/distill.yaml"}[stage]
    manifest = make_manifest(stage, Path("configs") / example, [], Resources(), 3, 60)
    received = read_manifest(manifest.to_environment())
    config = validate(STAGES[stage].model, received.config, "sent")
    assert config.model_dump(mode="json") == received.config
    assert STAGES[stage].run_dir(config) == received.run_dir
    assert received.run_dir.is_relative_to(root)


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobCluster]:
    with job_cluster(tmp_path_factory.mktemp("cluster")) as found:
        yield found


@pytest.fixture
def mixwright(cluster: JobCluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`mixwright submit ...` against the cluster, in this process: exit code, standard output, standard error."""
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(cluster.token_path))

    def run(*words: str, address: str = cluster.url) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mixwright", "submit", *words, "--address", address])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return (ended.value.code if isinstance(ended.value.code, int) else 0), captured.out, captured.err

    return run


def supervise(cluster: JobCluster, config: Path, log: Path, *options: str) -> subprocess.Popen[str]:
    """`mixwright submit pretrain` in a process of its own, which appends to `log`."""
    command = [str(BIN / "mixwright"), "submit", "pretrain", str(config), "--address", cluster.url, *options]
    with log.open("w") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, text=True, env=os.environ | cluster.environment()
        )


def wait_for(condition: Callable[[], bool], what: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}:\n{log.read_text()[-4000:]}"
        time.sleep(0.05)


def finish(supervisor: subprocess.Popen[str]) -> int:
    return supervisor.wait(timeout=PATIENCE_S)


def last_step(run_dir: Path) -> int:
    return max((record["step"] for record in metrics(run_dir, "step")), default=0)


@pytest.mark.ray
def test_what_is_wrong_is_said_before_anything_is_sent(
    cluster: JobCluster, mixwright: Command, tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = str(write_config(tmp_path, tiny_tree(tmp_path / "runs", tiny_store)))
    code, _, error = mixwright("pretrain", config, "training.num_stps=3")
    assert (code, "training.num_stps: unknown key; did you mean 'num_steps'?" in error) == (2, True)
    assert mixwright("pretrain", config, "--workers", "0")[0] == 2
    assert mixwright("rpo", config)[0] == 2
    assert mixwright("distill", str(tmp_path / "no.yaml"))[0] == 2
    code, _, error = mixwright("stop", "tiny")
    assert (code, "the cluster knows no job 'tiny'" in error) == (2, True)
    for words in (["pretrain", config], ["list"]):
        for address in (cluster.url, cluster.address):
            monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
            code, out, error = mixwright(*words, address=address)
            assert (code, out) == (3, "")
            assert error.startswith("error: the Ray cluster at")
            assert "refuses our token" in error
            assert "ray get-auth-token" in error
            assert error.count("\n") == 1
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, error = mixwright("pretrain", config)
    assert (code, "refuses our token (Unauthorized: Missing authentication token)" in error) == (3, True)
    assert cluster.api().jobs() == []


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_outlives_its_head_its_ranks_and_its_users(
    cluster: JobCluster, mixwright: Command, tiny_store: Path, tmp_path: Path
) -> None:
    """One run in three jobs: lost with its head; with a rank killed, then stopped by a user; done by one rank."""
    log, run_dir = tmp_path / "log.txt", tmp_path / "runs" / "tiny"
    tree = tiny_tree(
        tmp_path / "runs", tiny_store, training__num_steps=NUM_STEPS, training__rows_per_step=32, evaluation__every=0
    )
    config = write_config(tmp_path, tree)

    # Sent by one command, followed by another one, which sends it again after its head is lost.
    code, job, error = mixwright("pretrain", str(config), "--workers", "2", "--detach")
    assert (code, job.startswith("tiny-")) == (0, True), error
    supervisor = supervise(cluster, config, log, "--workers", "2")
    wait_for(lambda: "Running entrypoint" in log.read_text(), "the first job to run", log)
    code, _, error = mixwright("pretrain", str(config))
    assert (code, "is under way as job" in error) == (2, True), "another number of ranks"
    cluster.kill()
    wait_for(lambda: not processes_of(DRIVER, "tiny"), "the job's process to end with its head", log)
    cluster.start()

    wait_for(lambda: last_step(run_dir) >= 20, "steps of the second job", log)
    killed_at = last_step(run_dir)
    processes_of(RANK, "tiny")[1].send_signal(signal.SIGKILL)
    wait_for(lambda: "resuming after step" in log.read_text(), "the ranks to be started again", log)
    wait_for(lambda: last_step(run_dir) >= killed_at + 20, "further steps", log)
    code, out, _ = mixwright("stop", "tiny")
    assert (code, "is stopping" in out) == (0, True)
    assert finish(supervisor) == 75
    printed, stopped_at = log.read_text(), last_step(run_dir)
    assert f"following job {job.strip()}" in printed
    assert "its head was started anew" in printed
    assert "2 rank(s)" in printed
    assert "ended with signal SIGKILL" in printed
    assert printed.count("submitted job") == 1, "Ray Train, not the supervisor, started the ranks again"
    assert "the same command goes on from its checkpoint" in printed
    assert (run_dir / "checkpoints" / f"step-{stopped_at:08}").is_dir()

    done = supervise(cluster, config, log)
    assert finish(done) == 0, log.read_text()[-4000:]
    assert f"resuming after step {stopped_at}" in log.read_text()
    history = history_of(run_dir)
    assert [len(history.plan().commits), len(digests(run_dir))] == [1, NUM_STEPS]
    assert history.end is not None
    assert history.end.digest == digests(run_dir)[-1] == f"{run_digest(history.plan(), NUM_STEPS):016x}"

    code, out, _ = mixwright("list", "--json")
    jobs = json.loads(out)
    assert [(job["stage"], job["attempt"], job["status"]) for job in jobs] == [
        ("pretrain", 2, "STOPPED"), ("pretrain", 3, "SUCCEEDED")
    ]  # fmt: skip
    code, out, _ = mixwright("status", "tiny")
    assert (code, "succeeded" in out, f"step {NUM_STEPS}/{NUM_STEPS}" in out) == (0, True, True)
    code, out, _ = mixwright("logs", jobs[0]["job"])
    assert (code, "interrupted; run the same command again" in out) == (0, True)
    code, out, _ = mixwright("stop", "tiny")
    assert (code, "has ended: succeeded" in out) == (0, True)
    told = json.dumps([dict(job.metadata) | {"message": job.message} for job in cluster.api().jobs()])
    assert cluster.token_path.read_text() not in told + printed
