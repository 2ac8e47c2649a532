"""Text in, rows out: compared with a few lines of plain Python, and independent of how the work was done."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from mixwright.data_mixing.corpora import CorporaConfig
from mixwright.data_mixing.domain import Cap
from mixwright.data_mixing.errors import DataError, StoreChanged
from mixwright.data_mixing.manifest import SPLITS
from mixwright.data_mixing.prepare import prepare
from mixwright.data_mixing.row_files import open_rows
from mixwright.data_mixing.scan import Task, narrow
from mixwright.data_mixing.shards import RowShape, plan_shards, run_shard
from mixwright.data_mixing.store import TokenStore
from mixwright.data_mixing.tokenizer import load_tokenizer, train_tokenizer
from mixwright.data_mixing.tokens import TokenFile
from mixwright.data_mixing.units import Unit
from mixwright.data_mixing.verify import verify
from tests.data_mixing.corpora_for_tests import (
    corpora_config,
    files_of,
    random_rows,
    scan_of,
    sentences,
    two_domains,
    write_jsonl,
    write_store,
)

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "corpus"


def made(config: CorporaConfig, base: Path, **how: Any) -> TokenStore:
    assert prepare(config, base, **how).made
    return TokenStore.open(config.output)


def all_rows(store: TokenStore, name: str, split: str) -> np.ndarray:
    return store.rows(name, split, 0, store.num_rows(name, split))


def split_of(text: str, validation: float, test: float) -> str:
    """The rule of the documentation: first 64 bits (little endian) of BLAKE2b-128, as a fraction."""
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    position = int.from_bytes(digest[:8], "little") / 2**64
    return "validation" if position < validation else "test" if position < validation + test else "train"


def expected_rows(texts: list[str], tokenizer_folder: Path, width: int) -> np.ndarray:
    tokenizer = load_tokenizer(tokenizer_folder)
    tokens = [token for text in texts for token in [*tokenizer.encode_batch([text])[0], tokenizer.eos_id]]
    num_rows = len(tokens) // width
    return np.array(tokens[: num_rows * width]).reshape(num_rows, width)


def test_rows_are_the_documents_in_order_joined_by_eos_and_cut(tmp_path: Path) -> None:
    a, b = sentences(1, 90), sentences(2, 60)
    texts = {"a": a, "b": [a[3], *b, b[7], a[0]]}
    domains = {name: {"paths": [str(write_jsonl(tmp_path / f"{name}.jsonl", texts[name]))]} for name in texts}
    store = made(corpora_config(tmp_path / "s", domains), tmp_path)
    texts["b"] = b  # the rest stands in `a`, or earlier in `b`
    for name, kept in texts.items():
        for split in SPLITS:
            members = [text for text in kept if split_of(text, 0.15, 0.15) == split]
            assert len(members) > 2
            expected = expected_rows(members, store.tokenizer_folder, 17)
            assert np.array_equal(all_rows(store, name, split), expected)
            counts = store.manifest.domains[store.index(name)].splits[split]
            assert counts.num_documents == len(members)
            assert counts.num_bytes == sum(len(text.encode()) for text in members)
            assert counts.num_rows == len(expected)
            assert counts.num_tokens == expected.size + counts.num_tail_tokens
            assert counts.num_tail_tokens < 17
    assert [d.dropped.duplicate for d in store.manifest.domains] == [0, 3]


def test_the_same_texts_in_any_format_make_the_same_rows(tmp_path: Path) -> None:
    texts = sentences(1, 40)
    write_jsonl(tmp_path / "j.jsonl", texts)
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress((tmp_path / "j.jsonl").read_bytes()))
    pq.write_table(pa.table({"text": texts}), tmp_path / "p.parquet", row_group_size=7)
    (tmp_path / "t").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "t" / f"{i:03d}.txt").write_text(text)
    stores = [
        made(corpora_config(tmp_path / f"s{i}", {"a": {"paths": [pattern]}}), tmp_path)
        for i, pattern in enumerate(["j.jsonl", "z.jsonl.gz", "p.parquet", "t/*.txt"])
    ]
    assert len({store.fingerprint for store in stores}) == 1
    assert stores[0].num_rows("a") > 20


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_makes_a_domain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    texts = sentences(1, 60)
    write_jsonl(tmp_path / "data" / "train.jsonl", texts)
    domains = {"a": {"dataset": {"path": str(tmp_path / "data"), "streaming": streaming}}}
    store = made(corpora_config(tmp_path / "s", domains), tmp_path)
    assert sum(split.num_documents for split in store.manifest.domains[0].splits.values()) == 60
    assert not prepare(corpora_config(tmp_path / "s", domains), tmp_path).made
    assert not (tmp_path / "s.building").exists()


def test_processes_and_place_do_not_change_a_byte(tmp_path: Path) -> None:
    domains = two_domains(tmp_path)
    for i in range(12):
        write_jsonl(tmp_path / "many" / f"{i}.jsonl", sentences(10 + i, 150))
    domains["many"] = {"paths": [str(tmp_path / "many" / "*.jsonl")], "max_bytes": 150_000}
    one = made(corpora_config(tmp_path / "one", domains), tmp_path)
    two = made(corpora_config(tmp_path / "deep" / "two", domains, num_workers=2), tmp_path)
    assert files_of(one.folder) == files_of(two.folder)
    assert not (tmp_path / "one.building").exists()


def test_rows_are_the_same_however_they_are_cut_into_files(tmp_path: Path) -> None:
    domains = two_domains(tmp_path)
    one = made(corpora_config(tmp_path / "one", domains), tmp_path)
    many = made(corpora_config(tmp_path / "many", domains, shard_bytes=34 * 10), tmp_path)
    assert many.manifest.rows_per_file == 10
    for name in ("a", "b"):
        for split in SPLITS:
            assert np.array_equal(all_rows(one, name, split), all_rows(many, name, split))
            assert len(list((many.folder / name).glob(f"{split}-*.arrow"))) == -(-many.num_rows(name, split) // 10)
    assert [check.problem for check in verify(many) if check.problem] == []


def test_a_limit_takes_a_seeded_spread_and_the_split_does_not_depend_on_the_seed(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", sentences(1, 400))
    domains = {"a": {"paths": ["a.jsonl"], "max_bytes": 20_000}}
    stores = [made(corpora_config(tmp_path / f"s{seed}", domains, seed=seed), tmp_path) for seed in (1, 2)]
    texts = []
    for store in stores:
        tokenizer = load_tokenizer(store.tokenizer_folder)
        texts.append({s: tokenizer.decode(all_rows(store, "a", s).reshape(-1).tolist()) for s in SPLITS})
        entry = store.manifest.domains[0]
        total = sum(counts.num_bytes for counts in entry.splits.values())
        assert 19_000 < total <= 20_000
        assert entry.dropped.over_limit == 400 - sum(counts.num_documents for counts in entry.splits.values())
    assert texts[0]["train"] != texts[1]["train"]
    for text in sentences(1, 400):
        start = text[:20]
        assert len({split for found in texts for split in SPLITS if start in found[split]}) <= 1


def test_the_manifest_tells_what_the_store_is(tmp_path: Path) -> None:
    domains = two_domains(tmp_path)
    domains["a"]["cap"] = {"max_epochs": 3, "on_exhaust": "stop"}
    store = made(corpora_config(tmp_path / "s", domains), tmp_path)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert manifest["sequence_length"] == 16
    assert manifest["dtype"] == "uint16"
    assert manifest["vocab_size"] == load_tokenizer(store.tokenizer_folder).vocab_size
    assert manifest["eos_id"] == 0
    assert manifest["config"]["tokenizer"]["train"]["vocab_size"] == 300
    assert "num_workers" not in manifest["config"]
    assert [domain.cap for domain in store.domains()] == [Cap(max_epochs=3, on_exhaust="stop"), Cap()]
    assert store.rows("a", "train", 0, store.num_rows("a")).max() < manifest["vocab_size"]
    assert str(tmp_path / "s") not in json.dumps(manifest), "a store can be moved"


def test_anything_that_changes_rows_changes_the_fingerprint(tmp_path: Path) -> None:
    domains = two_domains(tmp_path)
    turned = dict(reversed(domains.items()))
    variants: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (domains, {}), (domains, {"sequence_length": 15}), (domains, {"split": {"validation": 0.2, "test": 0.1}}),
        (domains, {"tokenizer": {"train": {"vocab_size": 310}}}), (turned, {}),
    ]  # fmt: skip
    found = [
        made(corpora_config(tmp_path / f"s{i}", chosen, **changes), tmp_path).fingerprint
        for i, (chosen, changes) in enumerate(variants)
    ]
    assert len(set(found)) == len(variants)


def test_an_own_tokenizer_is_copied_into_the_store(tmp_path: Path) -> None:
    domains = two_domains(tmp_path)
    first = made(corpora_config(tmp_path / "first", domains), tmp_path)
    own = {"path": str(first.tokenizer_folder)}
    second = made(corpora_config(tmp_path / "second", domains, tokenizer=own), tmp_path)
    assert second.manifest.tokenizer_hash == first.manifest.tokenizer_hash
    assert second.fingerprint == first.fingerprint


def test_the_tokenizer_is_trained_on_an_equal_share_of_each_domains_training_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"a": sentences(1, 300), "b": sentences(2, 40)}
    domains = {name: {"paths": [str(write_jsonl(tmp_path / f"{name}.jsonl", texts[name]))]} for name in texts}
    seen: list[str] = []

    def train_and_tell(excerpts: list[str], vocab_size: int) -> Tokenizer:
        seen.extend(excerpts)
        return train_tokenizer(excerpts, vocab_size)

    monkeypatch.setattr("mixwright.data_mixing.build.train_tokenizer", train_and_tell)
    tokenizer = {"train": {"vocab_size": 300, "max_bytes": 8_000}}
    made(corpora_config(tmp_path / "s", domains, tokenizer=tokenizer), tmp_path)
    for name, digit in (("a", "1"), ("b", "2")):
        mine = [text for text in seen if text.startswith(f"{digit}-")]
        assert 3_990 < sum(len(text.encode()) for text in mine) <= 4_000
        whole = [text for text in texts[name] if text in mine]
        assert len(whole) == len(mine) - 1, "only the last by rank is cut"
        assert {split_of(text, 0.15, 0.15) for text in whole} == {"train"}


def test_units_without_a_wanted_document_are_not_read_again(tmp_path: Path) -> None:
    units = tuple(Unit(tmp_path / str(i), "text", "text", 1) for i in range(5))
    scan = replace(scan_of(sentences(1, 7)), per_unit=np.array([1, 0, 3, 2, 1]))
    wanted_n = np.array([0, 0, 1, 0, 0, 0, 1], bool)
    task, left_n = narrow(Task(0, "a", units, 1), scan, wanted_n)
    assert task.units == (units[2], units[4])
    assert left_n.tolist() == [False, True, True, True, False, False, True]


def test_a_shard_of_many_record_batches_holds_its_rows_in_order(tmp_path: Path) -> None:
    tokens_n = np.arange(500, dtype=np.uint16)
    files = []
    for i, (first, stop) in enumerate([(0, 130), (130, 130), (130, 133), (133, 500)]):
        path = tmp_path / f"{i}.bin"
        np.concatenate([np.full(i, 9, np.uint16), tokens_n[first:stop]]).tofile(path)
        files.append(TokenFile(path, "uint16", (i, stop - first, 0)))
    shape = RowShape(width=7, dtype="uint16", rows_per_batch=4, rows_per_file=20)
    tasks = plan_shards(tuple(files), 1, shape, tmp_path / "rows", tmp_path / "results")
    assert [(task.first_row, task.num_rows, task.path.name) for task in tasks] == [
        (0, 20, "validation-00000.arrow"), (20, 20, "validation-00001.arrow"), (40, 20, "validation-00002.arrow"),
        (60, 11, "validation-00003.arrow"),
    ]  # fmt: skip
    for task in tasks:
        run_shard(task)
        view = open_rows(task.path, 7, "uint16", task.num_rows)
        assert view.strided is not None
        assert view.strided.shape[1] == 4
        expected = tokens_n[task.first_row * 7 :][: task.num_rows * 7].reshape(-1, 7)
        assert np.array_equal(view.take(np.arange(task.num_rows)), expected)


def test_progress_of_every_stage_ends_at_its_total(tmp_path: Path) -> None:
    calls: dict[str, list[tuple[int, int]]] = {}
    config = corpora_config(tmp_path / "s", two_domains(tmp_path))
    made(config, tmp_path, progress=lambda stage, done, total: calls.setdefault(stage, []).append((done, total)))
    assert list(calls) == ["looking at the sources", "reading", "training the tokenizer", "tokenising", "writing"]
    for steps in calls.values():
        assert steps[-1][0] == steps[-1][1] > 0
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)


# --- doing it again --------------------------------------------------------------------------------------------


def test_a_finished_store_is_recognised_without_reading_a_file(tmp_path: Path) -> None:
    config = corpora_config(tmp_path / "s", two_domains(tmp_path))
    before = files_of(made(config, tmp_path).folder)
    stages: list[str] = []
    again = prepare(config, tmp_path, progress=lambda stage, done, total: stages.append(stage))
    assert not again.made
    assert stages == []
    assert files_of(tmp_path / "s") == before


def test_touched_files_are_read_again_and_found_to_be_the_same(tmp_path: Path) -> None:
    config = corpora_config(tmp_path / "s", two_domains(tmp_path))
    first = made(config, tmp_path)
    os.utime(tmp_path / "a.jsonl", (1, 1))
    again = prepare(config, tmp_path)
    assert not again.made
    assert again.manifest.fingerprint == first.fingerprint
    stages: list[str] = []
    prepare(config, tmp_path, progress=lambda stage, done, total: stages.append(stage))
    assert stages == [], "the next time it is known at once"


def test_changed_documents_are_refused_until_asked_to_replace(tmp_path: Path) -> None:
    config = corpora_config(tmp_path / "s", two_domains(tmp_path))
    first = made(config, tmp_path)
    before = files_of(tmp_path / "s")
    write_jsonl(tmp_path / "a.jsonl", sentences(8, 60))
    with pytest.raises(DataError, match=r"/s: holds a store made of other documents .*--replace it"):
        prepare(config, tmp_path)
    assert files_of(tmp_path / "s") == before
    assert not (tmp_path / "s.building").exists()
    second = made(config, tmp_path, replace=True)
    assert second.fingerprint != first.fingerprint
    with pytest.raises(StoreChanged, match="prepare the store again"):
        first.rows("b", "train", 0, 1)  # opened before, and not yet mapped


def test_another_configuration_is_refused_and_named(tmp_path: Path) -> None:
    domains = two_domains(tmp_path)
    made(corpora_config(tmp_path / "s", domains), tmp_path)
    domains["a"]["max_bytes"] = 900
    with pytest.raises(DataError, match=r"another configuration \(sequence_length, domains.a.max_bytes differ\)"):
        prepare(corpora_config(tmp_path / "s", domains, sequence_length=17), tmp_path)


def test_a_damaged_store_is_refused_until_asked_to_replace(tmp_path: Path) -> None:
    config = corpora_config(tmp_path / "s", two_domains(tmp_path))
    before = files_of(made(config, tmp_path).folder)
    (tmp_path / "s" / "a" / "train-00000.arrow").unlink()
    with pytest.raises(DataError, match=r"train-00000.arrow: No such file .*\(--replace does that\)"):
        prepare(config, tmp_path)
    made(config, tmp_path, replace=True)
    assert files_of(tmp_path / "s") == before


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.txt").write_text("precious")
    for force in (False, True):
        with pytest.raises(DataError, match="/s: exists and is not a token store; choose another output"):
            prepare(corpora_config(tmp_path / "s", two_domains(tmp_path)), tmp_path, replace=force)
    assert files_of(tmp_path / "s") == {"thesis.txt": b"precious"}


# --- input that cannot be used ---------------------------------------------------------------------------------


def with_bad_lines(folder: Path) -> dict[str, Any]:
    domains = two_domains(folder)
    lines = (folder / "b.jsonl").read_bytes().splitlines(keepends=True)
    lines[2:2] = [b"not json\n"]
    lines[10:10] = [b'{"no": 1}\n', b"\xff\n"]
    (folder / "b.jsonl").write_bytes(b"".join(lines))
    return domains


def test_a_bad_document_stops_with_file_and_line_and_leaves_nothing(tmp_path: Path) -> None:
    config = corpora_config(tmp_path / "s", with_bad_lines(tmp_path))
    with pytest.raises(DataError, match=r"/b.jsonl:3: not a JSON value: .*`on_bad_document: skip` leaves such"):
        prepare(config, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_bad_documents_are_skipped_counted_and_named_when_asked(tmp_path: Path) -> None:
    store = made(corpora_config(tmp_path / "s", with_bad_lines(tmp_path), on_bad_document="skip"), tmp_path)
    (clean := tmp_path / "clean").mkdir()
    expected = made(corpora_config(tmp_path / "c", two_domains(clean)), clean)
    assert store.fingerprint == expected.fingerprint
    dropped = store.manifest.domains[1].dropped
    assert dropped.bad == 3
    assert [example.split("/")[-1].split(": ")[0] for example in dropped.bad_examples] == [
        "b.jsonl:3", "b.jsonl:11", "b.jsonl:12",
    ]  # fmt: skip


def test_short_and_blank_documents_are_dropped_and_counted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [*sentences(1, 30), "", "  \n\t", "short", "x" * 10])
    store = made(corpora_config(tmp_path / "s", {"a": {"paths": ["a.jsonl"], "min_chars": 10}}), tmp_path)
    assert store.manifest.domains[0].dropped.short == 3
    assert sum(counts.num_documents for counts in store.manifest.domains[0].splits.values()) == 31


def test_a_domain_without_a_full_row_is_refused_with_its_numbers(tmp_path: Path) -> None:
    domains = two_domains(tmp_path)
    write_jsonl(tmp_path / "tiny.jsonl", ["ab", "ab", "", sentences(1, 60)[0]])
    domains["tiny"] = {"paths": ["tiny.jsonl"]}
    message = (
        r"domain 'tiny' is empty: \d+ training tokens do not fill one row of 17; documents: 1 train, 0 validation, "
        r"0 test; dropped: 2 duplicate, 1 short, 0 over max_bytes, 0 bad"
    )
    with pytest.raises(DataError, match=message):
        prepare(corpora_config(tmp_path / "s", domains, split={"validation": 0, "test": 0}), tmp_path)
    assert not (tmp_path / "s").exists()
    assert not (tmp_path / "s.building").exists()


def test_domains_of_empty_files_are_refused(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_text("")
        with pytest.raises(DataError, match="domain 'a' is empty: 0 training tokens"):
            prepare(corpora_config(tmp_path / "s", {"a": {"paths": [name]}}), tmp_path)


def test_verify_finds_a_flipped_token_that_opening_cannot_see(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", sentences(1, 1500))
    store = made(corpora_config(tmp_path / "s", {"a": {"paths": ["a.jsonl"]}}), tmp_path)
    path = tmp_path / "s" / "a" / "train-00000.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 4] ^= 1
    path.write_bytes(content)
    assert TokenStore.open(tmp_path / "s").rows("a", "train", 0, 1).shape == (1, 17)
    problems = {check.what: check.problem for check in verify(store) if check.problem}
    assert list(problems) == ["a/train-00000.arrow"]
    assert problems["a/train-00000.arrow"].startswith("content is ")


def test_verify_finds_an_exchanged_tokenizer_and_an_edited_manifest(tmp_path: Path) -> None:
    store = made(corpora_config(tmp_path / "s", two_domains(tmp_path)), tmp_path)
    path = store.tokenizer_folder / "tokenizer.json"
    path.write_text(path.read_text().replace("river", "rivet"))
    manifest = store.manifest.model_copy(update={"dtype": "uint32"})
    assert [check.what for check in verify(TokenStore(store.folder, store.manifest)) if check.problem] == ["tokenizer"]
    changed = [check.what for check in verify(TokenStore(store.folder, manifest)) if check.problem]
    assert changed[:2] == ["tokenizer", "manifest"]
    assert "a/train-00000.arrow" in changed


def test_verify_finds_tokens_outside_the_vocabulary(tmp_path: Path) -> None:
    rows = random_rows(1, {"a": 5})
    rows["a"]["test"][3, 2] = 312
    store = TokenStore.open(write_store(tmp_path / "s", rows))
    problems = {check.what: check.problem for check in verify(store) if check.problem}
    assert problems == {"a/test-00000.arrow": "token 312 is outside the vocabulary of 300"}


# --- real text -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared corpora are not on this machine")
def test_real_corpora_become_rows_that_read_as_their_documents(tmp_path: Path) -> None:
    domains = {name: {"paths": [str(SHARED / f"{name}.jsonl.gz")], "max_bytes": 150_000} for name in ("law", "drama")}
    config = corpora_config(tmp_path / "s", domains, sequence_length=64, tokenizer={"train": {"vocab_size": 600}})
    store = made(config, tmp_path)
    tokenizer = load_tokenizer(store.tokenizer_folder)
    for name in domains:
        with gzip.open(SHARED / f"{name}.jsonl.gz", "rt") as lines:
            documents = [json.loads(line)["text"] for line in lines]
        stream = tokenizer.decode(all_rows(store, name, "train").reshape(-1).tolist())
        pieces = stream.split("<|endoftext|>")
        assert all(piece in documents for piece in pieces[:-1])
        assert any(document.startswith(pieces[-1]) for document in documents)
