"""The command line on almost valid files: a documented exit code, one clear error, nothing half done or obeyed."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mixwright.data_mixing.control import MixingController
from mixwright.data_mixing.errors import PolicyRejected
from mixwright.data_mixing.journal import read_entries, verify
from tests.data_mixing.run_cases import TrainerSide
from tests.properties.commands import EXIT_CODES, Ended, mixwright
from tests.properties.effort import effort
from tests.properties.files import contents
from tests.properties.mutations import SENTINEL, as_yaml, merge_bomb, mutated, mutated_texts
from tests.properties.test_fuzz_configs import CONFIGS, POLICIES

COMMANDS = [
    ["config", "check", "FILE"],
    ["config", "show", "FILE"],
    ["config", "show", "FILE", "--json"],
    ["mix", "submit", "FILE", "--run", "RUN", "--dry-run"],
    ["mix", "submit", "FILE", "--run", "RUN"],
    ["mix", "forecast", "FILE", "--run", "RUN", "--json"],
    ["mix", "simulate", "FILE", "--world", "FILE", "--seeds", "1"],
    ["mix", "fit", "regmix", "FILE", "--workers", "0"],
    ["distill", "prepare", "FILE"],
    ["ensemble", "tune", "FILE", "--workers", "0"],
    ["study", "mixing", "--config", "FILE", "--workers", "0", "--seeds", "1"],
]
SEEDS = [
    yaml.safe_load((CONFIGS / name).read_text())
    for name in ("quickstart.yaml", "rpo/example.yaml", "ensemble/distill.yaml", "ensemble/ensemble.yaml")
] + [policy for policy in POLICIES if policy["kind"] in ("static", "schedule")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    shutil.copytree(CONFIGS, folder / "configs")
    TrainerSide(folder / "exp")
    return folder


def broken(content: bytes) -> bytes:
    """The document with a key that nothing has, so that no command goes to work on it."""
    return content.rstrip().removesuffix(b"}") + b', "no_such_key": 1}' if content.rstrip().endswith(b"}") else content


def check_ended(ended: Ended, command: list[str]) -> None:
    assert ended.code in EXIT_CODES, (command, ended)
    assert "Traceback" not in ended.output + ended.errors
    if ended.code in (2, 3):
        assert ended.errors.startswith(("error: ", "Usage: ")), ended
        assert all(character.isprintable() for line in ended.errors.splitlines() for character in line), ended
    assert not Path(SENTINEL).exists()


def test_commands_end_with_a_documented_code_and_change_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    path = place / "configs" / "fuzzed.yaml"
    before = contents(place)

    @given(st.sampled_from(COMMANDS), mutated_texts(SEEDS))
    @effort(50)
    def check(command: list[str], content: bytes) -> None:
        content = content if command[0] in ("config", "mix") else broken(content)
        path.write_bytes(content)
        arguments = [str(path) if part == "FILE" else str(place / "exp") if part == "RUN" else part for part in command]
        check_ended(mixwright(*arguments), command)
        path.unlink()

    check()
    assert contents(place) == before


@given(st.lists(st.sampled_from(
    ["mix", "config", "data", "submit", "log", "status", "show", "check", "--run", "--since", "--json", "--verify",
     "-1", "9" * 400, "nan", "\x1b[2J", "\ud800", "--", "", "../..", "x" * 5000, "a=b", "plan", "list"]), max_size=5)
)  # fmt: skip
@effort(30)
def test_arguments_of_any_kind_end_with_a_documented_code(arguments: list[str]) -> None:
    if "submit" in arguments and "mix" not in arguments:
        arguments.remove("submit")  # would ask a cluster
    ended = mixwright(*arguments)
    assert ended.code in EXIT_CODES
    assert "Traceback" not in ended.errors


def test_a_damaged_run_ends_every_reading_command_with_one_error(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "exp"
    shutil.copytree(place / "exp", run)
    entries = sorted((run / "journal").glob("*.json"))
    originals = {path: path.read_bytes() for path in entries}
    commands = [["log"], ["log", "--json"], ["log", "--verify"], ["status"], ["status", "--json"], ["forecast"]]

    @given(st.sampled_from(commands), st.sampled_from(entries), st.integers(0, 2**32))
    @effort(40)
    def check(command: list[str], path: Path, seed: int) -> None:
        raw, chance = originals[path], random.Random(seed)
        place = chance.randrange(len(raw))
        path.write_bytes(chance.choice([raw[:place], raw[:place] + b"\xff" + raw[place + 1 :], b"", b"[" * 5000]))
        ended = mixwright("mix", *command, "--run", str(run))
        path.write_bytes(raw)
        assert (ended.code, ended.errors.count("\n"), path.name in ended.errors) == (2, 1, True), ended

    check()
    assert mixwright("mix", "log", "--verify", "--run", str(run)).code == 0


def test_a_refused_policy_leaves_one_reject_and_nothing_else(tmp_path: Path) -> None:
    trainer = TrainerSide(tmp_path / "exp")
    controller = MixingController(trainer.run_dir / "journal", "controller")
    controller.ping()

    @given(st.integers(0, 2**32))
    @effort(40)
    def check(seed: int) -> None:
        chance = random.Random(seed)
        document = mutated(json.loads(json.dumps(chance.choice(POLICIES))), chance)
        before = len(read_entries(trainer.run_dir / "journal"))
        try:
            controller.submit(document)
        except PolicyRejected:
            expected = "REJECT"
        else:
            expected = "POLICY"
        assert [entry.type for entry in read_entries(trainer.run_dir / "journal", before)] == [expected]

    check()
    verify(trainer.run_dir / "journal")
    assert mixwright("mix", "log", "--json", "--run", str(trainer.run_dir)).code == 0
    assert mixwright("mix", "log", "--run", str(trainer.run_dir)).code == 0


@pytest.mark.parametrize("content", [merge_bomb(60), as_yaml({"run": "\x1b[31m"})])
def test_the_real_command_is_no_different(content: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    done = subprocess.run(
        [sys.executable, "-m", "mixwright.launch.cli", "config", "check", str(path)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr
