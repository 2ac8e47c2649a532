"""The run's token in real Ray, and secrets that users have about them: in no file, output or command line of ours."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from mixwright.data_mixing.client import MixingClient
from mixwright.data_mixing.config_file import load_config, set_override
from mixwright.data_mixing.control import MixingController
from mixwright.data_mixing.errors import AccessRefused, ConfigError, PolicyRejected, ServiceUnavailable
from mixwright.data_mixing.journal import read_entries
from mixwright.data_mixing.run_token import (
    TOKEN_FILE,
    TOKEN_VARIABLE,
    check_token,
    create_token,
    find_token,
    token_digest,
)
from mixwright.data_mixing.service import read_record, stop_service
from mixwright.data_mixing.worlds import World
from tests.data_mixing.run_cases import TrainerSide
from tests.launch.dashboards import dashboard

PLANTED = {name: f"planted-{name.lower()}-{secrets.token_hex(8)}" for name in ("WANDB_API_KEY", "HF_TOKEN",
           "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN")}  # fmt: skip
CODE = {"kind": "static", "mixture": {"code": 1}}


# --- the token by itself ----------------------------------------------------------------------------------------


def test_a_token_is_drawn_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    token = create_token(tmp_path)
    assert len(token) >= 43
    assert create_token(tmp_path) == find_token(tmp_path, {}) == token
    assert [path.name for path in tmp_path.iterdir()] == [TOKEN_FILE]
    assert (tmp_path / TOKEN_FILE).stat().st_mode & 0o777 == 0o600
    (tmp_path / TOKEN_FILE).chmod(0o644)
    create_token(tmp_path)
    assert (tmp_path / TOKEN_FILE).stat().st_mode & 0o777 == 0o600
    assert find_token(tmp_path, {TOKEN_VARIABLE: " other\n"}) == "other"
    assert find_token(tmp_path / "elsewhere", {}) == ""


def test_a_token_file_that_holds_none_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / TOKEN_FILE).write_text("")
    with pytest.raises(ServiceUnavailable, match=r"service\.token: is empty; remove it"):
        create_token(tmp_path)
    (tmp_path / TOKEN_FILE).write_bytes(b"\xff")
    with pytest.raises(ServiceUnavailable, match="cannot be kept there: not ASCII"):
        create_token(tmp_path)
    assert find_token(tmp_path, {}) == ""


@pytest.mark.parametrize("given", ["", None, "wrong", "\ud800", 7, b"right", ["right"], "right ", "Right"])
def test_whatever_is_not_the_token_is_refused_without_repeating_it(given: object, tmp_path: Path) -> None:
    check_token("submit", "right", token_digest("right"), tmp_path)
    with pytest.raises(AccessRefused, match="submit: needs the run's token, and") as told:
        check_token("submit", given, token_digest("right"), tmp_path)
    assert "right" not in str(told.value).replace(str(tmp_path), "")
    assert token_digest("right") not in str(told.value)


# --- in real Ray ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    trainer: TrainerSide
    token: str
    outputs: list[str]
    command_lines: list[str]

    @property
    def run_dir(self) -> Path:
        return self.trainer.run_dir

    def mixwright(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """The real command, whose output is kept."""
        process = psutil.Popen(
            [sys.executable, "-m", "mixwright.launch.cli", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **PLANTED, **environment},
        )  # fmt: skip
        self.see_processes()
        output, errors = process.communicate(timeout=240)
        self.outputs.extend((output, errors))
        return subprocess.CompletedProcess(arguments, process.returncode, output, errors)

    def see_processes(self) -> None:
        """Keep what any user of this machine could list."""
        for process in psutil.process_iter():
            try:
                self.command_lines.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A run whose service was started by `mix up` with secrets in the environment."""
    trainer = TrainerSide(tmp_path_factory.mktemp("guarded") / "exp")
    started = Served(trainer, create_token(trainer.run_dir), [], [])
    up = started.mixwright("mix", "up", "--run", str(trainer.run_dir), "--address", "local")
    assert up.returncode == 0, up.stderr
    yield started
    stop_service(trainer.run_dir, 60)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("token", ["", "wrong-token", "x" * 43])
def test_verbs_that_change_something_are_refused_without_the_token(
    served: Served, token: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    away = served.run_dir / TOKEN_FILE
    if token:
        monkeypatch.setenv(TOKEN_VARIABLE, token)
    else:
        away.rename(tmp_path / "away")
    before = [entry.lsn for entry in read_entries(served.run_dir / "journal")]
    client = MixingClient(served.run_dir, timeout_s=90)
    try:
        verbs = [lambda: client.submit(CODE, "r1")]
        if token == "wrong-token":
            verbs += [
                lambda: client.cancel(3), lambda: client.pause(True), lambda: client.roll_back(3), lambda: client.end(),
            ]  # fmt: skip
        for verb in verbs:
            with pytest.raises(
                AccessRefused, match=r"needs the run's token, .* expected the one in .*service\.token"
            ) as told:
                verb()
            assert not token or token not in str(told.value)
        assert client.ping()["lsn"] == before[-1]
    finally:
        if not token:
            (tmp_path / "away").rename(away)
    assert [entry.lsn for entry in read_entries(served.run_dir / "journal")] == before


@pytest.mark.ray
@pytest.mark.slow
def test_the_token_and_planted_secrets_are_in_no_file_output_or_command_line(served: Served, tmp_path: Path) -> None:
    policy, run = tmp_path / "policy.yaml", str(served.run_dir)
    policy.write_text(json.dumps(CODE))
    refused = served.mixwright("mix", "submit", str(policy), "--run", run, **{TOKEN_VARIABLE: "planted-wrong"})
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    # By the variable alone, as from a machine where the file cannot be read.
    (served.run_dir / TOKEN_FILE).rename(tmp_path / "away")
    done = served.mixwright("mix", "submit", str(policy), "--run", run, "--json", **{TOKEN_VARIABLE: served.token})
    (tmp_path / "away").rename(served.run_dir / TOKEN_FILE)
    assert done.returncode == 0, done.stderr
    lsn = json.loads(done.stdout)["lsn"]
    assert served.mixwright("mix", "cancel", str(lsn), "--run", run).returncode == 0
    served.mixwright("mix", "status", "--run", run, "--json")
    served.mixwright("mix", "log", "--run", run)
    served.mixwright("doctor", "--folder", str(tmp_path), "--json", **{TOKEN_VARIABLE: served.token})
    with dashboard(served.run_dir) as site:
        served.see_processes()
        for path in (
            "/",
            "/api/poll",
            "/api/runs/0/panels/summary",
            "/api/runs/0/panels/timeline",
            "/api/runs/0/events",
        ):
            served.outputs.append(urllib.request.urlopen(site.url.rstrip("/") + path).read().decode())
    record = read_record(served.run_dir)
    assert record is not None
    assert record.ray_folder is not None
    folders = [served.run_dir, record.ray_folder / "ray"]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.name != TOKEN_FILE]
    written = {str(path): path.read_bytes() for path in files if path.suffix != ".sock"}
    assert len(written) > 10
    for secret in (served.token, "planted-wrong", *PLANTED.values()):
        assert [path for path, content in written.items() if secret.encode() in content] == []
        assert not [text for text in served.outputs if secret in text]
        assert not [line for line in served.command_lines if secret in line]


# --- secrets where users may put them ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    ["comet: {api_key: SECRET}", "a: {b: [{wandb_api_key: SECRET}]}", "password: SECRET", "hf_token: SECRET",
     "path: 'https://ann:SECRET@host/data'", "db-secret: SECRET", "AUTH_TOKEN: SECRET"],
)  # fmt: skip
def test_a_secret_in_a_configuration_is_refused_and_not_repeated(place: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(place)
    with pytest.raises(ConfigError, match="a secret has no place in a configuration") as told:
        load_config(World, path)
    assert "SECRET" not in str(told.value)


def test_a_secret_in_an_override_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="a secret has no place") as told:
        set_override({}, "deepspeed.comet.api_key=hunter2")
    assert "hunter2" not in str(told.value)


def test_words_that_only_sound_like_secrets_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("law: linear\nnum_domains: 2\nnum_steps: 9\n")
    tree: dict[str, object] = {}
    for override in ("model.config.pad_token_id=3", "tokenizer.eos_token=end", "max_tokens=3", "token_path=x"):
        set_override(tree, override)
    assert tree["max_tokens"] == 3


def test_a_policy_that_holds_a_secret_leaves_no_trace_of_it_in_the_journal(tmp_path: Path) -> None:
    trainer = TrainerSide(tmp_path / "exp")
    controller = MixingController(trainer.run_dir / "journal", "controller")
    for document in ({**CODE, "api_key": "hunter2"}, "kind: static\nmixture: {code: 1}\npassword: hunter2"):
        with pytest.raises(PolicyRejected, match="a secret has no place in a policy"):
            controller.submit(document)
    assert trainer.types()[-2:] == ["REJECT", "REJECT"]
    assert not [path for path in (trainer.run_dir / "journal").iterdir() if b"hunter2" in path.read_bytes()]
