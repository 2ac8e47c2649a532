"""The examples of configs/cluster: the Slurm script runs for real with two groups of processes for nodes; manifests and
host file say what Kubernetes, KubeRay, DeepSpeed and our own command line take."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from deepspeed.launcher.runner import fetch_hostfile

from mixwright.data_mixing.plan import run_digest
from mixwright.launch.cli import app
from mixwright.pretrain.rundir import read_history
from tests.launch import slurm_stub
from tests.pretrain.jobs import ROOT, TIMEOUT_S, metrics, write_config
from tests.pretrain.tiny import tiny_tree

CLUSTER = ROOT / "configs" / "cluster"
SCRIPT = CLUSTER / "pretrain.sbatch"
NUM_STEPS = 40


# --- Slurm -----------------------------------------------------------------------------------------------------------


def test_the_script_is_bash_and_asks_for_what_it_relies_on() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", SCRIPT.read_text(), re.MULTILINE))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]  # one rank, one GPU
    assert asked["signal"] == "B:TERM@300"
    assert "requeue" in asked


@pytest.fixture
def allocation(tmp_path: Path) -> Iterator[dict[str, str]]:
    """What Slurm sets in a job on two nodes, both this machine, with the stubs on PATH and a token for Ray."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("srun", "scontrol"):
        command = commands / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{slurm_stub.__file__}" {name} "$@"\n')
        command.chmod(0o755)
    (tmp_path / "launch").symlink_to(ROOT / "launch")  # the script is started in the checkout
    token = tmp_path / "token"
    token.write_text("0" * 64)
    yield {
        **os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "PYTHON": sys.executable,
        "REQUEUED": str(tmp_path / "requeued"),
        "RAY_AUTH_TOKEN_PATH": str(token), "SLURM_JOB_ID": str(os.getpid()), "DS_ACCELERATOR": "cpu",
        "SLURM_JOB_NODELIST": "127.0.0.1,localhost", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2",
        "RAY_raylet_start_wait_time_s": "600",
        "CXX": "none",  # ranks of several nodes use gloo: nothing is to be compiled for them
        "SLURM_NTASKS_PER_NODE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error",
    }  # fmt: skip
    shutil.rmtree(f"/tmp/ray-{os.getpid()}", ignore_errors=True)


def start(config: Path, environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        command = [str(SCRIPT), str(config), "training.micro_batch_rows=2"]
        return subprocess.Popen(
            command, cwd=config.parent, env=environment, stdout=file, stderr=file, start_new_session=True
        )


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not any(record["step"] >= step for record in metrics(run_dir, "step")):
        assert process.poll() is None, "the job ended early"
        assert time.monotonic() < deadline, "the job does not train"
        time.sleep(0.1)


@pytest.mark.ray
@pytest.mark.slow
def test_the_script_trains_and_goes_on_with_fewer_ranks(
    tiny_store: Path, tmp_path: Path, allocation: dict[str, str]
) -> None:
    """Two nodes until the time is up; requeued, the job gets one node and ends the run: all of the plan's rows."""
    service = {"mixing__service": "required", "mixing__service_timeout_s": TIMEOUT_S}
    tree = tiny_tree(tmp_path, tiny_store, training__num_steps=NUM_STEPS, checkpoint__every=500, **service)
    config, run_dir, log = write_config(tmp_path, tree), tmp_path / "tiny", tmp_path / "log"
    job = start(config, allocation, log)
    try:
        wait_for_step(run_dir, 3, job)
        job.send_signal(signal.SIGTERM)  # as `--signal=B:TERM` does, to the script alone
        assert job.wait(TIMEOUT_S) == 75, log.read_text()[-3000:]
        assert (tmp_path / "requeued").read_text() == f"{allocation['SLURM_JOB_ID']}\n"
        assert "2 rank(s)" in log.read_text()
        history = read_history(run_dir)
        assert history.checkpoints
        assert history.checkpoints[-1].step < NUM_STEPS

        one_node = {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1", "SLURM_JOB_NODELIST": "127.0.0.1"}
        job = start(config, allocation | one_node | {"SLURM_RESTART_COUNT": "1"}, log)
        assert job.wait(TIMEOUT_S) == 0, log.read_text()[-3000:]
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert "1 rank(s)" in log.read_text()
    assert "resuming after step" in log.read_text()
    end = read_history(run_dir).end
    assert end is not None
    assert end.reason == "complete"
    assert int(end.digest, 16) == run_digest(read_history(run_dir).plan(), NUM_STEPS)


# --- DeepSpeed's launcher --------------------------------------------------------------------------------------------


def test_the_host_file_is_one_of_deepspeed() -> None:
    assert dict(fetch_hostfile(str(CLUSTER / "hostfile"))) == {"node-1": 8, "node-2": 8}


# --- Kubernetes ------------------------------------------------------------------------------------------------------

REQUIRED = {
    "PersistentVolumeClaim": ("accessModes", "resources"),
    "RayCluster": ("headGroupSpec", "rayVersion", "workerGroupSpecs"),
    "Job": ("template",),
}
"""Of `spec`. KubeRay asks for headGroupSpec; for rayVersion where authOptions are given (2.52.0 or newer)."""


def manifests(name: str) -> dict[str, dict[str, Any]]:
    """Documents of a file by their kind."""
    return {tree["kind"]: tree for tree in yaml.safe_load_all((CLUSTER / name).read_text())}


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return manifests("kuberay_cluster.yaml")["RayCluster"]


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return manifests("pretrain_job.yaml")["Job"]


@pytest.fixture(scope="module")
def pods(cluster: dict[str, Any], job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every pod template's `spec`."""
    groups = {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}
    templates = {"head": cluster["spec"]["headGroupSpec"], "supervisor": job["spec"], **groups}
    return {name: owner["template"]["spec"] for name, owner in templates.items()}


@pytest.mark.parametrize("name", ["kuberay_cluster.yaml", "pretrain_job.yaml"])
def test_manifests_have_what_is_required(name: str) -> None:
    for kind, tree in manifests(name).items():
        assert tree["apiVersion"] == {"PersistentVolumeClaim": "v1", "RayCluster": "ray.io/v1", "Job": "batch/v1"}[kind]
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,48}[a-z0-9])?", tree["metadata"]["name"])
        assert set(REQUIRED[kind]) <= set(tree["spec"])


def test_the_cluster_is_as_kuberay_wants_it(cluster: dict[str, Any]) -> None:
    spec = cluster["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert tuple(map(int, spec["rayVersion"].split("."))) >= (2, 60, 0)
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        # Their values become options of `ray start` and must be strings.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_volumes_are_mounted_and_exist(pods: dict[str, dict[str, Any]]) -> None:
    claim = manifests("kuberay_cluster.yaml")["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for name, pod in pods.items():
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounts) == set(volumes), name
        assert mounts["shared"] == "/shared", name
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        if name != "supervisor":
            assert mounts["shm"] == "/dev/shm"
            assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
            limit = container["resources"]["limits"]["memory"]
            assert gibibytes(volumes["shm"]["emptyDir"]["sizeLimit"]) < gibibytes(limit)  # it counts as memory


def test_every_pod_has_the_same_interpreter(pods: dict[str, dict[str, Any]]) -> None:
    assert len({pod["containers"][0]["image"] for pod in pods.values()}) == 1


def test_the_job_asks_for_what_the_cluster_has(cluster: dict[str, Any], pods: dict[str, dict[str, Any]]) -> None:
    parsed = submitted(pods["supervisor"]["containers"][0])
    (group,) = cluster["spec"]["workerGroupSpecs"]
    resources = pods["gpu"]["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"]
    assert parsed["gpus_per_worker"] == 1
    assert parsed["workers"] == group["replicas"] * int(resources["limits"]["nvidia.com/gpu"])
    assert parsed["workers"] * parsed["cpus_per_worker"] <= group["replicas"] * int(resources["limits"]["cpu"])
    assert cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_job_finds_the_cluster_and_its_token(cluster: dict[str, Any], pods: dict[str, dict[str, Any]]) -> None:
    (container,) = pods["supervisor"]["containers"]
    name = cluster["metadata"]["name"]
    ports = {port["name"]: port["containerPort"] for port in pods["head"]["containers"][0]["ports"]}
    assert submitted(container)["address"] == f"http://{name}-head-svc:{ports['dashboard']}"
    assert container["env"] == [
        {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": {"name": name, "key": "auth_token"}}}
    ]


def test_the_job_gives_up_where_the_supervisor_does(job: dict[str, Any], pods: dict[str, dict[str, Any]]) -> None:
    """podFailurePolicy needs pods that are not restarted in place, and names the container."""
    assert pods["supervisor"]["restartPolicy"] == "Never"
    (final,) = [rule for rule in job["spec"]["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    assert final["onExitCodes"] == {"containerName": "supervisor", "operator": "In", "values": [1, 2, 75]}


def submitted(container: dict[str, Any]) -> dict[str, Any]:
    """The options that our command line understands from a container's command; it exits on one that it does not."""
    program, *words = container["command"] + container["args"]
    assert program == "mixwright"
    command: Any = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    parsed: dict[str, Any] = command.make_context("mixwright", words).params
    assert Path(parsed["config"]).is_relative_to("/shared")
    assert (ROOT / "configs" / Path(parsed["config"]).name).is_file()
    return parsed


def gibibytes(text: str) -> int:
    assert text.endswith("Gi")
    return int(text[:-2])
