"""Secrets in the environment of a training job, and of `mixwright submit`: in no file, output, request or command line.

The service, its verbs and the dashboard are in `test_service_secrets.py`.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
from pathlib import Path

import psutil
import pytest
from aiohttp import web

from mixwright.data_mixing.run_token import TOKEN_FILE, TOKEN_VARIABLE
from mixwright.launch.job_manifest import VARIABLE
from tests.launch.test_jobs_api import server
from tests.pretrain.jobs import BIN, finish, start_job, write_config
from tests.pretrain.tiny import tiny_tree

NAMES = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
         "AZURE_STORAGE_KEY", "GOOGLE_API_KEY", "RAY_AUTH_TOKEN", TOKEN_VARIABLE)  # fmt: skip


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Secrets in this process's environment, which its children inherit."""
    found = {name: f"planted-{secrets.token_hex(12)}" for name in NAMES}
    for name, secret in found.items():
        monkeypatch.setenv(name, secret)
    return found


def command_lines(parent: psutil.Process) -> list[str]:
    """What any user of the machine could list of a process and those that it started."""
    found = []
    for process in [parent, *parent.children(recursive=True)]:
        try:
            found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_a_training_job_writes_and_prints_no_secret(tiny_store: Path, tmp_path: Path, planted: dict[str, str]) -> None:
    tree = tiny_tree(tmp_path, tiny_store, metrics__tensorboard=True, metrics__row_log=True)
    job = start_job(write_config(tmp_path, tree))
    seen = []
    while job.poll() is None and len(seen) < 500:
        seen += command_lines(psutil.Process(job.pid))
        try:
            job.wait(0.5)
        except subprocess.TimeoutExpired:
            continue
    code, output = finish(job)
    assert code == 0, output[-4000:]
    files = {path: path.read_bytes() for path in (tmp_path / "tiny").rglob("*") if path.is_file()}
    names = {path.name for path in files if path.name != TOKEN_FILE}
    assert {"metrics.jsonl", "config.yaml", "00000000.json"} <= names
    assert any(path.is_relative_to(tmp_path / "tiny" / "checkpoints") for path in files)
    assert seen
    for name, secret in planted.items():
        assert [path for path, content in files.items() if secret.encode() in content] == [], name
        assert secret not in output, name
        assert not [line for line in seen if secret in line], name


def test_submitting_sends_the_manifest_alone_and_the_clusters_token_in_its_header_alone(
    tiny_store: Path, tmp_path: Path, planted: dict[str, str]
) -> None:
    requests: list[tuple[str, dict[str, str], str]] = []

    async def answer(request: web.Request) -> web.Response:
        requests.append((f"{request.method} {request.path_qs}", dict(request.headers), await request.text()))
        is_list = request.method == "GET" and request.path == "/api/jobs/"
        return web.json_response([] if is_list else {"submission_id": "x"})

    config = write_config(tmp_path, tiny_tree(tmp_path, tiny_store))
    with server(answer) as url:
        process = psutil.Popen(
            [str(BIN / "mixwright"), "submit", "pretrain", str(config), "--address", url, "--detach"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ),
        )  # fmt: skip
        seen = command_lines(process)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    bodies = [json.loads(body) for what, _, body in requests if what.startswith("POST")]
    (sent,) = [set(body["runtime_env"]["env_vars"]) for body in bodies]
    assert VARIABLE in sent
    assert not sent & set(NAMES)
    headers = [headers.pop("Authorization", None) for _, headers, _ in requests]
    assert set(headers) == {f"Bearer {planted['RAY_AUTH_TOKEN']}"}
    told = [output, errors, *seen, *(path.read_text() for path in tmp_path.rglob("*") if path.is_file())]
    for name, secret in planted.items():
        assert secret not in repr(requests), name
        assert not [text for text in told if secret in text], name
