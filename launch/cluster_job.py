"""The entrypoint of a cluster job: `python -m mixwright.launch.cluster_job`, as `mixwright submit` sends it.

It runs the phases of the manifest's stage under Ray Train, which places the workers and starts them again when one is
lost; a rank goes on from the run's last checkpoint by itself. What a worker does is in `rank_shell`.

Exit codes: 0 done, 2 and 3 as the ranks', 75 stopped after a checkpoint, 76 training failed for good, 70 (or any other)
ended before it was done: submit the same manifest again.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from mixwright.data_mixing.answers import one_line
from mixwright.data_mixing.errors import ConfigError, MixingError
from mixwright.launch.cluster_rank import CRASHED, FAILED, INTERRUPTED, JOB_FAILED
from mixwright.launch.job_manifest import JobManifest, code_version, read_manifest
from mixwright.launch.job_stages import STAGES, Phase
from mixwright.launch.rank_shell import Board, RankConfig, run_shell

LOOK_INTERVAL_S = 0.5
RAY_TRAIN_FOLDER = "ray_train"
"""Below the run's folder: where Ray Train checks that all nodes share the storage."""


class Driver:
    """Runs one manifest in the Ray cluster that this process is a driver of."""

    def __init__(self, manifest: JobManifest) -> None:
        self._manifest = manifest
        self._board = ray.remote(num_cpus=0)(Board).remote()
        self._stop_requested = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop_requested.set())

    def run(self) -> int:
        """All phases, one after the other; returns the exit code."""
        for phase in STAGES[self._manifest.stage].phases:
            code = self._run_phase(phase)
            if code != 0:
                return code
        return 0

    def _run_phase(self, phase: Phase) -> int:
        fitting = Fitting(self._trainer(phase))
        fitting.start()
        while fitting.is_alive():
            fitting.join(LOOK_INTERVAL_S)
            is_attended = self._look()
            if self._stop_requested.is_set() and not is_attended:
                print("stopped: no rank was running", flush=True)
                return INTERRUPTED
        self._look()
        outcome: int | None = ray.get(self._board.outcome.remote())
        if outcome is not None:
            return JOB_FAILED if outcome == FAILED else outcome
        if fitting.failure is not None:
            print(f"error: {phase.name}: {fitting.failure}", flush=True)
            return CRASHED
        return 0

    def _look(self) -> bool:
        """Print what ranks have printed; whether there are any."""
        lines, is_attended = ray.get(self._board.look.remote(self._stop_requested.is_set()))
        for line in lines:
            print(line, flush=True)
        return bool(is_attended)

    def _trainer(self, phase: Phase) -> TorchTrainer:
        manifest, resources = self._manifest, self._manifest.resources
        has_gpu = resources.gpus_per_rank > 0
        return TorchTrainer(
            run_shell,
            train_loop_config={"phase": phase.name, "board": self._board, "has_gpu": has_gpu},
            torch_config=RankConfig(),
            scaling_config=ScalingConfig(
                num_workers=1 if phase.alone else resources.ranks,
                use_gpu=has_gpu,
                resources_per_worker={"CPU": resources.cpus_per_rank, "GPU": resources.gpus_per_rank},
            ),
            run_config=RunConfig(
                name=phase.name,
                storage_path=str(manifest.run_dir / RAY_TRAIN_FOLDER),
                failure_config=FailureConfig(max_failures=manifest.retries),
            ),
        )


class Fitting(threading.Thread):
    """A trainer at work, beside the main thread, to which signals come. `failure`: why it gave up."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(name="fit", daemon=True)
        self._trainer = trainer
        self.failure: str | None = None

    def run(self) -> None:
        try:
            self._trainer.fit()
        except TrainingFailedError as error:
            self.failure = one_line(error)
        except Exception as error:  # whatever Ray raises when its own processes are lost
            self.failure = f"Ray Train failed: {one_line(error)}"


def main() -> int:
    """Run the manifest in this job's environment; returns the exit code."""
    try:
        manifest = read_manifest(os.environ)
        if manifest.code != code_version():
            print(f"note: submitted by mixwright {manifest.code}, run by {code_version()}", flush=True)
        _make_run_folder(manifest)
        _join_cluster()
        return Driver(manifest).run()
    except MixingError as error:
        print(f"error: {error}", flush=True)
        return error.exit_code


def _join_cluster() -> None:
    """Become a driver of the cluster that runs this job, whose address Ray has put into the environment.

    Workers are told it, too: with it a run's mixing service attaches to this cluster, where `mixwright mix` finds it
    from elsewhere.
    """
    address = os.environ["RAY_ADDRESS"]
    ray.init(address=address, logging_level=logging.WARNING, runtime_env={"env_vars": {"RAY_ADDRESS": address}})


def _make_run_folder(manifest: JobManifest) -> None:
    try:
        manifest.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{manifest.run_dir}: the run's folder cannot be made on this node: {error.strerror}; `run.folder` must be "
            "on storage that all nodes share"
        ) from None


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    # Not through the interpreter's exit handlers: Ray's would wait for a broken cluster.
    os._exit(exit_code)
