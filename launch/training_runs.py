"""Whole training runs as tasks: each a process tree of its own that ends with its parent, performed once, resumed.

A run's folder says whether it is complete (its journal has an end); its losses are read from its metrics.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mixwright.data_mixing.config_file import StrictModel, load_config, shown_differences
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.manifest import MANIFEST, read_manifest
from mixwright.data_mixing.staging import atomic_file
from mixwright.launch.parent import end_with_parent
from mixwright.launch.ray_tasks import TaskMap, TaskOptions, task_map
from mixwright.pretrain.config import PretrainConfig
from mixwright.pretrain.ensemble.config import ResourcesConfig
from mixwright.pretrain.errors import CheckpointMismatch, RunInUse, TrainingError
from mixwright.pretrain.metrics import read_metrics
from mixwright.pretrain.rundir import DIVERGED, read_history, sole_trainer

SCRIPT = Path(__file__).with_name("pretrain.py")
LAUNCHED = "launch.yaml"
"""What the run was last started with, below its folder."""
LOG = "log.txt"
ATTEMPTS = 3
"""Of a run that asks to be started again (exit code 75) or is killed."""
GOES_ON = (75, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGKILL)
TORCHRUN_FAILED = 1
"""What torchrun makes of any exit code of a rank, 75 and kills among them."""
RELEASE_TIMEOUT_S = 60.0
"""How long a run may still be held by a process that is about to end."""


@dataclass(frozen=True)
class RunResult:
    """What a finished run found, losses in nats per token over all domains; infinite validation: it diverged.

    `seconds` are of its optimizer steps.
    """

    folder: Path
    validation: float
    test: float
    seconds: float


@dataclass(frozen=True)
class Launch:
    """A run to perform and what it takes."""

    config: PretrainConfig
    resources: ResourcesConfig


@contextlib.contextmanager
def run_map(
    num_workers: int, resources: ResourcesConfig, address: str | None = None
) -> Iterator[TaskMap[Launch, RunResult]]:
    """Performs runs `num_workers` at a time as Ray tasks; 0: one after the other from here.

    A lost worker or node costs its own run a restart, from that run's last checkpoint; folders must be shared.
    """
    options = TaskOptions("a training run", num_cpus=resources.cpus, num_gpus=resources.gpus)
    with task_map(perform_run, num_workers, options, address) as map_:
        yield map_


def perform_run(launch: Launch) -> RunResult:
    """The result of a run: read when it is complete, else trained for, going on from its last checkpoint.

    Raises TrainingError with the last line that the run printed when it fails for another reason than divergence.
    """
    found = find_result(launch.config)
    if found is not None:
        return found
    run_dir = launch.config.run_dir
    await_release(run_dir)
    with atomic_file(run_dir / LAUNCHED) as file:
        file.write(yaml.safe_dump(launch.config.model_dump(mode="json"), sort_keys=False).encode())
    for _ in range(ATTEMPTS):
        code = _train(launch)
        if code == 0 or (run_dir / DIVERGED).is_file():
            break
        if not (code in GOES_ON or (code == TORCHRUN_FAILED and launch.resources.ranks > 1)):
            raise TrainingError(f"run {run_dir} ended with exit code {code}: {_last_line(run_dir / LOG)}")
    result = find_result(launch.config)
    if result is None:
        raise TrainingError(f"run {run_dir} did not end in {ATTEMPTS} attempts: {_last_line(run_dir / LOG)}")
    return result


def with_absolute_paths(config: PretrainConfig) -> PretrainConfig:
    """The same run, for a process that may start in another folder or on another node of a shared file system."""
    taught = config.distillation
    changes: dict[str, StrictModel] = {
        "run": config.run.model_copy(update={"folder": config.run.folder.resolve()}),
        "data": config.data.model_copy(update={"store": config.data.store.resolve()}),
    }
    if taught is not None:
        teachers = tuple(path.resolve() for path in taught.teachers)
        cache = None if taught.cache is None else taught.cache.resolve()
        changes["distillation"] = taught.model_copy(update={"teachers": teachers, "cache": cache})
    return config.model_copy(update=changes)


def find_result(config: PretrainConfig) -> RunResult | None:
    """The result of a run that is complete, None when it is not.

    Raises CheckpointMismatch for a run of other settings or text, TrainingError for one without figures.
    """
    run_dir = config.run_dir
    history = read_history(run_dir)
    check_same_launch(config, history)
    if (run_dir / DIVERGED).is_file():
        return RunResult(folder=run_dir, validation=math.inf, test=math.inf, seconds=math.nan)
    if history.end is None:
        return None
    records = read_metrics(run_dir)
    last = {record["kind"]: record for record in records}
    for kind in ("validation", "test"):
        if kind not in last:
            raise TrainingError(f"{run_dir}: complete, but without {kind} losses: remove it to train it anew")
    seconds = sum(record["step_seconds"] for record in records if record["kind"] == "step")
    return RunResult(
        folder=run_dir, validation=_overall(last["validation"]), test=_overall(last["test"]), seconds=seconds
    )


def check_same_launch(config: PretrainConfig, history: RunHistory) -> None:
    """Raise CheckpointMismatch when the run that is there was launched with settings that decide another result."""
    run_dir = config.run_dir
    launched = run_dir / LAUNCHED
    if not history.has_genesis or not launched.is_file():
        return  # nothing has been trained, or it is not known with what
    there, here = _deciding(load_config(PretrainConfig, launched)), _deciding(config)
    if (config.data.store / MANIFEST).is_file():
        there["store"] = history.genesis.store_fingerprint
        here["store"] = read_manifest(config.data.store).fingerprint
    differing = shown_differences(there, here)
    if differing:
        raise CheckpointMismatch(
            f"{run_dir}: was trained with other settings ({differing}): remove that folder to train it anew, "
            "or choose another `folder`"
        )


def _deciding(config: PretrainConfig) -> dict[str, Any]:
    """What decides a run's result: not where it is, how it is shared out, how often it is saved or reported."""
    tree = config.model_dump(
        mode="json",
        exclude={
            "run": {"folder"},
            "data": True,
            "model": {"gradient_checkpointing"},
            "training": {"micro_batch_rows", "num_threads", "zero_stage"},
            "checkpoint": True,
            "metrics": True,
            "deepspeed": True,
        },
    )
    tree["mixing"] = {"policy": tree["mixing"]["policy"]}
    taught = tree["distillation"]
    if taught is not None:  # folders may have moved together; a cache is named by its content
        taught["teachers"] = [Path(path).name for path in taught["teachers"]]
        taught["cache"] = taught["cache"] and Path(taught["cache"]).name
    return tree


def _overall(record: dict[str, dict[str, float]]) -> float:
    """Mean over tokens of all domains."""
    tokens = record["tokens"]
    return sum(loss * tokens[name] for name, loss in record["loss"].items()) / sum(tokens.values())


def _train(launch: Launch) -> int:
    """Start the run's process, wait for it, return its exit code. Its output is appended to the run's log."""
    resources, run_dir = launch.resources, launch.config.run_dir
    command = [str(SCRIPT), "--config", str(run_dir / LAUNCHED)]
    if resources.ranks > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={resources.ranks}", *command]
    threads = str(max(resources.cpus // resources.ranks, 1))
    with (run_dir / LOG).open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": threads}, preexec_fn=end_with_parent,
        )  # fmt: skip
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def await_release(run_dir: Path) -> None:
    """Wait until no process holds the run, as that of a killed parent may for a moment. Raises RunInUse."""
    deadline = time.monotonic() + RELEASE_TIMEOUT_S
    while True:
        try:
            with sole_trainer(run_dir):
                return
        except RunInUse:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    errors = [line for line in lines[-50:] if line.startswith("error:")]
    return (errors or lines or ["it printed nothing"])[-1][:500]
