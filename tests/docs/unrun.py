"""Commands that a test cannot run, checked as far as it can: syntax, sub-command, options, files, configurations."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer.main

from mixwright.launch import cli, study
from mixwright.pretrain.config import load_pretrain_config
from mixwright.pretrain.distill.config import load_distill_config
from mixwright.pretrain.rpo.config import load_rpo_config
from tests.docs.commands import ROOT, Command, syntax_error

MIXWRIGHT = typer.main.get_command(cli.app)
STUDY = typer.main.get_command(study.app)
LOADERS: dict[str, Any] = {"pretrain": load_pretrain_config, "distill": load_distill_config, "rpo": load_rpo_config}
"""What checks the configuration of a stage."""


def check_unrun(command: Command) -> None:
    """Raises AssertionError or ConfigError where the command could not work anywhere."""
    assert syntax_error(command.text) is None, f"{command}: {syntax_error(command.text)}"
    for words in simple_commands(command.plain):
        program, *arguments = words
        if program == "mixwright":
            check_arguments(MIXWRIGHT, arguments)
        elif program == "make":
            check_targets(arguments)
        elif program == "sbatch":
            check_configuration("pretrain", arguments)
        elif any(re.fullmatch(r"launch/\w+\.py", word) for word in words):
            check_script(words)
        elif (
            program.startswith("python") and arguments[:1] == ["-m"] and arguments[1].startswith(("mixwright", "tests"))
        ):
            assert importlib.util.find_spec(arguments[1]), f"{command}: no module {arguments[1]}"
        check_files(words)


def simple_commands(plain: str) -> Iterator[list[str]]:
    """Words of each command in a line, without assignments before them and redirections."""
    lexer = shlex.shlex(plain.replace("<<", " "), posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    for word in [*lexer, ";"]:
        if not set(word) <= set(";&|()<>"):
            words.append(word)
        elif words and not set(word) <= set("<>"):
            program = next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words))
            if words[program:]:
                yield words[program:]
            words = []


def check_arguments(group: Any, words: Sequence[str]) -> None:
    """Sub-command and options, as click understands them; whether files exist is another question."""
    command, rest = group, list(words)
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    if {"--help", "--version", "--install-completion"} & set(rest):
        return
    assert not hasattr(command, "commands"), f"{' '.join(words)}: names a group only, or no command of it"
    try:
        command.make_context("mixwright", list(rest))
    except Exception as error:  # typer carries a click of its own, whose errors it does not show
        if "does not exist" not in str(error):
            raise AssertionError(f"{' '.join(words)}: {error}") from error
    stage = next((word for word in words if word in LOADERS), None)
    if words[0] == "submit" and stage is not None:
        check_configuration(stage, rest)


def check_targets(arguments: Sequence[str]) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for word in arguments:
        assert "=" in word or word in targets, f"make {word}: no such target"


def check_script(words: Sequence[str]) -> None:
    """A script of launch/ behind any launcher."""
    place = next(i for i, word in enumerate(words) if word.startswith("launch/"))
    script, arguments = ROOT / words[place], list(words[place + 1 :])
    assert script.is_file(), f"{words[place]} is missing"
    if script.stem == "study":
        check_arguments(STUDY, arguments)
    elif script.stem in LOADERS:
        assert "--config" in arguments, f"{words[place]} needs --config"
        check_configuration(script.stem, arguments)


def check_configuration(stage: str, arguments: Sequence[str]) -> None:
    """The file and the overrides of a stage, by its own loader."""
    files = [word for word in arguments if word.startswith("configs/") and word.endswith(".yaml")]
    overrides = [word for word in arguments if re.match(r"[a-z_.]+=", word)]
    for name in files:
        LOADERS[stage](ROOT / name, overrides)


def check_files(words: Sequence[str]) -> None:
    for word in words:
        if re.fullmatch(r"configs/[\w./-]+", word):
            assert (ROOT / Path(word)).exists(), f"{word} is missing"
