"""Start the real training job as a user would, in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mixwright.data_mixing.history import RunHistory
from mixwright.pretrain.rundir import read_history

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TIMEOUT_S = 280.0


def write_config(folder: Path, tree: dict[str, Any]) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start_job(
    config: Path, *overrides: str, num_ranks: int = 1, script: str = "pretrain.py", launcher: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """`python launch/pretrain.py` for one rank, the deepspeed launcher for more, or another `launcher`."""
    starter = [sys.executable]
    if launcher:
        starter = [str(BIN / launcher[0]), *launcher[1:], str(29700 + os.getpid() % 200)]
    elif num_ranks > 1:
        starter = [
            str(BIN / "deepspeed"),
            "--num_gpus",
            str(num_ranks),
            "--master_port",
            str(29600 + os.getpid() % 300),
        ]
    command = [*starter, str(ROOT / "launch" / script), "--config", str(config), *overrides]
    environment = {
        **os.environ, "DS_ACCELERATOR": "cpu", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def finish(job: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and everything that was printed."""
    try:
        output, _ = job.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        job.kill()
        output, _ = job.communicate()
        raise AssertionError(f"the job did not end within {TIMEOUT_S:g} s:\n{output[-3000:]}") from None
    return job.returncode, output


def run_job(config: Path, *overrides: str, **how: Any) -> str:
    """Output of a job that must succeed; `how` as in `start_job`."""
    code, output = finish(start_job(config, *overrides, **how))
    assert code == 0, output[-4000:]
    return output


def wait_for_step(run_dir: Path, step: int, job: subprocess.Popen[str]) -> None:
    """Return once `step` optimizer steps are done (by the metrics)."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        if any(record["step"] >= step for record in metrics(run_dir, "step")):
            return
        if job.poll() is not None:
            raise AssertionError(f"the job ended early with {job.returncode}:\n{job.communicate()[0][-3000:]}")
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def metrics(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [record for record in records if record["kind"] == kind]


def mixwright(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed command."""
    return subprocess.run(
        [str(BIN / "mixwright"), *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def history_of(run_dir: Path) -> RunHistory:
    return read_history(run_dir)


def digests(run_dir: Path) -> list[str]:
    """The run digest after each step, in order; a step that was done again counts as done last."""
    latest = {record["step"]: record["run_digest"] for record in metrics(run_dir, "step")}
    return [latest[step] for step in range(1, len(latest) + 1)]
