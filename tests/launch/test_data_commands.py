"""`mixwright data` as a user meets it: what it prints, its exit codes, one line for every mistake."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from mixwright.data_mixing.corpora import find_files, load_corpora_config
from mixwright.data_mixing.errors import ConfigError, DataError
from mixwright.data_mixing.store import TokenStore
from mixwright.data_mixing.tokenizer import load_tokenizer
from mixwright.launch.data import app
from tests.data_mixing.corpora_for_tests import corpora_tree, sentences, two_domains, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: object) -> Result:
    """A command that succeeds; the error it raised otherwise."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def command_line(arguments: Sequence[object], cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a shell would start it."""
    words = [sys.executable, "-m", "mixwright.launch.cli", "data", *map(str, arguments)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)


def write_config(folder: Path, **changes: object) -> Path:
    tree = corpora_tree(Path("store"), two_domains(folder))
    tree.update(changes)
    path = folder / "corpora.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    assert run("prepare", write_config(folder)).exit_code == 0
    return folder / "store"


def test_prepare_shows_what_the_store_holds_and_a_second_time_that_it_is_done(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    first = command_line(["prepare", config], tmp_path)
    assert first.returncode == 0
    assert "17 tokens per row, vocabulary 300" in first.stdout
    store = TokenStore.open(tmp_path / "store")
    for name in ("a", "b"):
        (line,) = [line for line in first.stdout.splitlines() if line.startswith(f"│ {name} ")]
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        rows = [f"{store.num_rows(name, split):,}" for split in ("train", "validation", "test")]
        assert cells[4:] == rows
    assert "100%" in first.stderr
    second = command_line(["prepare", config], tmp_path)
    assert (second.returncode, second.stdout) == (0, f"{tmp_path}/store is complete and up to date: nothing to do\n")


def test_prepare_takes_overrides_and_replaces_only_when_asked(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    run("prepare", config, "sequence_length=8", "output=other")
    assert TokenStore.open(tmp_path / "other").row_width == 9
    with pytest.raises(DataError, match=r"another configuration \(sequence_length differ\)"):
        run("prepare", config, "sequence_length=9", "output=other")
    run("prepare", config, "sequence_length=9", "output=other", "--replace")
    assert TokenStore.open(tmp_path / "other").row_width == 10


def test_what_was_left_out_and_what_is_missing_is_printed(tmp_path: Path) -> None:
    config = write_config(tmp_path, on_bad_document="skip")
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(b"".join([*lines, lines[0], b"[red]no json[/red]\n"]))
    write_jsonl(tmp_path / "b.jsonl", sentences(2, 1))
    printed = run("prepare", config).output
    assert "left out of a: 1 duplicate, 1 bad" in printed
    assert f"skipped: {tmp_path}/a.jsonl:62: not a JSON value" in printed
    assert "warning: domain 'b' has no validation row (0 documents)" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "none.yaml"], "error: none.yaml: no such file; valid names: corpora.yaml"),
        (["prepare", "corpora.yaml", "seqence_length=8"], "error: corpora.yaml: seqence_length: unknown key; did you"),
        (["prepare", "corpora.yaml", "domains.a.paths=[x.jsonl]"], "error: domain 'a': {folder}/x.jsonl: no such file"),
        (["stats", "."], "error: .: not a token store (no manifest.json); make one with `mixwright data prepare`"),
        (["show", "nowhere", "a", "0"], "error: nowhere: not a token store"),
    ],
)
def test_a_mistake_is_one_line_on_standard_error_and_exit_code_2(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    write_config(tmp_path)
    found = command_line(arguments, tmp_path)
    assert found.returncode == 2
    assert found.stdout == ""
    (line,) = [line for line in found.stderr.splitlines() if line.strip()]
    assert line.startswith(message.format(folder=tmp_path))


def test_show_prints_the_text_of_a_row(prepared: Path) -> None:
    store = TokenStore.open(prepared)
    ids = store.rows("b", "test", 2, 1)[0].tolist()
    shown = run("show", prepared, "b", "2", "--split", "test")
    assert shown.stdout == load_tokenizer(store.tokenizer_folder).decode(ids) + "\n"
    assert shown.stderr == f"b test row 2 of {store.num_rows('b', 'test')}, 17 tokens\n"
    assert run("show", prepared, "b", "2", "--split", "test", "--ids").stdout.split() == list(map(str, ids))


def test_show_names_a_row_or_domain_that_is_not_there(prepared: Path) -> None:
    with pytest.raises(DataError, match=r"domain 'a' has \d+ train rows; there is no row 99999"):
        run("show", prepared, "a", "99999")
    with pytest.raises(DataError, match="no domain 'c'; valid names: a, b"):
        run("show", prepared, "c", "0")
    assert run("show", prepared, "a", "0", "--split", "valid").exit_code == 2


def test_stats_prints_the_table_of_prepare(prepared: Path) -> None:
    printed = run("stats", prepared).output
    assert all(heading in printed for heading in ("domain", "documents", "train rows", "│ a ", "│ b "))


def test_verify_reads_everything_and_names_every_file_that_differs(prepared: Path, tmp_path: Path) -> None:
    store = TokenStore.open(prepared)
    rows = sum(split.num_rows for domain in store.manifest.domains for split in domain.splits.values())
    assert f"{rows:,} rows are as recorded; fingerprint {store.fingerprint}" in run("verify", prepared).stdout
    copy = shutil.copytree(prepared, tmp_path / "copy")
    for name in ("a/test-00000.arrow", "b/train-00000.arrow"):
        content = np.fromfile(copy / name, np.uint8)
        content[len(content) // 2] ^= 1
        content.tofile(copy / name)
    found = command_line(["verify", "copy"], tmp_path)
    assert found.returncode == 2
    assert found.stderr.count("a/test-00000.arrow: ") >= 1
    assert found.stderr.count("b/train-00000.arrow: ") >= 1
    assert "Traceback" not in found.stderr


# --- the configurations that come with the project --------------------------------------------------------------


def test_the_quickstart_corpora_name_at_least_four_domains_that_are_all_here() -> None:
    config = load_corpora_config(ROOT / "configs" / "quickstart_corpora.yaml")
    files = {name: find_files(name, source, ROOT / "configs") for name, source in config.domains.items()}
    assert len(files) >= 4
    for name, source in config.domains.items():
        assert sum(file.stat().st_size for file in files[name]) > (source.max_bytes or 0) > 0
    assert sum(source.max_bytes or 0 for source in config.domains.values()) < 8e6
    assert sum(file.stat().st_size for found in files.values() for file in found) < 40e6, "read within seconds"


def test_the_shared_corpora_configuration_is_valid() -> None:
    config = load_corpora_config(ROOT / "configs" / "shared_corpora.yaml")
    base = ROOT / "configs"
    if not (ROOT.parent / "shared" / "data" / "corpus").is_dir():
        with pytest.raises(DataError, match="no such file"):
            find_files("books", config.domains["books"], base)
        pytest.skip("the shared corpora are not on this machine")
    assert all(find_files(name, source, base) for name, source in config.domains.items())


def test_a_configuration_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"c\.yaml: not valid YAML"):
        run("prepare", tmp_path / "c.yaml")
