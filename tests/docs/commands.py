"""The commands that README.md and docs/ tell a reader to type, as they stand there."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NO_INSTRUCTIONS = ("decisions", "evidence", "api")
"""Folders of docs/ that tell nobody to type anything."""

PROGRAMS = ("mixwright", "deepspeed", "torchrun", "accelerate", "python", "python3", "make", "pip", "kubectl", "sbatch")
FENCE = re.compile(r"^(?P<indent> *)(?P<marks>`{3,}|~{3,}) *(?P<language>[\w+-]*)")
HEREDOC = re.compile(r"<<-?\s*[\"']?(\w+)[\"']?")


@dataclass(frozen=True)
class Block:
    """A fenced (or, without a language, an indented) block; `line` is that of its first line of text, from 1."""

    page: str
    line: int
    language: str | None
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """What is typed at one prompt: one line, or several that belong together."""

    page: str
    line: int
    text: str

    @property
    def plain(self) -> str:
        """In one line, without comments and repeated blanks: what tables name commands by."""
        return " ".join(re.sub(r"(^|\s)#\s[^\n]*", r"\1", self.text).replace("\\\n", " ").split())

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.plain}"


def pages() -> list[str]:
    """Paths of all pages with instructions, from the repository's root."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    names = [path.relative_to(ROOT) for path in found]
    return [str(name) for name in names if not (len(name.parts) > 2 and name.parts[1] in NO_INSTRUCTIONS)]


def blocks_of(page: str, text: str) -> Iterator[Block]:
    """Fenced blocks, and blocks that are set off by an indent of four after an empty line."""
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        fence = FENCE.match(lines[number])
        first = number + 1 if fence else number
        if fence:
            end = next((i for i in range(first, len(lines)) if lines[i].strip() == fence["marks"]), len(lines))
            indent = len(fence["indent"])
            yield Block(page, first + 1, fence["language"], tuple(line[indent:] for line in lines[first:end]))
            number = end + 1
        elif lines[number].startswith("    ") and number and not lines[number - 1].strip():
            end = next((i for i in range(first, len(lines)) if not lines[i].startswith("    ")), len(lines))
            yield Block(page, first + 1, None, tuple(line[4:] for line in lines[first:end]))
            number = end
        else:
            number += 1


def commands_of(page: str, text: str) -> list[Command]:
    """Commands of the page's bash and console blocks, in order."""
    found = []
    for block in blocks_of(page, text):
        if block.language == "bash":
            found += list(_split(block, list(block.lines)))
        elif block.language == "console":
            typed = [line.removeprefix("$ ") if line.startswith("$ ") else "" for line in block.lines]
            found += list(_split(block, typed))
    return found


def _split(block: Block, lines: list[str]) -> Iterator[Command]:
    """The lines at one prompt after the other: continued lines, here-documents and compound commands stay together."""
    pending: list[str] = []
    for offset, line in enumerate(lines):
        if not pending and (not line.strip() or line.lstrip().startswith("#")):
            continue
        pending.append(line)
        if is_whole(pending) or offset == len(lines) - 1:
            yield Command(block.page, block.line + offset - len(pending) + 1, "\n".join(pending))
            pending = []


def is_whole(lines: list[str]) -> bool:
    """Whether a shell would begin with these lines rather than ask for more."""
    if lines[-1].endswith("\\"):
        return False
    ends = [end for number, line in enumerate(lines) for end in HEREDOC.findall(line) if end not in lines[number + 1 :]]
    return not ends and syntax_error("\n".join(lines)) is None


def syntax_error(text: str) -> str | None:
    """What bash says against the text, if anything."""
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    return checked.stderr.strip() if checked.returncode else None


def all_commands() -> list[Command]:
    return [command for page in pages() for command in commands_of(page, (ROOT / page).read_text(encoding="utf-8"))]


def begins_like_a_command(line: str) -> bool:
    """Whether a reader would take the line for something to type."""
    try:
        words = shlex.split(line.removeprefix("$ "), comments=True)
    except ValueError:
        return False
    return len(words) > 1 and words[0].rsplit("/", 1)[-1] in PROGRAMS
