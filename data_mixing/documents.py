"""Documents: text out of units, in order, with every unusable one reported as file:line."""

from __future__ import annotations

import ast
import gzip
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from mixwright.data_mixing.errors import nearest
from mixwright.data_mixing.hub import read_dataset_rows
from mixwright.data_mixing.plain_data import parse_json
from mixwright.data_mixing.staging import storage_error
from mixwright.data_mixing.units import Unit

_BROKEN_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)


@dataclass(frozen=True)
class BadDocument:
    """A document that cannot be used: where it is (file:line or file:row) and what is wrong with it."""

    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


def read_unit(unit: Unit) -> Iterator[str | BadDocument]:
    """The documents of a unit, in order; raises DataError when the file itself cannot be read (Resumable: for now)."""
    readers: dict[str, Callable[[Unit], Iterator[str | BadDocument]]] = {
        "text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet,
        "docstrings": _read_docstrings, "dataset": _read_table,
    }  # fmt: skip
    try:
        yield from readers[unit.format](unit)
    except OSError as error:
        raise storage_error(f"{unit.path}: cannot be read", error) from None


# --- readers ----------------------------------------------------------------------------------------------------


def _open(path: Path) -> BinaryIO:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _read_bytes(path: Path) -> bytes:
    with _open(path) as file:
        return file.read()


def _read_text(unit: Unit) -> Iterator[str | BadDocument]:
    """The whole file is one document."""
    try:
        content = _read_bytes(unit.path)
        yield content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield _undecodable(unit.at(content.count(b"\n", 0, error.start)), error)
    except _BROKEN_GZIP as error:
        yield BadDocument(str(unit.path), f"broken gzip file: {error}")


def _undecodable(where: str, error: UnicodeDecodeError) -> BadDocument:
    return BadDocument(where, f"not UTF-8 text: byte 0x{error.object[error.start]:02x} ({error.reason})")


def _read_jsonl(unit: Unit) -> Iterator[str | BadDocument]:
    """One document per line. A line belongs to the unit in which it starts."""
    with _open(unit.path) as file:
        if unit.start:
            file.seek(unit.start - 1)
            file.readline()
        number = -1
        try:
            for number, line in enumerate(_lines(file, unit)):
                document = _parse_line(line, unit.text_field)
                if isinstance(document, BadDocument):
                    yield BadDocument(unit.at(number + _lines_before(unit)), document.problem)
                elif document is not None:
                    yield document
        except _BROKEN_GZIP as error:
            yield BadDocument(unit.at(number + 1), f"broken gzip file from here on: {error}")


def _lines(file: BinaryIO, unit: Unit) -> Iterator[bytes]:
    """Lines that start before the unit's end; a gzip file is one unit, whose bytes are counted compressed."""
    position = file.tell()
    whole = unit.path.suffix == ".gz"
    while (whole or position < unit.stop) and (line := file.readline()):
        yield line
        position += len(line)


def _lines_before(unit: Unit) -> int:
    """Lines that start before this unit: counted only when an error must be named."""
    if not unit.start:
        return 0
    count, left = 0, unit.start
    with unit.path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            count += block.count(b"\n")
            left -= len(block)
        file.seek(unit.start - 1)
        # A line that runs into this unit belongs to the one before.
        return count + (file.read(1) != b"\n")


def _parse_line(line: bytes, text_field: str) -> str | BadDocument | None:
    """The text of one JSON line; None for a blank one."""
    if not line.strip():
        return None
    try:
        record = parse_json(line.decode("utf-8-sig").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return _undecodable("", error)
    except ValueError as error:
        return BadDocument("", f"not a JSON value: {error}")
    if not isinstance(record, dict):
        return BadDocument("", f"expected a JSON object, found {type(record).__name__}")
    return _text_of(record, text_field)


def _text_of(record: dict[str, Any], text_field: str) -> str | BadDocument:
    if text_field not in record:
        return BadDocument("", f"no field {text_field!r}{nearest(text_field, record)}")
    text = record[text_field]
    if not isinstance(text, str):
        return BadDocument("", f"field {text_field!r} is {type(text).__name__}, expected a string")
    return _without_surrogates(text, "")


def _without_surrogates(text: str, where: str) -> str | BadDocument:
    """An escape may stand for half a surrogate pair ("\\ud800"), which is no Unicode text and has no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return BadDocument(where, f"unpaired surrogate at character {error.start} of {text[:40]!r}")
    return text


def _read_parquet(unit: Unit) -> Iterator[str | BadDocument]:
    """One document per row of one row group."""
    try:
        with pq.ParquetFile(unit.path) as file:
            row = sum(file.metadata.row_group(i).num_rows for i in range(unit.start))
            batches = file.iter_batches(row_groups=[unit.start], columns=[unit.text_field])
            yield from _texts((text for batch in batches for text in batch.column(0)), unit, row)
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        yield BadDocument(str(unit.path), f"broken Parquet file: {' '.join(str(error).split())}")


def _texts(values: Iterable[Any], unit: Unit, first_row: int) -> Iterator[str | BadDocument]:
    for row, value in enumerate(values, first_row):
        text = value.as_py() if isinstance(value, pa.Scalar) else value
        if isinstance(text, str):
            yield text
        else:
            found = "null" if text is None else type(text).__name__
            yield BadDocument(
                f"{unit.label or unit.path}: row {row}", f"field {unit.text_field!r} is {found}, expected a string"
            )


def _read_docstrings(unit: Unit) -> Iterator[str | BadDocument]:
    """Each docstring of a Python file is one document, in the order of the file, with its indentation removed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's string literals
            tree = ast.parse(_read_bytes(unit.path))
    except SyntaxError as error:
        yield BadDocument(unit.at((error.lineno or 1) - 1), f"not valid Python: {error.msg}")
    except ValueError as error:
        yield BadDocument(str(unit.path), f"not valid Python: {error}")
    except (RecursionError, MemoryError):  # the second is what the parser says when its own stack is full
        yield BadDocument(str(unit.path), "not valid Python: nested too deeply")
    except _BROKEN_GZIP as error:
        yield BadDocument(str(unit.path), f"broken gzip file: {error}")
    else:
        for node in _documented(tree):
            if text := ast.get_docstring(node):
                yield _without_surrogates(text, unit.at(getattr(node, "lineno", 1) - 1))


def _documented(node: ast.AST) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Nodes that can have a docstring, in the order of the file; only statements are searched, not expressions."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield node
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        for statement in getattr(node, block, ()):
            yield from _documented(statement)


def _read_table(unit: Unit) -> Iterator[str | BadDocument]:
    """One document per row of a `datasets` table."""
    yield from _texts(read_dataset_rows(unit), unit, unit.start)
