"""Commands of the docs are found as a reader would find them, tables of exceptions are honest, inline ones exist."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest

from mixwright.data_mixing.errors import ConfigError
from tests.docs import tables
from tests.docs.commands import ROOT, all_commands, begins_like_a_command, blocks_of, commands_of, pages
from tests.docs.session import named, with_added
from tests.docs.unrun import MIXWRIGHT, check_targets, check_unrun

COMMANDS = all_commands()
PAGE = """Text.

```bash
mixwright data stats runs/s   # how many
# a remark

deepspeed launch/pretrain.py \\
    --config run.yaml &
cat > a.yaml <<'END'
kind: keep

END
for n in 1 2; do
  echo "$n
  more"
done
```

```console
$ mixwright dashboard runs/exp
runs/exp: http://127.0.0.1:8642/
```

```yaml
mixwright: not a command
```
"""


def test_commands_are_taken_out_whole_and_in_order() -> None:
    found = commands_of("page.md", PAGE)
    assert [(command.line, command.plain) for command in found] == [
        (4, "mixwright data stats runs/s"),
        (7, "deepspeed launch/pretrain.py --config run.yaml &"),
        (9, "cat > a.yaml <<'END' kind: keep END"),
        (13, 'for n in 1 2; do echo "$n more" done'),
        (20, "mixwright dashboard runs/exp"),
    ]
    assert found[2].text == "cat > a.yaml <<'END'\nkind: keep\n\nEND"


def test_the_docs_have_commands_on_most_pages() -> None:
    assert len(COMMANDS) > 60
    assert len({command.page for command in COMMANDS}) > 12


@pytest.mark.parametrize("page", pages())
def test_nothing_that_looks_like_a_command_escapes(page: str) -> None:
    for block in blocks_of(page, (ROOT / page).read_text(encoding="utf-8")):
        if block.language not in ("bash", "console"):
            looks = [line for line in block.lines if begins_like_a_command(line)]
            assert block.language not in ("sh", "shell", "zsh"), f"{page}:{block.line}: fence commands as bash"
            assert not looks or block.language in ("yaml", "text"), f"{page}:{block.line}: fence as bash: {looks[0]}"


@pytest.mark.parametrize("table", ["NOT_HERE", "ADDED", "WAIT", "UNTIL_THE_PAGE_ENDS", "INTERRUPTED", "EXIT_CODES"])
def test_an_exception_for_nothing_is_removed(table: str) -> None:
    for start in getattr(tables, table):
        assert any(command.plain.startswith(start) for command in COMMANDS), (
            f"{table}: no command begins with {start!r}"
        )


def test_pages_with_a_folder_of_their_own_exist() -> None:
    assert set(tables.ALONE) <= set(pages())


def test_what_is_appended_comes_before_comments_and_redirections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ADDED", {"deepspeed": "a=1", "mixwright": "--json"})
    _, trained, *_ = found = commands_of("page.md", PAGE)
    assert with_added(found[0]) == "mixwright data stats runs/s --json   # how many"
    assert with_added(trained) == "deepspeed launch/pretrain.py \\\n    --config run.yaml a=1 &"


@pytest.mark.parametrize(
    "line",
    [
        "mixwright submt rpo configs/rpo/example.yaml", "mixwright submit rpo configs/rpo/example.yaml --worker 4",
        "mixwright submit rpo configs/rpo/exampel.yaml", "mixwright submit rpo configs/rpo/example.yaml run.nam=x",
        "python launch/study.py mixing --seedz 3", "make quikstart",
        "deepspeed launch/pretrain.py configs/quickstart.yaml",
        "deepspeed launch/pretrian.py --config configs/quickstart.yaml", "mixwright mix 'status",
    ],
)  # fmt: skip
def test_what_is_not_run_is_still_checked(line: str) -> None:
    [command] = commands_of("page.md", f"```bash\n{line}\n```\n")
    with pytest.raises((AssertionError, ConfigError)):
        check_unrun(command)


def inline() -> list[tuple[str, str]]:
    """Commands in running text, in backquotes."""
    found = []
    for page in pages():
        text = re.sub(r"(?ms)^ *```.*?^ *```", "", (ROOT / page).read_text(encoding="utf-8"))
        found += [(page, " ".join(code.split())) for code in re.findall(r"`((?:mixwright|make) [^`]+)`", text)]
    return sorted(set(found))


@pytest.mark.parametrize(("page", "text"), inline())
def test_a_command_in_running_text_exists_with_its_options(page: str, text: str) -> None:
    program, *words = [word for word in re.split(r"\s+", text.replace("[", "").replace("]", "")) if word]
    if program == "make":
        return check_targets([word for word in words if word not in ("...", "&&")][:1])
    command: Any = MIXWRIGHT
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    meant = [command, *getattr(command, "commands", {}).values()]
    known = {option for each in meant for one in each.params for option in (*one.opts, *one.secondary_opts)}
    assert command is not MIXWRIGHT or text.startswith(("mixwright --", "mixwright {")), f"{page}: `{text}`"
    assert not hasattr(command, "commands") or not words or not words[0][0].islower(), f"{page}: `{text}`"
    unknown = {word.split("=")[0] for word in words if word.startswith("--")} - known - {"--help"}
    assert not unknown, f"{page}: `{text}` has no {', '.join(sorted(unknown))}"


def test_no_command_is_in_two_tables_that_exclude_each_other() -> None:
    for command in COMMANDS:
        ways = [named(table, command) for table in (tables.NOT_HERE, tables.INTERRUPTED, tables.UNTIL_THE_PAGE_ENDS)]
        assert sum(way is not None for way in ways) <= 1, str(command)
        shlex.split(command.plain)


def test_every_page_with_commands_is_followed_by_one_test() -> None:
    """Pages with a folder of their own are named by the tests that make it; all others are found."""
    tests = "".join(path.read_text() for path in (ROOT / "tests/docs").glob("test_pages_*.py"))
    assert all(tests.count(f'"{page}"') == 1 for page in tables.ALONE)
