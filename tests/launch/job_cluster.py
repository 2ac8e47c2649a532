"""A Ray head of `ray start` with a dashboard and a token, as others would have started it; it can be killed and
started again at the same addresses."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from mixwright.data_mixing.errors import ServiceUnavailable
from mixwright.launch.jobs_api import JobsApi, connect

START_TIMEOUT_S = 600
STARTED = "Ray runtime started"
DRIVER, RANK = "mixwright.launch.cluster_job", "mixwright.launch.cluster_rank"


class JobCluster:
    """Addresses and token stay the same over restarts; everything else of a head is lost with it."""

    def __init__(self, folder: Path) -> None:
        self.token_path = folder / "token"
        self.token_path.write_text(secrets.token_hex(32))
        self._port, self._dashboard_port, self._client_port = free_ports(3)
        self.url, self.address = f"http://127.0.0.1:{self._dashboard_port}", f"127.0.0.1:{self._port}"
        self._ray_folder = tempfile.mkdtemp(prefix="mw-", dir="/tmp")  # Ray's socket paths allow for a short one only
        self._process: subprocess.Popen[bytes] | None = None

    def environment(self) -> dict[str, str]:
        """Where a client finds the token."""
        return {"RAY_AUTH_TOKEN_PATH": str(self.token_path)}

    def start(self) -> None:
        """Returns when jobs are listed."""
        command = [
            str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={self._port}",
            "--num-cpus=2", "--include-dashboard=true", f"--dashboard-port={self._dashboard_port}",
            "--dashboard-agent-listen-port=0", "--dashboard-agent-grpc-port=0", "--min-worker-port=0",
            "--max-worker-port=0", f"--ray-client-server-port={self._client_port}", "--object-store-memory=80000000",
            "--disable-usage-stats", f"--temp-dir={self._ray_folder}",
        ]  # fmt: skip
        # The two switches save processes of Ray's that a test has no use for; two cores start enough of them.
        settings = {
            **self.environment(), "RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
            "RAY_TRAIN_METRICS_ENABLED": "0", "RAY_raylet_start_wait_time_s": str(START_TIMEOUT_S),
        }  # fmt: skip
        log = self.token_path.with_name(f"head-{secrets.token_hex(3)}.log")
        with log.open("w") as file:
            self._process = subprocess.Popen(command, env=os.environ | settings, stdout=file, stderr=file)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (STARTED in log.read_text() and self._lists_jobs()):
            assert self._process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)

    def _lists_jobs(self) -> bool:
        try:
            self.api()
        except ServiceUnavailable:
            return False
        return True

    def api(self) -> JobsApi:
        return connect(self.url, self.environment())

    def kill(self) -> None:
        """kill -9 of the head with everything that it has started itself."""
        assert self._process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            head = psutil.Process(self._process.pid)
            for one in [*head.children(recursive=True), head]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.send_signal(signal.SIGKILL)
        self._process.wait()

    def remove(self) -> None:
        if self._process is not None:
            self.kill()
        shutil.rmtree(self._ray_folder, ignore_errors=True)


@contextlib.contextmanager
def job_cluster(folder: Path) -> Iterator[JobCluster]:
    cluster = JobCluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.remove()


def processes_of(module: str, run: str) -> list[psutil.Process]:
    """The driver or the ranks (in their order) of a run's jobs on this machine."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            if module in (process.info["cmdline"] or []) and run in process.environ().get("MIXWRIGHT_JOB", ""):
                found[int(process.environ().get("RANK", "0"))] = process
    return [found[rank] for rank in sorted(found)]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
