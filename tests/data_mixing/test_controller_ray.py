"""The controller in real Ray clusters: a private one, and one that was started by `ray start`; both get killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from mixwright.data_mixing.client import MixingClient
from mixwright.data_mixing.control import MixingController
from mixwright.data_mixing.entries import PolicyEntry
from mixwright.data_mixing.errors import PolicyRejected, ServiceUnavailable
from mixwright.data_mixing.journal import read_entries
from mixwright.data_mixing.service import (
    ServiceRecord,
    has_host,
    read_record,
    service_status,
    start_service,
    stop_service,
)
from tests.data_mixing.live_run import wait_until
from tests.data_mixing.run_cases import TrainerSide

pytestmark = pytest.mark.ray

CODE = {"kind": "static", "mixture": {"code": 1}}
START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Served:
    """A run, its service's record and a client of it."""

    trainer: TrainerSide
    record: ServiceRecord
    client: MixingClient

    @property
    def run_dir(self) -> Path:
        return self.trainer.run_dir


def serve(run_dir: Path, address: str | None = "local", watch_pid: int | None = None) -> Served:
    """Start the service of a new or present run and wait until it is ready."""
    status = start_service(run_dir, address=address, watch_pid=watch_pid).wait(START_TIMEOUT_S)
    assert status.state == "ready", status.message
    record = read_record(run_dir)
    assert record is not None
    return Served(TrainerSide(run_dir), record, MixingClient(run_dir, timeout_s=60))


def new_run(folder: Path, name: str) -> Path:
    """The folder of a run that has begun."""
    TrainerSide(folder / name)
    return folder / name


def mix(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The real command."""
    command = [sys.executable, "-m", "mixwright.launch.cli", "mix", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)


def policies_of(run_dir: Path, request_id: str) -> list[int]:
    """Entries of the policies that a request led to."""
    return [
        entry.lsn
        for entry in read_entries(run_dir / "journal")
        if isinstance(entry.body, PolicyEntry) and entry.body.request_id == request_id
    ]


def folder_of(record: ServiceRecord) -> Path:
    """Where a private Ray has its files."""
    assert record.ray_folder is not None
    return record.ray_folder


def child_of(host_pid: int, name: str) -> psutil.Process:
    """The descendant of a host process with `name` in its command line."""
    return next(p for p in psutil.Process(host_pid).children(recursive=True) if name in " ".join(p.cmdline()))


@pytest.fixture(scope="module")
def private_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    run_dir = new_run(tmp_path_factory.mktemp("private"), "exp")
    yield run_dir
    stop_service(run_dir)


@pytest.fixture
def private(private_run: Path) -> Served:
    """A run whose service has a private Ray; the tests share it, and one that was killed is started again."""
    return serve(private_run)


@dataclass(frozen=True)
class Cluster:
    """A cluster of `ray start --head` with token authentication, as somebody else would have started it."""

    address: str
    token_path: Path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tempfile.mkdtemp(prefix="mw-", dir="/tmp")  # Ray's socket paths allow for a short one only
    token_path = tmp_path_factory.mktemp("cluster") / "token"
    token_path.write_text(secrets.token_hex(32))
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=1",
               "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}"]  # fmt: skip
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_path)}
    process = subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True)
    address = ""
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"--address='([^']+)'", line):
            address = found[1]
            break
    yield Cluster(address, token_path)
    descendants = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    process.communicate(timeout=100)  # Ray drains its node for up to 30 s
    for descendant in descendants:
        with contextlib.suppress(psutil.NoSuchProcess):
            descendant.kill()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def with_token(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, for a user who was given its token."""
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(cluster.token_path))
    return cluster


def test_verbs_reach_the_actor_and_errors_come_back(private: Served) -> None:
    lsn = private.client.submit(CODE | {"why": "try"})["lsn"]
    assert private.trainer.read().policies[lsn].why == "try"
    with pytest.raises(PolicyRejected, match="did you mean 'code'"):
        private.client.submit("kind: static\nmixture: {cod: 1}")
    assert private.client.status()["pending"][0]["lsn"] == lsn
    private.client.cancel(lsn)
    assert lsn not in dict(private.trainer.read().pending())


def test_a_submitted_policy_takes_effect_at_the_step_that_the_trainer_commits(private: Served, tmp_path: Path) -> None:
    policy, trainer = tmp_path / "policy.yaml", private.trainer
    policy.write_text(json.dumps(CODE | {"why": "from the command"}))

    def commit_when_proposed() -> None:
        wait_until(lambda: [p for _, p in trainer.read().pending() if p.why == "from the command"])
        trainer.commit(trainer.history.pending()[-1][0], 40)

    committing = threading.Thread(target=commit_when_proposed)
    committing.start()
    done = mix("submit", str(policy), "--run", str(private.run_dir), "--author", "ann", "--wait")
    committing.join()
    assert (done.returncode, done.stderr) == (0, "")
    lsn = trainer.history.commits[-1].lsn
    assert done.stdout.splitlines() == [
        f"policy {lsn} is accepted",
        "  these domains get 0: wiki, web-a, web-b",
        f"policy {lsn} is committed: it takes effect at step 40",
    ]
    assert trainer.history.policies[lsn].author == "ann"


def test_kill_9_of_the_actor_loses_and_doubles_nothing(private: Served) -> None:
    before = private.client.ping()
    lsn = private.client.submit(CODE, "kill-1")["lsn"]
    os.kill(before["pid"], signal.SIGKILL)
    assert private.client.submit(CODE, "kill-1")["lsn"] == lsn
    after = private.client.ping()
    assert (after["pid"] != before["pid"], after["holder"]) == (True, before["holder"])
    assert policies_of(private.run_dir, "kill-1") == [lsn]


@pytest.mark.parametrize("delay_s", [0.9, 1.5])
def test_a_submit_in_flight_when_the_actor_is_killed_is_journaled_once(private: Served, delay_s: float) -> None:
    request_id, pid = f"flight-{delay_s}", private.client.ping()["pid"]
    killer = threading.Timer(delay_s, os.kill, (pid, signal.SIGKILL))
    killer.start()
    lsn = private.client.submit(CODE, request_id)["lsn"]
    killer.join()
    assert policies_of(private.run_dir, request_id) == [lsn]


def test_a_frozen_actor_costs_the_caller_its_time_limit_and_no_more(private: Served) -> None:
    pid = private.client.ping()["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        with pytest.raises(ServiceUnavailable, match=r"submit: .*no answer.* within"):
            MixingClient(private.run_dir, timeout_s=4).submit(CODE, "frozen")
        assert time.monotonic() - started < 6
    finally:
        os.kill(pid, signal.SIGCONT)
    lsn = private.client.submit(CODE, "frozen")["lsn"]
    assert policies_of(private.run_dir, "frozen") == [lsn]


def test_a_private_ray_listens_on_the_loopback_interface_only(private: Served) -> None:
    host = psutil.Process(private.record.pid)
    listening = [
        connection.laddr.ip
        for process in [host, *host.children(recursive=True)]
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 3
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


FOREIGN = """
import os, sys
import ray
from ray._raylet import GcsClient
if os.getuid() == 0:
    os.setgid(65534); os.setuid(65534)
for path in sys.argv[2:]:
    try:
        open(path).read(); print("read", path)
    except PermissionError:
        print("denied")
try:
    GcsClient(address=sys.argv[1]); print("accepted")
except ray.exceptions.AuthenticationError:
    print("refused")
"""


@pytest.mark.parametrize("token", [None, "0" * 64])
def test_another_user_of_the_machine_is_refused_by_a_private_ray(private: Served, token: str | None) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": "/nonexistent"}
    if token:
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    paths = [str(private.record.token_path)] if os.getuid() == 0 else []
    command = [sys.executable, "-c", FOREIGN, private.record.address, *paths]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["denied"] * len(paths) + ["refused"]


def test_the_secret_is_in_its_file_and_nowhere_else(private: Served) -> None:
    token_path = private.record.token_path
    assert token_path is not None
    assert token_path.stat().st_mode & 0o777 == 0o600
    assert token_path.parent.stat().st_mode & 0o777 == 0o700
    token = token_path.read_text()
    host = psutil.Process(private.record.pid)
    command_lines = [" ".join(process.cmdline()) for process in [host, *host.children(recursive=True)]]
    files = [path.read_text(errors="replace") for path in private.run_dir.rglob("*") if path.is_file()]
    assert not any(token in text for text in command_lines + files)


def test_a_second_host_of_a_run_leaves_the_first_alone(private: Served) -> None:
    assert start_service(private.run_dir, address="local", watch_pid=None).wait(10).state == "ready"
    command = [sys.executable, "-m", "mixwright.launch.mixing_host", "--run", str(private.run_dir)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (second.returncode, "has a mixing service already" in second.stderr) == (0, True)
    assert read_record(private.run_dir) == private.record


@pytest.mark.slow
def test_kill_9_of_host_and_of_gcs_leave_a_clear_error_and_a_run_that_can_be_served_again(
    private: Served, tmp_path: Path
) -> None:
    run_dir, policy = private.run_dir, tmp_path / "policy.yaml"
    policy.write_text(json.dumps(CODE))
    lsn = private.client.submit(CODE, "before")["lsn"]
    os.kill(private.record.pid, signal.SIGKILL)
    done = mix("submit", str(policy), "--run", str(run_dir))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1)
    assert done.stderr.startswith("error: the mixing service of run 'exp' was killed; start it with `mixwright mix up ")

    assert mix("up", "--run", str(run_dir), "--address", "local").returncode == 0
    record = read_record(run_dir)
    assert record is not None
    assert not folder_of(private.record).exists()
    assert private.client.submit(CODE, "before")["lsn"] == lsn

    child_of(record.pid, "gcs_server").kill()
    started = time.monotonic()
    done = mix("submit", str(policy), "--run", str(run_dir), "--timeout", "15")
    assert time.monotonic() - started < 20
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    wait_until(lambda: not has_host(run_dir))
    assert "no Ray at" in service_status(run_dir).message
    assert not folder_of(record).exists()


@pytest.mark.slow
def test_kill_9_of_the_raylet_costs_the_caller_its_time_limit_and_down_clears_up(
    private: Served, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(json.dumps(CODE))
    child_of(private.record.pid, "raylet/raylet").kill()
    started = time.monotonic()
    done = mix("submit", str(policy), "--run", str(private.run_dir), "--timeout", "8")
    assert time.monotonic() - started < 15
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1)
    assert done.stderr.startswith("error: submit: ")
    assert mix("down", "--run", str(private.run_dir)).returncode == 0
    assert not has_host(private.run_dir)
    assert not folder_of(private.record).exists()


def test_a_cluster_that_others_started_is_used_with_its_token(with_token: Cluster, tmp_path: Path) -> None:
    run_dir = new_run(tmp_path, "attached")
    assert mix("up", "--run", str(run_dir), "--address", with_token.address).returncode == 0
    record = read_record(run_dir)
    assert record is not None
    assert (record.private, record.address, record.token_path) == (False, with_token.address, with_token.token_path)
    lsn = MixingClient(run_dir).submit(CODE)["lsn"]

    # The actor outlives its host process, is found by the next one, and ends by `mix down` even without a host.
    os.kill(record.pid, signal.SIGKILL)
    wait_until(lambda: not has_host(run_dir))
    assert MixingClient(run_dir).submit(CODE)["lsn"] == lsn + 1
    assert mix("up", "--run", str(run_dir), "--address", with_token.address).returncode == 0
    again = read_record(run_dir)
    assert again is not None
    os.kill(again.pid, signal.SIGKILL)
    wait_until(lambda: not has_host(run_dir))
    assert mix("down", "--run", str(run_dir)).returncode == 0
    with pytest.raises(ServiceUnavailable, match="has ended"):
        MixingClient(run_dir).ping()


@pytest.mark.parametrize("token", ["", "0" * 64])
def test_a_cluster_refuses_a_missing_or_wrong_token_at_once_with_the_remedy(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    run_dir = new_run(tmp_path, "refused")
    started = time.monotonic()
    status = start_service(run_dir, address=cluster.address, watch_pid=None).wait(60)
    assert time.monotonic() - started < 15
    assert status.state == "failed"
    assert f"the Ray cluster at {cluster.address} refuses our token: put the cluster's token" in status.message


def test_token_mode_without_a_token_is_said_before_ray_aborts_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    status = start_service(new_run(tmp_path, "tokenless"), watch_pid=None).wait(60)
    assert "RAY_AUTH_MODE=token, but there is no token: put" in status.message


def test_a_run_of_the_same_name_in_another_folder_is_refused(with_token: Cluster, tmp_path: Path) -> None:
    first = serve(new_run(tmp_path / "ann", "exp"), with_token.address)
    status = start_service(new_run(tmp_path / "bob", "exp"), address=with_token.address, watch_pid=None).wait(60)
    assert status.state == "failed"
    assert f"actor 'mixing/exp' of this cluster serves {first.run_dir / 'journal'}" in status.message
    stop_service(first.run_dir)


def test_a_controller_whose_lease_was_taken_ends_and_says_who_took_it(with_token: Cluster, tmp_path: Path) -> None:
    older = serve(new_run(tmp_path, "fenced"), with_token.address)
    newer = MixingController(older.run_dir / "journal", "controller-newer")
    with pytest.raises(ServiceUnavailable):
        older.client.submit(CODE, "late")
    assert policies_of(older.run_dir, "late") == []
    wait_until(lambda: not has_host(older.run_dir))
    assert "another controller, controller-newer, has taken over the run" in service_status(older.run_dir).message
    assert newer.submit(CODE, "on-time")["lsn"] == policies_of(older.run_dir, "on-time")[0]


def test_a_service_ends_with_its_trainer_and_one_that_was_started_by_hand_stays(
    with_token: Cluster, tmp_path: Path
) -> None:
    run_dir, trainer = new_run(tmp_path, "watched"), subprocess.Popen(["sleep", "120"])
    start_service(run_dir, address=with_token.address, watch_pid=trainer.pid)
    by_hand = serve(new_run(tmp_path, "by-hand"), with_token.address)
    assert start_service(run_dir, watch_pid=trainer.pid).wait(60).state == "ready"
    trainer.kill()
    trainer.wait()
    start_service(by_hand.run_dir).stop()
    # A trainer that comes back within the grace time finds the service.
    adopted = start_service(run_dir)
    assert adopted.poll().state == "ready"
    adopted.stop()
    assert not has_host(run_dir)
    assert service_status(by_hand.run_dir).state == "ready"
    stop_service(by_hand.run_dir)


def test_a_service_ends_when_its_trainer_has_been_gone_for_the_grace_time(with_token: Cluster, tmp_path: Path) -> None:
    run_dir = new_run(tmp_path, "orphan")
    (run_dir / "service.watch").write_text("{}")
    command = [sys.executable, "-m", "mixwright.launch.mixing_host", "--run", str(run_dir), "--address",
               with_token.address, "--watch", "--grace", "0.5"]  # fmt: skip
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
    assert "its trainer is gone" in service_status(run_dir).message


def test_ray_that_cannot_start_is_one_clear_error_and_exit_3(tmp_path: Path) -> None:
    run_dir = new_run(tmp_path, "broken")
    command = f"ulimit -n 40; exec {sys.executable} -m mixwright.launch.mixing_host --run {run_dir} --address local"
    environment = os.environ | {"RAY_gcs_server_port_wait_time_s": "2"}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, timeout=90, check=False)
    assert done.returncode == 3
    status = service_status(run_dir)
    assert status.state == "failed"
    assert "Ray cannot be started: " in status.message
    assert "\n" not in status.message
    assert list((run_dir / "logs" / "ray").glob("gcs_server*"))
    record = read_record(run_dir)
    assert record is not None
    assert not folder_of(record).exists()
