"""`mixwright doctor`: every finding against a machine that is well and against one that is not."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mixwright.launch import cli, doctor_folder, doctor_machine, doctor_packages
from mixwright.launch.doctor import Check, checks, examine
from mixwright.launch.finding import Finding

COMMAND = str(Path(sys.executable).parent / "mixwright")
Usage = namedtuple("Usage", "total used free")


def states(findings: object) -> list[tuple[str, str]]:
    return [(finding.name, finding.state) for finding in findings]  # type: ignore[attr-defined]


def test_the_command_tells_everything_as_json_and_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    (tmp_path / "token").chmod(0o600)
    environment = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"), "RAY_ADDRESS": ""}
    done = subprocess.run([COMMAND, "doctor", "--folder", str(tmp_path), "--json"], capture_output=True, text=True,
                          timeout=120, check=False, env=environment)  # fmt: skip
    tree = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert tree["state"] in ("ok", "warn")
    found = {finding["name"]: finding for finding in tree["findings"]}
    assert set(found) >= {
        "python", "packages", "torch", "kernels", "deepspeed", "ray", "ray token", "ray address", "exclusive create",
        "fsync", "free space", "atomic rename", "hard links", "mmap", "shared memory", "open files", "clock",
    }  # fmt: skip
    assert found["ray token"] == {
        "name": "ray token", "state": "ok", "found": f"{tmp_path}/token, mode 0600", "remedy": ""
    }  # fmt: skip
    assert all(finding["remedy"] for finding in tree["findings"] if finding["state"] != "ok")
    assert [path.name for path in tmp_path.iterdir()] == ["token"]


def test_something_that_fails_is_exit_1_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def two(folder: Path, address: str) -> dict[str, Check]:
        return {name: checks(folder, address)[name] for name in ("file system", "ray address")}

    monkeypatch.setattr("mixwright.launch.doctor.checks", two)
    done = CliRunner().invoke(cli.app, ["doctor", "--folder", str(tmp_path / "none"), "--address", "127.0.0.1:1"])
    text = " ".join(done.stdout.split())
    assert done.exit_code == 1
    assert "FAIL folder" in text
    assert "-> name a folder that exists and can be written" in text
    assert "FAIL ray address no Ray at 127.0.0.1:1" in text
    assert "2 fail" in text


def test_one_broken_check_hides_no_other() -> None:
    def broken() -> list[Finding]:
        raise RuntimeError("oh\nno")

    findings = examine({"a": broken, "b": lambda: [Finding("b", "ok", "fine")]})
    assert states(findings) == [("a", "fail"), ("b", "ok")]
    assert findings[0].found == "the check itself failed: RuntimeError: oh no"


def test_names_of_checks_are_those_of_their_findings(tmp_path: Path) -> None:
    assert set(checks(tmp_path, "")) >= {"python", "ray", "file system", "clock"}


@pytest.mark.parametrize(
    ("first", "second", "state", "said"),
    [
        (range(100), range(100, 200), "ok", "none twice"),
        (range(101), range(100, 200), "fail", "1 of 200 names went to two processes at once"),
        ([], [], "fail", "only 0 of 200 names could be claimed; the journal need it"),
    ],
)
def test_a_name_that_two_processes_get_is_a_failure(first: range, second: range, state: str, said: str) -> None:
    finding = doctor_folder.judge("hard links", list(first), list(second), "the journal")
    assert (finding.state, said in finding.found) == (state, True)


def test_two_real_processes_share_the_names_among_them(tmp_path: Path) -> None:
    assert states(doctor_folder.exclusive_claims(tmp_path)) == [("exclusive create", "ok"), ("hard links", "ok")]
    claimed = [path.read_text() for path in tmp_path.glob("linked-*")]
    assert len(claimed) == doctor_folder.CLAIMS
    assert set(claimed) <= {"a", "b"}


@pytest.mark.parametrize(("free_gib", "state"), [(100, "ok"), (5, "warn"), (0.5, "fail")])
def test_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_gib: float, state: str) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(1 << 40, 0, int(free_gib * (1 << 30))))
    assert doctor_folder.free_space(tmp_path).state == state


def test_a_slow_disk_and_a_file_server_with_another_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor_folder.timestamps(tmp_path).state == "ok"
    monkeypatch.setattr(os, "fsync", lambda _: time.sleep(2 * doctor_folder.SLOW_FLUSH_S))
    assert doctor_folder.flush_latency(tmp_path).state == "warn"
    real = time.time()
    monkeypatch.setattr(time, "time", lambda: real - 100)
    assert "ahead of this machine's" in doctor_folder.timestamps(tmp_path).found


def test_a_rename_that_is_not_atomic_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor_folder.atomic_rename(tmp_path).state == "ok"

    def copy(self: Path, target: Path) -> Path:
        target.unlink()
        time.sleep(0.001)
        target.write_bytes(self.read_bytes())
        return target

    monkeypatch.setattr(Path, "replace", copy)
    assert doctor_folder.atomic_rename(tmp_path).state == "fail"


def test_a_token_that_others_can_read_and_one_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o644)
    (_, open_to_all) = doctor_machine.ray_token({"RAY_AUTH_TOKEN_PATH": str(token)})
    assert (open_to_all.state, open_to_all.remedy) == ("warn", f"chmod 600 {token}")
    assert "secret" not in open_to_all.found
    (_, missing) = doctor_machine.ray_token({"RAY_AUTH_MODE": "token"})
    assert (missing.state, "there is no token" in missing.found) == ("fail", True)
    (_, none) = doctor_machine.ray_token({})
    assert (none.state, "a private Ray makes its own" in none.found) == ("ok", True)


def test_something_else_than_ray_that_listens_is_told_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        accepting = threading.Thread(target=server.accept, daemon=True)
        accepting.start()
        (finding,) = doctor_machine.ray_address(f"127.0.0.1:{server.getsockname()[1]}", timeout_s=4)
    assert finding.state == "fail"
    assert "does not answer" in finding.found or "no answer within" in finding.found


@pytest.mark.parametrize(("soft", "state"), [(512, "fail"), (2048, "warn"), (65536, "ok"), (-1, "ok")])
def test_limits_of_open_files(monkeypatch: pytest.MonkeyPatch, soft: int, state: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, -1))
    assert states(doctor_machine.open_files()) == [("open files", state)]


def test_shared_memory_and_clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert states(doctor_machine.shared_memory(tmp_path / "none")) == [("shared memory", "warn")]
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(64 << 20, 0, 64 << 20))
    assert states(doctor_machine.shared_memory(tmp_path)) == [("shared memory", "warn")]
    monkeypatch.setattr(doctor_machine, "is_synchronised", lambda: False)
    jumping = iter((0.0, 100.0))
    monkeypatch.setattr(time, "time", lambda: next(jumping))
    assert states(doctor_machine.clock(0.01)) == [("clock", "warn"), ("time service", "warn")]


def test_versions_are_compared_without_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_packages, "version", lambda name: {"torch": "2.13.0+cpu", "numpy": "1.0"}[name])
    finding = doctor_packages.tested_versions(["torch==2.13.0", "numpy==2.1  # why", "", "-r other"])
    assert (finding.state, "1 of 2 differ from constraints.txt: numpy 1.0 (==2.1)" in finding.found) == ("warn", True)


def test_what_is_too_old_or_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_packages, "requires", lambda _: ["rich>=999", "no-such-thing-at-all; extra == 'x'"])
    (finding, *_) = doctor_packages.packages()
    assert finding.state == "fail"
    assert "rich " in finding.found
    assert "no-such-thing" not in finding.found
    monkeypatch.setattr(doctor_packages, "requires", lambda _: ["no-such-thing-at-all"])
    assert "no-such-thing-at-all is not installed" in next(iter(doctor_packages.packages())).found


def test_without_a_compiler_the_remedy_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    (_, compiler) = doctor_packages.deepspeed()
    assert (compiler.state, "apt install g++" in compiler.remedy) == ("warn", True)
