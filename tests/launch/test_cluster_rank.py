"""One rank of a cluster job as a process: how it ends, and that it does not outlive the worker that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from mixwright.launch.cluster_rank import CRASHED, INTERRUPTED, PARENT
from mixwright.launch.job_manifest import Resources, make_manifest
from mixwright.launch.rank_shell import Board
from mixwright.pretrain.rundir import sole_trainer
from tests.pretrain.jobs import write_config
from tests.pretrain.tiny import tiny_tree

WORKER = (
    "import os, subprocess, sys; "
    "rank = subprocess.Popen([sys.executable, '-m', 'mixwright.launch.cluster_rank', sys.argv[1]], "
    f"env={{**os.environ, '{PARENT}': str(os.getpid())}}); "
    "print(rank.pid, flush=True); sys.exit(rank.wait())"
)


def environment(folder: Path, *overrides: str) -> dict[str, str]:
    config = write_config(folder, tiny_tree(folder / "runs", folder / "store"))
    manifest = make_manifest("pretrain", config, overrides, Resources(), 3, 60)
    return {**os.environ, **manifest.to_environment(), "DS_ACCELERATOR": "cpu"}


def worker(settings: dict[str, str], phase: str = "train") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, phase], env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_rank_ends_with_its_worker(tmp_path: Path) -> None:
    settings = environment(tmp_path)
    with sole_trainer(tmp_path / "runs" / "tiny"):  # so that the rank waits, for longer than this test does
        parent = worker(settings)
        assert parent.stdout is not None
        rank = psutil.Process(int(parent.stdout.readline()))
        time.sleep(1.0)
        assert rank.is_running()
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        rank.wait(timeout=30)


def test_a_rank_whose_worker_is_gone_already_does_not_begin(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mixwright.launch.cluster_rank", "train"]
    settings = {**environment(tmp_path), PARENT: "1"}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (CRASHED, "")


def test_what_is_wrong_is_one_line_and_its_own_exit_code(tmp_path: Path) -> None:
    rank = worker(environment(tmp_path, "training.num_threads=1"))
    output, _ = rank.communicate(timeout=200)
    assert rank.returncode == 2
    (error,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert f"{tmp_path / 'store'} holds no token store" in error
    assert "Traceback" not in output


def test_an_exception_that_nobody_expected_is_no_failure_of_training(tmp_path: Path) -> None:
    rank = worker(environment(tmp_path), phase="no such phase")
    output, _ = rank.communicate(timeout=200)
    assert (rank.returncode, "Traceback" in output) == (CRASHED, True)


def test_the_first_rank_that_ended_for_good_decides_and_the_others_are_told() -> None:
    board = Board()
    assert board.look(stop=False) == ([], False)
    assert board.exchange(["a", "b"]) == (False, False)
    assert board.look(stop=False) == (["a", "b"], True)
    board.finish(2, is_over=True)
    board.finish(3, is_over=True)
    assert board.exchange([]) == (False, True)
    assert (board.outcome(), board.look(stop=False)[0]) == (2, [])


def test_ranks_that_write_their_checkpoint_are_left_to_it() -> None:
    board = Board()
    board.look(stop=True)
    assert board.exchange([]) == (True, False)
    board.finish(INTERRUPTED, is_over=False)
    assert board.exchange(["saved"]) == (True, False)
    assert (board.outcome(), board.look(stop=True)) == (INTERRUPTED, (["saved"], True))
