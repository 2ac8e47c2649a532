"""Reading documents: every format gives its texts in order, every bad one is named by file and line."""

from __future__ import annotations

import errno
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from mixwright.data_mixing.corpora import DatasetSource, DomainSource
from mixwright.data_mixing.documents import BadDocument, read_unit
from mixwright.data_mixing.errors import DataError
from mixwright.data_mixing.hub import dataset_units, spool_stream
from mixwright.data_mixing.staging import Resumable
from mixwright.data_mixing.units import file_units
from tests.data_mixing.corpora_for_tests import sentences, write_jsonl


def read(path: Path, unit_bytes: int = 1 << 20, **source: Any) -> list[str | BadDocument]:
    """All documents of a file."""
    units = file_units(path, DomainSource(paths=("x",), **source), unit_bytes)
    return [document for unit in units for document in read_unit(unit)]


def problems(path: Path, **source: Any) -> list[str]:
    """The bad documents of a file as they are reported, without its folder."""
    return [str(d).replace(f"{path.parent}/", "") for d in read(path, **source) if isinstance(d, BadDocument)]


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


# --- text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.py", "a", "LICENSE.md"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    text = "first line\r\n  été 木\n\n\tlast\0 line"
    assert read(written(tmp_path / name, text.encode())) == [text]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert read(written(tmp_path / "a.txt", "\ufeffabc".encode())) == ["abc"]
    assert read(written(tmp_path / "a.jsonl", '\ufeff{"text": "abc"}\n'.encode())) == ["abc"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_undecodable_bytes_are_named_by_line(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, b"one\ntwo\nthr\xffee\nfour")
    assert problems(path) == [f"{name}:3: not UTF-8 text: byte 0xff (invalid start byte)"]


def test_a_file_that_is_no_gzip_or_ends_early_is_a_bad_document(tmp_path: Path) -> None:
    assert problems(written_raw(tmp_path / "a.txt.gz", b"plain text")) == [
        "a.txt.gz: broken gzip file: Not a gzipped file (b'pl')"
    ]
    whole = gzip.compress("\n".join(json.dumps({"text": text}) for text in sentences(1, 500)).encode())
    found = read(written_raw(tmp_path / "b.jsonl.gz", whole[: len(whole) // 2]))
    assert found[:3] == sentences(1, 500)[:3]
    assert isinstance(found[-1], BadDocument)
    # The line that is cut is the one after the last that was read.
    assert str(found[-1]) == (
        f"{tmp_path}/b.jsonl.gz:{len(found)}: broken gzip file from here on: "
        "Compressed file ended before the end-of-stream marker was reached"
    )


def written_raw(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# --- JSONL -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz"])
def test_each_line_is_a_document_and_blank_lines_are_none(tmp_path: Path, name: str) -> None:
    content = b'{"text": "one"}\n\n  \r\n{"id": 3, "text": "t\\u00e9\\nwo"}\r\n{"text": "no newline at the end"}'
    assert read(written(tmp_path / name, content)) == ["one", "té\nwo", "no newline at the end"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{not json}", "not a JSON value: "),
        (b'{"text": "cut', "not a JSON value: Unterminated string"),
        (b"\xff\xfe", "not UTF-8 text: byte 0xff (invalid start byte)"),
        (b'{"txet": "x"}', "no field 'text'; did you mean 'txet'?"),
        (b"{}", "no field 'text'; valid names: "),
        (b"[1]", "expected a JSON object, found list"),
        (b'"text"', "expected a JSON object, found str"),
        (b'{"text": null}', "field 'text' is NoneType, expected a string"),
        (b'{"text": ["x"]}', "field 'text' is list, expected a string"),
        (b'{"text": "\\ud800 x"}', "unpaired surrogate at character 0 of '\\ud800 x'"),
        (b"[" * 100_000, "not a JSON value: nested too deeply"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path, line: bytes, problem: str) -> None:
    path = written(tmp_path / "a.jsonl", b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n')
    found = problems(path)
    assert len(found) == 1
    assert found[0].startswith(f"a.jsonl:3: {problem}")
    assert [d for d in read(path) if isinstance(d, str)] == ["one", "two"]


def test_the_text_field_can_be_named(tmp_path: Path) -> None:
    assert read(written(tmp_path / "a.jsonl", b'{"body": "one", "text": "two"}'), text_field="body") == ["one"]


@pytest.mark.parametrize("unit_bytes", [1, 2, 7, 16, 17, 40, 1000])
def test_units_of_any_size_give_the_same_documents_and_line_numbers(tmp_path: Path, unit_bytes: int) -> None:
    lines = ['{"text": "one"}', "", "bad", '{"text": "été"}', '{"text": ""}', "bad again", '{"text": "end"}']
    for ending in ("", "\n"):
        path = written(tmp_path / "a.jsonl", ("\n".join(lines) + ending).encode())
        assert read(path, unit_bytes) == read(path)
    assert [str(d).split(": ")[0][-9:] for d in read(path, unit_bytes) if isinstance(d, BadDocument)] == [
        "a.jsonl:3", "a.jsonl:6",
    ]  # fmt: skip


# --- Parquet ---------------------------------------------------------------------------------------------------


def test_parquet_rows_are_documents_over_all_row_groups(tmp_path: Path) -> None:
    texts = sentences(4, 25)
    pq.write_table(pa.table({"id": range(25), "text": texts}), tmp_path / "a.parquet", row_group_size=10)
    assert len(file_units(tmp_path / "a.parquet", DomainSource(paths=("x",)))) == 3
    assert read(tmp_path / "a.parquet") == texts


def test_a_null_in_parquet_is_named_by_its_row_in_the_file(tmp_path: Path) -> None:
    texts = ["a", "b", "c", None, "e"]
    pq.write_table(pa.table({"text": pa.array(texts, pa.large_string())}), tmp_path / "a.parquet", row_group_size=2)
    assert problems(tmp_path / "a.parquet") == ["a.parquet: row 3: field 'text' is null, expected a string"]


def test_parquet_without_a_text_column_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"texts": ["x"], "n": [1], "raw": [b"x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: no column 'text'; did you mean 'texts'\?"):
        read(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: column 'raw' has type binary, expected string"):
        read(tmp_path / "a.parquet", text_field="raw")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet" * 50])
def test_garbage_for_parquet_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"a.parquet: not a Parquet file: "):
        read(written(tmp_path / "a.parquet", content))


# --- docstrings ------------------------------------------------------------------------------------------------

SOURCE = '''"""Module."""
import os
def f():
    """Function."""
    def inner():
        """Inner
        of two lines."""
class C:
    """Class."""
    if True:
        async def g(self): """Async method."""
try:
    x = "\\d"
except ValueError:
    def late():
        """Late."""
def none(): pass
'''


def test_half_a_surrogate_pair_in_a_docstring_is_named_by_line(tmp_path: Path) -> None:
    path = written(tmp_path / "m.py", b'x = 1\ndef f():\n    """A \\ud800 b."""\n')
    assert problems(path, format="docstrings") == ["m.py:2: unpaired surrogate at character 2 of 'A \\ud800 b.'"]


def test_docstrings_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path / "m.py", SOURCE.encode())
    expected = ["Module.", "Function.", "Inner\nof two lines.", "Class.", "Async method.", "Late."]
    assert read(path, format="docstrings") == expected


def test_a_file_that_is_no_python_is_named_by_line(tmp_path: Path) -> None:
    path = written(tmp_path / "m.py", b"x = 1\nprint 'two'\n")
    assert problems(path, format="docstrings")[0].startswith("m.py:2: not valid Python: Missing parentheses")
    nul = written(tmp_path / "n.py", b"x\0y")
    assert "not valid Python: source code string cannot contain null bytes" in problems(nul, format="docstrings")[0]
    for depth in (5_000, 20_000):  # the compiler gives up at one, the parser at the other
        deep = written(tmp_path / "d.py", b"-" * depth + b"1\n")
        assert problems(deep, format="docstrings") == ["d.py: not valid Python: nested too deeply"]


# --- files that cannot be read ---------------------------------------------------------------------------------


def test_a_file_that_vanished_is_one_clear_error(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", b"x")
    units = file_units(path, DomainSource(paths=("x",)))
    path.unlink()
    with pytest.raises(DataError, match=r"a.txt: cannot be read: No such file or directory$"):
        list(read_unit(units[0]))
    with pytest.raises(DataError, match=r"a.txt: cannot be read: No such file or directory$"):
        file_units(path, DomainSource(paths=("x",)))


def test_storage_that_fails_can_be_continued_when_it_is_back(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.symlink_to("/proc/self/mem")  # reading its first byte is a real EIO
    with pytest.raises(Resumable, match=r"a.txt: cannot be read: Input/output error; .*: it continues$"):
        read(path)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), Resumable),
        (ConnectionError("could not reach the hub"), Resumable),
        (FileNotFoundError("no such dataset on the hub"), DataError),
        (ValueError("unknown split"), DataError),
    ],
)
def test_a_dataset_out_of_reach_can_be_continued_and_a_wrong_one_cannot(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[DataError]
) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"^dataset 'someone/text' split 'train': cannot be loaded: ") as raised:
        read_dataset(DatasetSource(path="someone/text"))
    assert type(raised.value) is kind
    assert ("run the same command again: it continues" in str(raised.value)) == (kind is Resumable)


# --- Hugging Face datasets -------------------------------------------------------------------------------------


def read_dataset(source: DatasetSource, **domain: Any) -> list[str | BadDocument]:
    units = dataset_units(source, DomainSource(dataset=source, **domain), unit_bytes=1000)
    assert len(units) > 1
    return [document for unit in units for document in read_unit(unit)]


def test_a_saved_dataset_is_read_by_ranges_of_rows(tmp_path: Path) -> None:
    texts = sentences(5, 40)
    table = Dataset.from_dict({"id": list(range(40)), "text": texts})
    table.save_to_disk(str(tmp_path / "one"))
    DatasetDict(train=table).save_to_disk(str(tmp_path / "split"))
    assert read_dataset(DatasetSource(path=str(tmp_path / "one"))) == texts
    assert read_dataset(DatasetSource(path=str(tmp_path / "split"))) == texts


def test_a_folder_of_data_files_is_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    texts = sentences(6, 40)
    write_jsonl(tmp_path / "data" / "train.jsonl", texts)
    assert read_dataset(DatasetSource(path=str(tmp_path / "data"))) == texts


def test_a_null_in_a_dataset_is_named_by_row(tmp_path: Path) -> None:
    Dataset.from_dict({"text": [*sentences(5, 30), None]}).save_to_disk(str(tmp_path / "d"))
    bad = read_dataset(DatasetSource(path=str(tmp_path / "d")))[-1]
    assert str(bad) == f"dataset '{tmp_path}/d' split 'train': row 30: field 'text' is null, expected a string"


def test_a_dataset_that_is_not_there_or_lacks_the_column_is_refused(tmp_path: Path) -> None:
    Dataset.from_dict({"texts": ["a"]}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match=r"no column 'text'; did you mean 'texts'\?"):
        read_dataset(DatasetSource(path=str(tmp_path / "d")))
    for streaming in (False, True):
        with pytest.raises(DataError, match=r"dataset '.*nowhere' split 'train': cannot be loaded: "):
            read_dataset(DatasetSource(path=str(tmp_path / "nowhere"), streaming=streaming))


def test_a_stream_is_spooled_in_a_seeded_order_up_to_max_bytes(tmp_path: Path) -> None:
    texts = sentences(7, 200)
    write_jsonl(tmp_path / "data" / "train.jsonl", texts)
    dataset = DatasetSource(path=str(tmp_path / "data"), streaming=True)
    source = DomainSource(dataset=dataset, max_bytes=10_000)

    def spooled(folder: str, seed: int) -> list[str | BadDocument]:
        units = spool_stream(dataset, source, tmp_path / folder, seed)
        return [document for unit in units for document in read_unit(unit)]

    found = spooled("one", 3)
    assert set(found) < set(texts)
    assert found != texts[: len(found)]
    assert sum(len(str(text).encode()) for text in found) >= 9_000
    assert spooled("two", 3) == found
    assert spooled("three", 4) != found
    assert spooled("one", 4) == found, "a spool that is there is complete and is not fetched again"


def test_a_bad_record_of_a_stream_is_named_by_its_place_in_the_stream(tmp_path: Path) -> None:
    records = [{"text": text} for text in sentences(7, 30)]
    records[11] = {"text": None}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    dataset = DatasetSource(path=str(tmp_path / "data"), streaming=True)
    units = spool_stream(dataset, DomainSource(dataset=dataset), tmp_path / "spool", 0, unit_bytes=1000)
    per_unit = [len(list(read_unit(unit))) for unit in units]
    assert len(units) > 5
    assert sum(per_unit) == 30
    assert [unit.first_line for unit in units] == [1 + sum(per_unit[:i]) for i in range(len(units))]
    found = [document for unit in units for document in read_unit(unit)]
    (place,) = [i for i, document in enumerate(found, 1) if isinstance(document, BadDocument)]
    expected = f"dataset '{tmp_path}/data' split 'train':{place}: field 'text' is NoneType, expected a string"
    assert str(found[place - 1]) == expected


def test_a_stream_that_breaks_off_can_be_continued_and_leaves_no_spool(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "data" / "train-0.jsonl", sentences(7, 300))
    written_raw(tmp_path / "data" / "train-1.jsonl.gz", gzip.compress(first.read_bytes())[:-1000])
    dataset = DatasetSource(path=str(tmp_path / "data"), streaming=True)
    with pytest.raises(Resumable, match=r"dataset '.*' split 'train': stream broke off: "):
        spool_stream(dataset, DomainSource(dataset=dataset), tmp_path / "spool", 0)
    assert not (tmp_path / "spool").exists()
