"""Reading rows: what gather returns is what was written, in the order asked for, or one clear error."""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from mixwright.data_mixing.domain import Cap
from mixwright.data_mixing.errors import DataError, StoreChanged
from mixwright.data_mixing.manifest import MANIFEST, read_manifest, write_manifest
from mixwright.data_mixing.row_files import open_rows, write_rows
from mixwright.data_mixing.store import TokenStore
from tests.data_mixing.corpora_for_tests import random_rows, write_store

ROWS = random_rows(7, {"wiki": 30, "code": 8, "law": 1, "math": 13})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store") / "s", ROWS)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(made, tmp_path / "s")


def test_gather_returns_rows_of_mixed_domains_in_the_order_asked_for(made: Path) -> None:
    store, chance = TokenStore.open(made), np.random.default_rng(1)
    names = list(ROWS)
    for split in ("train", "validation", "test"):
        domain_n = chance.integers(0, len(names), 500)
        row_n = np.array([chance.integers(len(ROWS[names[g]][split])) for g in domain_n])
        expected = np.stack([ROWS[names[g]][split][r] for g, r in zip(domain_n, row_n, strict=True)])
        found = store.gather(domain_n, row_n, split)
        assert found.dtype == np.uint16
        assert np.array_equal(found, expected)


def test_gather_of_one_domain_may_repeat_rows_and_go_backwards(made: Path) -> None:
    row_n = np.array([5, 4, 5, 0, 29, 8, 7])
    found = TokenStore.open(made).gather(np.zeros(7, int), row_n)
    assert np.array_equal(found, ROWS["wiki"]["train"][row_n])


def test_gather_of_nothing_has_no_rows_of_full_width(made: Path) -> None:
    assert TokenStore.open(made).gather(np.array([], int), np.array([], int)).shape == (0, 9)


def test_what_gather_returns_can_be_written_to_without_changing_the_store(made: Path) -> None:
    store = TokenStore.open(made)
    store.rows("code", "train", 0, 3)[:] = 0
    assert np.array_equal(store.rows("code", "train", 0, 3), ROWS["code"]["train"][:3])


def test_rows_of_a_split_are_consecutive_over_the_boundary_of_files(made: Path) -> None:
    store = TokenStore.open(made)
    assert np.array_equal(store.rows("math", "validation", 6, 7), ROWS["math"]["validation"][6:13])
    assert store.num_rows("math", "validation") == 13
    assert store.rows("law", "test", 0, 0).shape == (0, 9)


def test_rows_of_uint32_come_back_as_they_were(tmp_path: Path) -> None:
    rows = random_rows(3, {"a": 5}, dtype="uint32")
    rows["a"]["train"] += 70_000
    store = TokenStore.open(write_store(tmp_path / "s", rows))
    assert np.array_equal(store.rows("a", "train", 0, 5), rows["a"]["train"])


def test_a_file_of_equal_batches_is_one_strided_view(tmp_path: Path) -> None:
    rows_NW = random_rows(5, {"a": 11})["a"]["train"]
    path = write_arrow(tmp_path / "x.arrow", [rows_NW[0:4], rows_NW[4:8], rows_NW[8:11]])
    view = open_rows(path, 9, "uint16", 11)
    assert view.strided is not None
    assert np.array_equal(view.take(np.array([10, 0, 7, 3, 10])), rows_NW[[10, 0, 7, 3, 10]])


@pytest.mark.parametrize("cuts", [[0, 3, 4, 11], [0, 2, 11], [0, 4, 8, 9, 11]])
def test_a_file_of_unequal_batches_is_read_batch_by_batch(tmp_path: Path, cuts: list[int]) -> None:
    rows_NW = random_rows(5, {"a": 11})["a"]["train"]
    path = write_arrow(tmp_path / "x.arrow", [rows_NW[a:b] for a, b in itertools.pairwise(cuts)])
    view = open_rows(path, 9, "uint16", 11)
    assert view.strided is None
    assert np.array_equal(view.take(np.array([10, 0, 7, 3, 2, 10])), rows_NW[[10, 0, 7, 3, 2, 10]])


def test_datasets_reads_the_same_rows_from_the_file(made: Path) -> None:
    table = Dataset.from_file(str(made / "wiki" / "train-00001.arrow"))
    assert np.array_equal(np.array(table["tokens"]), ROWS["wiki"]["train"][8:16])


def test_domains_carry_rows_fingerprints_and_caps(made: Path) -> None:
    cap = Cap(max_epochs=4, on_exhaust="stop")
    domains = TokenStore.open(made).domains({"law": cap})
    assert [(d.name, d.num_rows, d.cap) for d in domains] == [
        ("wiki", 30, Cap()), ("code", 8, Cap()), ("law", 1, cap), ("math", 13, Cap()),
    ]  # fmt: skip
    assert len({d.fingerprint for d in domains}) == 4


@pytest.mark.parametrize(
    ("domain", "row", "split", "message"),
    [
        (0, 30, "train", r"domain 'wiki' has 30 train rows; there is no row 30$"),
        (1, -1, "test", r"domain 'code' has 8 test rows; there is no row -1$"),
        (4, 0, "train", r"no domain with index 4; there are 4$"),
        (-1, 0, "train", r"no domain with index -1; there are 4$"),
        (0, 0, "valid", r"no split 'valid'; did you mean 'validation'\?$"),
    ],
)
def test_gather_names_what_does_not_exist(made: Path, domain: int, row: int, split: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        TokenStore.open(made).gather(np.array([0, domain]), np.array([0, row]), split)


def test_an_unknown_domain_name_gets_the_nearest_one(made: Path) -> None:
    store = TokenStore.open(made)
    for ask in (lambda: store.num_rows("cod"), lambda: store.domains({"cod": Cap()})):
        with pytest.raises(DataError, match="no domain 'cod'; did you mean 'code'"):
            ask()


# --- a store that is not what it was ---------------------------------------------------------------------------


def test_a_folder_without_manifest_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not a token store \(no manifest.json\); make one with `mixwright data prep"):
        TokenStore.open(tmp_path)


def test_another_format_version_is_refused(folder: Path) -> None:
    path = folder / MANIFEST
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(DataError, match="format version 2, this release reads 1"):
        TokenStore.open(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"format_version": 1}', "\x00\x01"])
def test_garbage_for_a_manifest_is_one_clear_error(folder: Path, content: str) -> None:
    (folder / MANIFEST).write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json: "):
        TokenStore.open(folder)


def test_a_missing_file_is_seen_at_opening(folder: Path) -> None:
    (folder / "math" / "test-00001.arrow").unlink()
    with pytest.raises(StoreChanged, match=r"math/test-00001.arrow: No such file .*prepare the store again"):
        TokenStore.open(folder)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_seen_at_opening(folder: Path, change: int) -> None:
    path = folder / "code" / "train-00000.arrow"
    content = path.read_bytes()
    path.write_bytes(content[:-1] if change < 0 else content + b"\0")
    with pytest.raises(
        StoreChanged, match=f"train-00000.arrow: {len(content) + change} bytes, the manifest .*{len(content)}"
    ):
        TokenStore.open(folder)


def test_a_file_replaced_by_one_of_equal_size_is_seen_at_its_first_row(folder: Path) -> None:
    store = TokenStore.open(folder)
    shutil.copy(folder / "code" / "test-00000.arrow", folder / "code" / "train-00000.arrow")
    assert store.rows("wiki", "train", 0, 1).shape == (1, 9)
    with pytest.raises(StoreChanged, match=r"code/train-00000.arrow: its content is not what the manifest recorded"):
        store.rows("code", "train", 0, 1)


def test_touching_files_changes_nothing(folder: Path) -> None:
    for path in folder.rglob("*.arrow"):
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    assert np.array_equal(TokenStore.open(folder).rows("code", "train", 0, 8), ROWS["code"]["train"])


def test_a_store_that_is_replaced_while_open_is_read_to_the_end_from_the_old_files(folder: Path) -> None:
    store = TokenStore.open(folder)
    store.rows("code", "train", 0, 1)
    shutil.rmtree(folder)
    assert np.array_equal(store.rows("code", "train", 0, 8), ROWS["code"]["train"])


def test_a_file_that_is_written_into_while_it_is_mapped_is_seen_at_the_next_gather(folder: Path) -> None:
    store, path = TokenStore.open(folder), folder / "code" / "train-00000.arrow"
    old_NW = store.rows("code", "train", 0, 8)
    content = bytearray(path.read_bytes())
    at = content.index(old_NW[5].tobytes())
    content[at : at + 2] = (old_NW[5, :1] + 1).tobytes()
    overwrite(path, bytes(content))
    with pytest.raises(StoreChanged, match=r"code/train-00000.arrow: its content is not what the manifest recorded"):
        store.rows("code", "train", 0, 1)
    assert store.rows("wiki", "train", 0, 1).shape == (1, 9)


@pytest.mark.parametrize("num_rows", [8, 4000])
def test_a_file_that_was_changed_after_a_run_began_is_compared_in_full(tmp_path: Path, num_rows: int) -> None:
    rows = random_rows(1, {"code": num_rows, "wiki": 8})
    folder = write_store(tmp_path / "s", rows, rows_per_file=num_rows)
    path, began_ns = folder / "code" / "train-00000.arrow", time.time_ns()
    content = bytearray(path.read_bytes())
    at = content.index(rows["code"]["train"][num_rows // 3].tobytes())
    content[at] ^= 1
    overwrite(path, bytes(content))
    os.utime(path, ns=(began_ns + 1, began_ns + 1))
    store = TokenStore.open(folder, compare_since_ns=began_ns)
    assert store.rows("wiki", "train", 0, 1).shape == (1, 9)
    with pytest.raises(StoreChanged, match=r"code/train-00000.arrow: its content is not what the manifest recorded"):
        store.rows("code", "train", 0, 1)
    content[at] ^= 1
    overwrite(path, bytes(content))
    assert np.array_equal(store.rows("code", "train", 0, num_rows), rows["code"]["train"])


@pytest.mark.parametrize("left", [0, 1, 100])
def test_a_mapped_file_that_is_cut_is_an_error_and_not_the_end_of_the_process(folder: Path, left: int) -> None:
    store, path = TokenStore.open(folder), folder / "code" / "train-00000.arrow"
    store.rows("code", "train", 0, 8)
    os.truncate(path, left)
    with pytest.raises(StoreChanged, match=f"code/train-00000.arrow: {left} bytes, the manifest recorded"):
        store.rows("code", "train", 0, 8)


def test_a_mapped_file_of_another_time_or_another_inode_is_read_on(folder: Path) -> None:
    store, path = TokenStore.open(folder), folder / "code" / "train-00000.arrow"
    store.rows("code", "train", 0, 1)
    overwrite(path, path.read_bytes())
    os.utime(path, (1, 1))
    assert np.array_equal(store.rows("code", "train", 0, 8), ROWS["code"]["train"])
    shutil.copy(folder / "wiki" / "train-00000.arrow", folder / "other")
    (folder / "other").replace(path)
    assert np.array_equal(store.rows("code", "train", 0, 8), ROWS["code"]["train"])


def overwrite(path: Path, content: bytes) -> None:
    """In place: whoever has mapped the file reads the new content."""
    with path.open("r+b") as file:
        file.write(content)


@pytest.mark.parametrize(
    ("rows_per_file", "num_rows", "message"),
    [
        (8, 1_000_000, r"domain 'wiki' has 1000000 train rows in files of \[8, 8, 8, 6\], expected files of 8 rows"),
        (9, 30, r"in files of \[8, 8, 8, 6\], expected files of 9 rows and a last one of the rest"),
        (5, 30, r"in files of \[8, 8, 8, 6\], expected files of 5 rows and a last one of the rest"),
    ],
)
def test_numbers_of_rows_that_contradict_each_other_never_reach_the_memory_map(
    folder: Path, rows_per_file: int, num_rows: int, message: str
) -> None:
    manifest = read_manifest(folder)
    wiki = manifest.domains[0]
    train = wiki.splits["train"].model_copy(update={"num_rows": num_rows})
    changed = wiki.model_copy(update={"splits": {**wiki.splits, "train": train}})
    domains = (changed, *manifest.domains[1:])
    write_manifest(folder, manifest.model_copy(update={"domains": domains, "rows_per_file": rows_per_file}))
    with pytest.raises(StoreChanged, match=message):
        TokenStore.open(folder).rows("wiki", "train", num_rows - 1, 1)


def test_a_last_file_that_is_too_long_never_reaches_the_memory_map(folder: Path) -> None:
    manifest = read_manifest(folder)
    without_wiki = {"rows_per_file": 7, "domains": manifest.domains[1:]}
    with pytest.raises(StoreChanged, match=r"domain 'code' has 8 train rows in files of \[8\]"):
        TokenStore(folder, manifest.model_copy(update=without_wiki)).num_rows("code")


def test_a_file_with_other_columns_or_fewer_rows_is_refused(tmp_path: Path) -> None:
    rows_NW = random_rows(5, {"a": 4})["a"]["train"]
    path = write_arrow(tmp_path / "x.arrow", [rows_NW])
    for width, dtype, num_rows, message in (
        (8, "uint16", 4, r"expected fixed_size_list<item: uint16>\[8\]"),
        (9, "uint32", 4, "uint32"),
        (9, "uint16", 5, "holds 4 rows, the manifest says 5"),
    ):
        with pytest.raises(StoreChanged, match=message):
            open_rows(path, width, dtype, num_rows)
    path.write_bytes(b"not arrow at all" * 10)
    with pytest.raises(StoreChanged, match="not a readable row file"):
        open_rows(path, 9, "uint16", 4)


# --- many domains ----------------------------------------------------------------------------------------------


@pytest.fixture
def few_open_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_three_hundred_domains_are_read_with_a_hundred_file_descriptors(tmp_path: Path, few_open_files: None) -> None:
    rows = random_rows(2, {f"d{i}": 2 for i in range(300)})
    store = TokenStore.open(write_store(tmp_path / "s", rows))
    domain_n = np.random.default_rng(0).permutation(np.repeat(np.arange(300), 2))
    row_n = np.arange(600) % 2
    expected = np.stack([rows[f"d{g}"]["train"][r] for g, r in zip(domain_n, row_n, strict=True)])
    assert np.array_equal(store.gather(domain_n, row_n), expected)


def test_opening_a_store_imports_neither_torch_nor_ray_nor_datasets(made: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from mixwright.data_mixing.store import TokenStore;"
        "TokenStore.open(Path(sys.argv[1])).rows('wiki', 'train', 0, 1);"
        "print([m for m in ('torch', 'ray', 'datasets', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script, str(made)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def write_arrow(path: Path, blocks: list[np.ndarray]) -> Path:
    with path.open("wb") as file:
        write_rows(file, blocks, 9, "uint16")
    return path
