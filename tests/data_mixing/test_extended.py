"""A store with one domain more; overlaps of held-out and training text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixwright.data_mixing.errors import DataError
from mixwright.data_mixing.extended import extend_store
from mixwright.data_mixing.overlap import shared_ngrams
from mixwright.data_mixing.staging import exclusive
from mixwright.data_mixing.store import TokenStore

WIDTH = 17


@pytest.fixture
def store(tiny_store: Path) -> TokenStore:
    return TokenStore.open(tiny_store)


def rows(count: int = 30, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, (count, WIDTH))


def all_rows(store: TokenStore, name: str, split: Any = "train") -> np.ndarray:
    count = store.num_rows(name, split)
    return np.asarray(store.gather(np.full(count, store.index(name)), np.arange(count), split))


def test_old_domains_are_as_they_were_and_the_new_one_holds_the_rows_in_order(
    store: TokenStore, tmp_path: Path
) -> None:
    extended = extend_store(store, tmp_path / "more", "synthetic", rows(), {"by": "a test"})
    assert [d.name for d in extended.domains()] == [*(d.name for d in store.domains()), "synthetic"]
    np.testing.assert_array_equal(all_rows(extended, "synthetic"), rows())
    for domain in store.domains():
        for split in ("train", "validation", "test"):
            np.testing.assert_array_equal(all_rows(extended, domain.name, split), all_rows(store, domain.name, split))
    assert [d.fingerprint for d in extended.domains()][:-1] == [d.fingerprint for d in store.domains()]
    assert extended.fingerprint != store.fingerprint
    assert extended.num_rows("synthetic", "test") == 0
    assert extended.manifest.config["provenance"] == {"by": "a test"}


def test_rows_of_the_old_domains_are_linked_not_copied(store: TokenStore, tmp_path: Path) -> None:
    extended = extend_store(store, tmp_path / "more", "synthetic", rows(), {})
    name = next(path.relative_to(store.folder) for path in store.folder.rglob("*.arrow"))
    assert (store.folder / name).stat().st_ino == (extended.folder / name).stat().st_ino


def test_the_same_call_finds_it_again_and_another_one_is_refused(store: TokenStore, tmp_path: Path) -> None:
    first = extend_store(store, tmp_path / "more", "synthetic", rows(), {"seed": 1})
    made = (tmp_path / "more" / "manifest.json").stat().st_mtime_ns
    assert extend_store(store, tmp_path / "more", "synthetic", rows(), {"seed": 1}).fingerprint == first.fingerprint
    assert (tmp_path / "more" / "manifest.json").stat().st_mtime_ns == made
    with pytest.raises(DataError, match="holds a store of other rows"):
        extend_store(store, tmp_path / "more", "synthetic", rows(), {"seed": 2})


def test_more_rows_than_a_file_holds_go_into_several(store: TokenStore, tmp_path: Path) -> None:
    small = TokenStore.open(store.folder)
    small.manifest = small.manifest.model_copy(update={"rows_per_file": 8})
    # Files of the old domains have their own size, so only the new domain is looked at.
    extended = extend_store(small, tmp_path / "more", "synthetic", rows(20), {})
    assert [f.num_rows for f in extended.manifest.domains[-1].splits["train"].files] == [8, 8, 4]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("letters", rows(), "has a domain 'letters' already"),
        ("no/name", rows(), "must be 1-64 letters"),
        ("new", rows()[:, :5], r"rows have shape \[30, 5\], expected \[n, 17\] with n > 0"),
        ("new", rows()[:0], r"rows have shape \[0, 17\]"),
        ("new", rows() + 5000, r"ids from 50\d\d to 5199, expected 0 to \d+"),
        ("new", rows() - 300, r"ids from -\d+ to"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    store: TokenStore, tmp_path: Path, name: str, given: np.ndarray, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        extend_store(store, tmp_path / "more", name, given, {})
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_cleared(store: TokenStore, tmp_path: Path) -> None:
    half = tmp_path / "more.building" / "store" / "synthetic"
    half.mkdir(parents=True)
    (half / "train-00000.arrow").write_bytes(b"half a file")
    extended = extend_store(store, tmp_path / "more", "synthetic", rows(), {})
    np.testing.assert_array_equal(all_rows(extended, "synthetic"), rows())
    assert [path.name for path in tmp_path.iterdir()] == ["more"]


def test_two_processes_do_not_make_it_at_once(store: TokenStore, tmp_path: Path) -> None:
    with exclusive(tmp_path / "more.building"), pytest.raises(DataError, match="another process is at work here"):
        extend_store(store, tmp_path / "more", "synthetic", rows(), {})


@pytest.mark.parametrize("n", [1, 3, 8])
def test_shared_ngrams_are_those_of_brute_force(store: TokenStore, n: int) -> None:
    def grams(split: Any) -> list[tuple[int, ...]]:
        texts = [all_rows(store, domain.name, split).reshape(-1).tolist() for domain in store.domains()]
        return [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]

    trained, held_out = set(grams("train")), grams("test")
    found = shared_ngrams(store, "test", n)
    assert found.total == len(held_out)
    assert found.shared == sum(gram in trained for gram in held_out)
    assert found.shared > 0
