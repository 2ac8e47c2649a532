"""The command line as a whole: examples that work, JSON and nothing else, completion, version, exit codes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.config_file import validate
from mixwright.data_mixing.corpora import CorporaConfig
from mixwright.data_mixing.prepare import prepare
from mixwright.launch import cli
from mixwright.launch.help_text import HEADING
from mixwright.launch.json_output import plain
from tests.data_mixing.run_cases import TrainerSide

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
ONE_RESULT = ("data", "mix", "config", "ensemble", "distill", "generate", "doctor")
"""Commands whose result is a value; the others send, watch or compare."""
QUICK = (
    "mix status", "mix log", "mix forecast", "mix plan", "mix replay-policy --run", "mix submit policy.yaml --dry-run",
    "mix down", "mix simulate configs/policies/odm.yaml --world", "data stats", "data show", "data verify", "config",
)  # fmt: skip
"""Examples that take no more than a journal, a small store, or nothing."""


def walk(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the words that lead to it."""
    for name, sub in getattr(command, "commands", {}).items():
        yield from walk(sub, (*path, name))
    if not hasattr(command, "commands"):
        yield path, command


ROOT_COMMAND = typer.main.get_command(cli.app)
COMMANDS = dict(walk(ROOT_COMMAND))


def examples_of(command: Any) -> list[str]:
    """The command lines below its help, as they are shown."""
    lines = (command.epilog or "").replace("\\[", "[").split("\n\n")
    return [line for line in lines if line.startswith("mixwright ")]


EXAMPLES = [example for command in COMMANDS.values() for example in examples_of(command)]


@pytest.mark.parametrize("path", [path for path in COMMANDS if path[0] in ONE_RESULT], ids=" ".join)
def test_every_command_has_examples_of_itself_and_json(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    assert command.epilog.startswith(HEADING)
    assert examples_of(command)
    assert all(example.startswith(f"mixwright {' '.join(path)}") for example in examples_of(command))
    assert "--json" in {option for parameter in command.params for option in parameter.opts}


@pytest.mark.parametrize("example", [*EXAMPLES, *examples_of(ROOT_COMMAND)])
def test_every_example_is_understood(example: str) -> None:
    _, *words = shlex.split(example)
    command: Any = ROOT_COMMAND
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    if "--install-completion" in words:
        return
    assert not hasattr(command, "commands"), "names a group only"
    assert command.make_context("mixwright", words, resilient_parsing=False).params


@pytest.mark.parametrize("example", [example for example in EXAMPLES if "configs/" in example])
def test_files_that_examples_name_are_there(example: str) -> None:
    named = [word for word in shlex.split(example) if word.startswith("configs/")]
    assert all((ROOT / word).is_file() for word in named)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token store with the domain that examples name."""
    folder = tmp_path_factory.mktemp("corpora")
    for name in ("code", "wiki"):
        lines = [json.dumps({"text": f"{name} {number} " * 40}) for number in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    tree = {
        "output": str(folder / "store"), "sequence_length": 16, "tokenizer": {"train": {"vocab_size": 300}},
        "split": {"validation": 0.3}, "domains": {name: {"paths": [f"{name}.jsonl"]} for name in ("code", "wiki")},
        "num_workers": 1,
    }  # fmt: skip
    prepare(validate(CorporaConfig, tree, "corpora"), folder)
    return folder / "store"


@pytest.fixture(scope="module")
def workplace(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples take for granted: configs/, policy.yaml, a run and a store."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "policy.yaml").write_text("kind: static\nmixture: {code: 3, wiki: 1}\n")
    trainer = TrainerSide(folder / "runs/exp")
    document = {"kind": "static", "mixture": {"code": 1}}
    trainer.commit(trainer.journal.append(accept(document, trainer.genesis)).lsn, 20)
    trainer.report(last_step=29)
    shutil.copytree(store, folder / "runs/store")
    return folder


Command = Callable[[list[str]], tuple[int, str, str]]


@pytest.fixture
def mixwright(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command's own main function: exit code, standard output, standard error."""
    monkeypatch.chdir(workplace)

    def run(words: list[str]) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mixwright", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code, captured = ended.value.code, capsys.readouterr()
        return (code if isinstance(code, int) else 0), captured.out, captured.err

    return run


@pytest.mark.parametrize(
    "example",
    [e for e in EXAMPLES if e.startswith(tuple(f"mixwright {start}" for start in QUICK)) and "--watch" not in e],
)
def test_quick_examples_work_and_print_json_and_nothing_else_when_asked(example: str, mixwright: Command) -> None:
    words = shlex.split(example.replace("--since 100", "--since 2").replace("--until 12000", "--until 900"))[1:]
    words = [word for word in words if word not in ("23", "--json")]
    code, out, err = mixwright(words)
    assert (code, err if "data" not in words else "") == (0, "")
    assert out.strip()
    code, out, err = mixwright([*words, "--json"])
    assert (code, out.count("\n")) == (0, 1)
    json.loads(out)


def test_an_error_leaves_standard_output_empty_for_json_too(mixwright: Command) -> None:
    for words in (["mix", "status", "--run", "no", "--json"], ["data", "stats", "no", "--json"]):
        code, out, err = mixwright(words)
        assert (code, out, err.startswith("error: ")) == (2, "", True)


def test_a_store_that_is_damaged_is_exit_2_and_named_in_the_json(
    store: Path, tmp_path: Path, mixwright: Command
) -> None:
    damaged = shutil.copytree(store, tmp_path / "damaged")
    path = max(damaged.rglob("*.arrow"), key=lambda file: file.stat().st_size)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    code, out, _ = mixwright(["data", "verify", str(damaged), "--json"])
    assert code == 2
    assert len(json.loads(out)["problems"]) >= 1


def test_what_is_not_finite_is_null() -> None:
    assert plain({"a": float("nan"), "b": [float("inf"), 1.5], "c": Path("x/y")}) == {
        "a": None, "b": [None, 1.5], "c": "x/y"
    }  # fmt: skip


def bash(script: str, home: Path) -> str:
    """What a bash with its home in `home` prints."""
    environment = {**os.environ, "HOME": str(home), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "100"}
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_installed_completion_lists_the_verbs(tmp_path: Path) -> None:
    # The trailing `true` keeps bash alive as the parent, which is how the shell is found.
    assert "bash completion installed" in bash("mixwright --install-completion; true", tmp_path)
    (script,) = re.findall(r"source '?([^'\n]+)", (tmp_path / ".bashrc").read_text())
    complete = (
        f"source {shlex.quote(script)}; COMP_WORDS=(mixwright mix ''); COMP_CWORD=2; "
        "_mixwright_completion mixwright '' mix; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    assert set(bash(complete, tmp_path).split()) == set(ROOT_COMMAND.commands["mix"].commands)


def test_the_version_and_the_exit_codes_are_told(tmp_path: Path) -> None:
    out = bash("mixwright --version; mixwright --help", tmp_path)
    assert re.match(r"mixwright \d+\.\d+\.\d+\n", out)
    told = " ".join(out.replace("│", " ").split())
    for code, meaning in (
        (0, "done"),
        (1, "it did not go well"),
        (2, "bad input"),
        (3, "the service"),
        (75, "training"),
    ):
        assert f"{code} {meaning}" in told
