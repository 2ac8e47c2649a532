"""Commands of ours run in this process, through the door that `mixwright` uses, with streams as strict as real ones."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from unittest import mock

from mixwright.launch import cli

EXIT_CODES = {0, 1, 2, 3, 75}
"""All that `launch/ending.py` documents, but for Ctrl-C."""


@dataclass(frozen=True)
class Ended:
    """How a command ended. An error that the command line would show as a traceback is raised instead."""

    code: int
    output: str
    errors: str


def mixwright(*arguments: str) -> Ended:
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict", write_through=True)
    errors = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
    with (
        mock.patch.object(sys, "argv", ["mixwright", *arguments]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        code: object = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
    assert isinstance(code, int)
    texts = (stream.buffer.getvalue().decode() for stream in (output, errors))  # type: ignore[attr-defined]
    return Ended(code, *texts)
