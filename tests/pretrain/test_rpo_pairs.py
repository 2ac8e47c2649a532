"""Preference files to pairs on disk: every kind of source; what is dropped, held out, found again, never half-made."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from mixwright.data_mixing.errors import DataError
from mixwright.data_mixing.staging import exclusive
from mixwright.pretrain.rpo.config import PairDataConfig
from mixwright.pretrain.rpo.pair_counts import BadPair
from mixwright.pretrain.rpo.pairs import PreparedPairs, open_pairs, prepare_pairs
from mixwright.pretrain.rpo.raw_pairs import TextPair
from mixwright.pretrain.rpo.templates import EncodedPair, PairEncoder, load_tokenizer
from tests.pretrain.preferences import BOS, CHAT, END, ids_of, prepare, said, text_rows, write_rows, write_tokenizer

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "preferences" / "gsm8k_solutions.jsonl.gz"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("rpo") / "chat", CHAT, f"{BOS} $A")


def reference_ids(tokenizer: Path, rows: list[dict[str, Any]]) -> list[list[list[int]]]:
    """Each row encoded alone."""
    encoder = PairEncoder(load_tokenizer(str(tokenizer), None), end=True)
    found = []
    for row in rows:
        (pair,) = encoder.encode([TextPair("", row["prompt"], row["chosen"], row["rejected"])])
        assert isinstance(pair, EncodedPair)
        found.append([pair.prompt, pair.chosen, pair.rejected])
    return found


# --- what is on disk --------------------------------------------------------------------------------------------


def test_pairs_come_back_in_order_as_views_of_one_file(tokenizer: Path, tmp_path: Path) -> None:
    rows = text_rows(40)
    pairs = prepare(write_rows(tmp_path / "p.jsonl", rows), tokenizer, tmp_path / "out")
    expected = reference_ids(tokenizer, rows)
    assert ids_of(pairs) == expected
    assert pairs.train.lengths.tolist() == [[len(part) for part in parts] for parts in expected]
    assert pairs.train.lengths.dtype == np.int64
    assert (len(pairs.train), len(pairs.evaluation), pairs.counts.read) == (40, 0, 40)
    group, again = pairs.train.group(7), pairs.train.group(7)
    assert (group.index, group.num_tokens) == (7, sum(map(len, expected[7])))
    for part, same in zip((group.prompt, *group.completions), (again.prompt, *again.completions), strict=True):
        assert part.dtype == np.int32
        assert not part.flags.writeable
        assert np.shares_memory(part, same)
    for i in (-1, 40):
        with pytest.raises(IndexError, match=f"pair {i} of 40"):
            pairs.train.group(i)


def test_text_can_be_read_again_without_the_model(tokenizer: Path, tmp_path: Path) -> None:
    rows = [*text_rows(3), {"prompt": f"été {END}", "chosen": " 木\n", "rejected": BOS}]
    moved = shutil.copytree(tokenizer, tmp_path / "model")
    pairs = prepare(write_rows(tmp_path / "p.jsonl", rows), moved, tmp_path / "out")
    shutil.rmtree(moved)
    again = open_pairs(pairs.folder)
    for i, row in enumerate(rows):
        texts = (BOS + row["prompt"], row["chosen"] + END, row["rejected"] + END)
        assert again.train.texts(i) == texts
        assert again.train.prompt_text(i) == texts[0]
    assert again.counts.spelt_special == 1


def test_every_kind_of_source_gives_the_same_pairs(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = text_rows(30)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet", row_group_size=7)
    table = Dataset.from_list(rows).add_column("id", list(range(30)))
    table.save_to_disk(str(tmp_path / "saved"))
    DatasetDict(train_prefs=table).save_to_disk(str(tmp_path / "dict"))
    write_rows(tmp_path / "folder" / "train.jsonl", rows)
    sources: dict[Path, dict[str, Any]] = {
        write_rows(tmp_path / "p.jsonl", rows): {}, write_rows(tmp_path / "p.jsonl.gz", rows): {},
        tmp_path / "p.parquet": {}, tmp_path / "saved": {}, tmp_path / "dict": {"split": "train_prefs"},
        tmp_path / "folder": {},
    }  # fmt: skip
    found = [prepare(path, tokenizer, tmp_path / "out", **settings) for path, settings in sources.items()]
    assert {pairs.train.fingerprint for pairs in found} == {found[0].train.fingerprint}
    assert ids_of(found[0]) == ids_of(found[3]) == reference_ids(tokenizer, rows)
    again = [prepare(path, tokenizer, tmp_path / "out", **settings) for path, settings in sources.items()]
    assert [pairs.folder for pairs in again] == [pairs.folder for pairs in found]
    with pytest.raises(DataError, match=r"no split 'train_pref'; did you mean 'train_prefs'\?"):
        prepare(tmp_path / "dict", tokenizer, tmp_path / "out", split="train_pref")


def test_messages_in_tables_are_the_messages_in_lines(tokenizer: Path, tmp_path: Path) -> None:
    rows = [
        {
            "chosen": [said("user", f"the river {i}"), said("assistant", "sings")],
            "rejected": [said("user", f"the river {i}"), said("assistant", "walks")],
        }
        for i in range(5)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    sources = (write_rows(tmp_path / "p.jsonl", rows), tmp_path / "p.parquet", tmp_path / "saved")
    found = [prepare(path, tokenizer, tmp_path / "out", columns={"prompt": None}) for path in sources]
    assert {pairs.train.fingerprint for pairs in found} == {found[0].train.fingerprint}
    prompt, chosen, _ = found[1].train.texts(2)
    assert prompt == f"{BOS}<|im_start|>user\nthe river 2{END}\n<|im_start|>assistant\n"
    assert chosen == f"sings{END}"


def test_pairs_do_not_depend_on_the_batches_they_are_encoded_in(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = {"prompt": [said("user", "the")], "chosen": [said("assistant", "a")], "rejected": [said("assistant", "b")]}
    rows: list[Any] = [row for text in text_rows(10) for row in (text, chat, b"{", {**text, "chosen": None})]
    path = write_rows(tmp_path / "p.jsonl", rows)
    whole = prepare(path, tokenizer, tmp_path / "a")
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr("mixwright.pretrain.rpo.building._BATCH_PAIRS", 3)
    parts = prepare_pairs(
        PairDataConfig(train=str(path)), model_folder=str(tokenizer), chat_template=None, folder=tmp_path / "b", seed=0,
        say=lambda text: None, progress=lambda *news: told.append(news),
    )  # fmt: skip
    assert parts.train.fingerprint == whole.train.fingerprint
    assert parts.counts == whole.counts
    assert (parts.counts.train, parts.counts.dropped) == (20, {"malformed": 10, "field": 10})
    done = [position for _, position, _ in told]
    assert len(told) == 14
    assert done == sorted(done)
    assert told[-1] == (f"tokenising {path}", path.stat().st_size, path.stat().st_size)


# --- what is dropped --------------------------------------------------------------------------------------------


def bad_file(path: Path) -> Path:
    good = text_rows(6)
    same = {**good[0], "chosen": "same", "rejected": "same"}
    rows = [good[0], b"", same, good[1], b'{"prompt": ', {**good[2], "chosen": ""}, b"[1]", b"\xff{}", good[3], same]
    return write_rows(path, rows)


def test_bad_pairs_are_dropped_and_counted_with_examples(tokenizer: Path, tmp_path: Path) -> None:
    path = bad_file(tmp_path / "p.jsonl")
    pairs = prepare(path, tokenizer, tmp_path / "out")
    good = text_rows(6)
    assert ids_of(pairs) == reference_ids(tokenizer, [good[0], good[1], good[3]])
    counts = pairs.counts
    assert counts.dropped == {"malformed": 3, "identical": 2, "empty": 1}
    assert (counts.read, counts.train) == (9, 3)
    assert [example.partition(": ")[0] for example in counts.examples] == [f"{path}:{n}" for n in (3, 5, 6, 7, 8)]
    assert counts.examples[1].startswith(f"{path}:5: not a JSON value: ")
    assert counts.examples[3] == f"{path}:7: expected a JSON object, found list"
    assert counts.examples[4] == f"{path}:8: not UTF-8 text: byte 0xff (invalid start byte)"
    rows = dict(counts.rows())
    assert rows["pairs read"] == "9"
    assert rows["dropped: chosen equals rejected"] == "2"
    assert not any("spell" in name for name in rows)
    means = pairs.train.lengths.mean(axis=0)
    assert rows["mean tokens of prompt / chosen / rejected"] == " / ".join(f"{mean:.1f}" for mean in means)


def test_the_first_bad_pair_ends_it_where_that_is_asked_for(tokenizer: Path, tmp_path: Path) -> None:
    path = bad_file(tmp_path / "p.jsonl")
    with pytest.raises(BadPair, match=r"p.jsonl:3: 'chosen' equals 'rejected'$"):
        prepare(path, tokenizer, tmp_path / "out", on_bad_pair="error")
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_rows_of_tables_are_named_by_row(tokenizer: Path, tmp_path: Path) -> None:
    rows = text_rows(5)
    rows[3]["rejected"] = None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    problem = "row 3: field 'rejected' is null, expected text or a list of messages"
    found = [prepare(tmp_path / name, tokenizer, tmp_path / "out") for name in ("p.parquet", "saved")]
    assert [pairs.counts.examples for pairs in found] == [
        (f"{tmp_path}/p.parquet: {problem}",),
        (f"dataset '{tmp_path}/saved' split 'train': {problem}",),
    ]


def test_long_pairs_are_cut_and_counted(tokenizer: Path, tmp_path: Path) -> None:
    rows = text_rows(20)
    path = write_rows(tmp_path / "p.jsonl", rows)
    pairs = prepare(path, tokenizer, tmp_path / "out", max_tokens=60, max_prompt_tokens=14)
    bos, end = (load_tokenizer(str(tokenizer), None).convert_tokens_to_ids(token) for token in (BOS, END))
    expected, cut_prompts, cut_completions = [], 0, 0
    for prompt, *completions in reference_ids(tokenizer, rows):
        kept = prompt if len(prompt) <= 14 else [bos, *prompt[-13:]]
        room = 60 - len(kept)
        cut_prompts += len(prompt) > 14
        cut_completions += sum(len(ids) > room for ids in completions)
        expected.append([kept, *(ids[:room] for ids in completions)])
    assert ids_of(pairs) == expected
    assert 0 < cut_completions == pairs.counts.cut_completions
    assert 0 < cut_prompts == pairs.counts.cut_prompts
    ended = sum(ids[-1] == end for _, *completions in expected for ids in completions)
    assert ended == 40 - cut_completions
    dropped = prepare(path, tokenizer, tmp_path / "out", max_tokens=60, max_prompt_tokens=30, long_completion="bad")
    assert dropped.counts.dropped["long_completion"] == 20 - len(dropped.train)


def test_a_missing_column_is_an_error_with_the_nearest_name(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"question": row["prompt"], "chosen": row["chosen"], "rejcted": row["rejected"]} for row in text_rows(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    columns = {"prompt": "question"}
    for path in (write_rows(tmp_path / "p.jsonl", rows), tmp_path / "p.parquet", tmp_path / "saved"):
        problem = r"no column 'rejected' \(data.columns.rejected\); did you mean 'rejcted'\?$"
        with pytest.raises(DataError, match=problem):
            prepare(path, tokenizer, tmp_path / "out", columns=columns)
        with pytest.raises(DataError, match=r"no column 'prompt' .*valid names: chosen, .*want `prompt: null`$"):
            prepare(path, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_nothing_usable_is_an_error_that_says_why(tokenizer: Path, tmp_path: Path) -> None:
    same = [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 3
    path = write_rows(tmp_path / "p.jsonl", [*same, b"{"])
    reasons = r"chosen equals rejected \(3\), not a JSON object \(1\); first: .*p.jsonl:1: 'chosen' equals"
    problem = f"p.jsonl: no usable pair: {reasons}"
    with pytest.raises(DataError, match=problem):
        prepare(path, tokenizer, tmp_path / "out")
    good = write_rows(tmp_path / "good.jsonl", text_rows(3))
    with pytest.raises(DataError, match=problem):
        prepare(good, tokenizer, tmp_path / "out", evaluation=str(path))
    with pytest.raises(DataError, match=r"empty.jsonl: no usable pair: it is empty$"):
        prepare(write_rows(tmp_path / "empty.jsonl", []), tokenizer, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_files_that_cannot_be_read_are_one_clear_error(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    whole = write_rows(tmp_path / "p.jsonl.gz", text_rows(200))
    (tmp_path / "half.jsonl.gz").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / "p.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "p.csv").write_text("prompt,chosen,rejected\n")
    problems = {
        "half.jsonl.gz": r"half.jsonl.gz:\d\d+: broken gzip file from here on: ",
        "p.parquet": "p.parquet: not a Parquet file: ",
        "p.csv": "p.csv: expected a file that ends with .jsonl, .ndjson",
        "p.jsonl": r"p.jsonl: no such file; did you mean 'p.jsonl.gz'\?",
        "nowhere": r"dataset '.*nowhere' split 'train': cannot be loaded: ",
    }
    for name, problem in problems.items():
        with pytest.raises(DataError, match=problem):
            prepare(tmp_path / name, tokenizer, tmp_path / "out")


# --- held out ---------------------------------------------------------------------------------------------------


def prompts_of(pairs: PreparedPairs) -> tuple[list[str], list[str]]:
    train, evaluation = ([found.prompt_text(i) for i in range(len(found))] for found in (pairs.train, pairs.evaluation))
    return train, evaluation


def test_whole_prompts_are_held_out_by_a_seeded_hash(tokenizer: Path, tmp_path: Path) -> None:
    rows = text_rows(40, num_prompts=13)
    path = write_rows(tmp_path / "p.jsonl", rows)
    pairs = prepare(path, tokenizer, tmp_path / "out", held_out_pairs=8)
    train, evaluation = prompts_of(pairs)
    assert not set(train) & set(evaluation)
    assert 8 <= len(evaluation) < 8 + 4, "prompts have 3 or 4 pairs"
    assert (pairs.counts.train, pairs.counts.evaluation) == (40 - len(evaluation), len(evaluation))
    assert pairs.counts.shared_prompts == 0
    assert [text for text in (BOS + row["prompt"] for row in rows) if text not in set(evaluation)] == train
    whole = prepare(path, tokenizer, tmp_path / "out")
    by_ids = {json.dumps(ids): i for i, ids in enumerate(ids_of(whole))}
    assert len(by_ids) == 40
    assert {json.dumps(ids) for ids in ids_of(pairs)} < set(by_ids)
    shuffled = random.Random(1).sample(rows, 40)
    again = prepare(write_rows(tmp_path / "q.jsonl", shuffled), tokenizer, tmp_path / "out", held_out_pairs=8)
    assert set(prompts_of(again)[1]) == set(evaluation)
    others = [prepare(path, tokenizer, tmp_path / "out", seed=seed, held_out_pairs=8) for seed in (4, 5, 6)]
    assert any(set(prompts_of(other)[1]) != set(evaluation) for other in others)
    assert pairs.train.fingerprint not in {other.train.fingerprint for other in others}


def test_holding_out_everything_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", text_rows(6, num_prompts=2))
    assert len(prepare(path, tokenizer, tmp_path / "out", held_out_pairs=3).train) == 3
    with pytest.raises(DataError, match=r"data.held_out_pairs = 4 leaves nothing to train on: .*p.jsonl has 6 usable"):
        prepare(path, tokenizer, tmp_path / "out", held_out_pairs=4)


def test_pairs_to_evaluate_on_have_a_source_of_their_own(tokenizer: Path, tmp_path: Path) -> None:
    rows, said_lines = text_rows(12), list[str]()
    train = write_rows(tmp_path / "train.jsonl", rows[:8])
    evaluation = write_rows(tmp_path / "evaluation.jsonl", [*rows[6:], b"{"])
    pairs = prepare_pairs(
        PairDataConfig(train=str(train), evaluation=str(evaluation)), model_folder=str(tokenizer), chat_template=None,
        folder=tmp_path / "out", seed=0, say=said_lines.append, progress=lambda *news: None,
    )  # fmt: skip
    assert ids_of(pairs) == reference_ids(tokenizer, rows[:8])
    assert prompts_of(pairs)[1] == [BOS + row["prompt"] for row in rows[6:]]
    assert pairs.evaluation.group(0).index == 0
    counts = pairs.counts
    assert (counts.read, counts.train, counts.evaluation, counts.shared_prompts) == (15, 8, 6, 2)
    assert said_lines[-1] == "warning: 2 of 6 evaluation pairs have a prompt that is trained on"
    assert f"  for example {counts.examples[0]}" in said_lines
    assert said_lines.index("  pairs read: 15") == 2


# --- found again, and never half-made ---------------------------------------------------------------------------


def test_what_decides_the_pairs_names_their_folder(tokenizer: Path, tmp_path: Path) -> None:
    rows = text_rows(10)
    path = write_rows(tmp_path / "p.jsonl", rows)
    first = prepare(path, tokenizer, tmp_path / "out")
    moved = path.rename(tmp_path / "moved.jsonl")
    same = [prepare(moved, tokenizer, tmp_path / "out", seed=9), prepare(moved, tokenizer, tmp_path / "out")]
    assert {pairs.folder for pairs in same} == {first.folder}
    assert first.folder.name == f"pairs-{first.fingerprint[:12]}"
    assert {pairs.train.fingerprint for pairs in same} == {first.train.fingerprint}
    (tmp_path / "t.jinja").write_text(CHAT + "\n")
    changed = [
        prepare(write_rows(tmp_path / "q.jsonl", rows[1:]), tokenizer, tmp_path / "out"),
        prepare(moved, write_tokenizer(tmp_path / "t", CHAT), tmp_path / "out"),
        prepare(moved, tokenizer, tmp_path / "out", max_tokens=1000),
        prepare(moved, tokenizer, tmp_path / "out", end=False),
        prepare(moved, tokenizer, tmp_path / "out", chat_template=tmp_path / "t.jinja"),
        prepare(moved, tokenizer, tmp_path / "out", held_out_pairs=2, seed=1),
        prepare(moved, tokenizer, tmp_path / "out", held_out_pairs=2, seed=2),
    ]
    assert len({pairs.folder for pairs in changed} | {first.folder}) == len(changed) + 1
    assert changed[2].train.fingerprint == first.train.fingerprint, "the same tokens, whatever they were made of"
    assert len({pairs.train.fingerprint for pairs in [first, *changed]}) >= 5


def test_the_fingerprint_of_a_set_is_of_its_tokens(tokenizer: Path, tmp_path: Path) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    variants = [[row], [{**row, "prompt": "d"}], [{**row, "rejected": "d"}], [row, {**row, "prompt": "e"}]]
    variants.append(variants[-1][::-1])
    found = [
        prepare(write_rows(tmp_path / f"{i}.jsonl", rows), tokenizer, tmp_path / "out").train.fingerprint
        for i, rows in enumerate(variants)
    ]
    assert len(set(found)) == len(variants)


def test_complete_pairs_are_opened_and_not_made_again(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "p.jsonl", text_rows(10))
    first = prepare(path, tokenizer, tmp_path / "out")
    monkeypatch.setattr("mixwright.pretrain.rpo.pairs.build_pairs", None)
    assert ids_of(prepare(path, tokenizer, tmp_path / "out")) == ids_of(first)


def killed(work: Callable[[], None]) -> None:
    """Run `work` in a process that kills itself in it."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("place", ["read_pair", "_count", "finish", "pair_files.probe", "pair_files.PairManifest"])
def test_a_kill_leaves_nothing_that_looks_whole(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    path = write_rows(tmp_path / "p.jsonl", text_rows(10))
    whole = prepare(path, tokenizer, tmp_path / "whole")
    module = "mixwright.pretrain.rpo." + ("" if "." in place else "building.")
    with monkeypatch.context() as patch:
        patch.setattr(module + place, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        killed(lambda: prepare(path, tokenizer, tmp_path / "out") and None)
    (begun,) = (tmp_path / "out").iterdir()
    assert begun.name == whole.folder.name
    with pytest.raises(DataError, match=r"holds no tokenised pairs \(no manifest.json\)"):
        open_pairs(begun)
    again = prepare(path, tokenizer, tmp_path / "out")
    assert {file.name for file in again.folder.iterdir()} == {file.name for file in whole.folder.iterdir()}
    assert again.folder.name == whole.folder.name
    assert ids_of(again) == ids_of(whole)


def test_only_one_process_makes_them(tokenizer: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", text_rows(10))
    made = prepare(path, tokenizer, tmp_path / "out")
    (made.folder / "manifest.json").unlink()
    with exclusive(made.folder), pytest.raises(DataError, match="another process is at work here"):
        prepare(path, tokenizer, tmp_path / "out")
    assert ids_of(prepare(path, tokenizer, tmp_path / "out")) == ids_of(made)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("tokens.bin", lambda content: content + content),
        ("tokens.bin", lambda content: content[:-4]),
        ("tokens.bin", lambda content: b""),
        ("tokens.bin", lambda content: content[:8] + b"\1" + content[9:]),
        ("train.npy", lambda content: content[:-8]),
        ("train.npy", lambda content: b""),
        ("evaluation.npy", lambda content: content + b"\0" * 32),
        ("manifest.json", lambda content: content[:-9]),
        ("manifest.json", lambda content: content.replace(b'"num_tokens"', b'"tokens"')),
        ("manifest.json", lambda content: content.replace(b'format_version": 1', b'format_version": 2', 1)),
    ],
)
def test_damage_is_named(tokenizer: Path, tmp_path: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    path = write_rows(tmp_path / "p.jsonl", text_rows(10))
    made = prepare(path, tokenizer, tmp_path / "out", held_out_pairs=2)
    file = made.folder / name
    file.write_bytes(damage(file.read_bytes()))
    problem = rf"{made.folder}: {name}.*; remove the folder, and the same command makes it again$"
    with pytest.raises(DataError, match=problem):
        prepare(path, tokenizer, tmp_path / "out", held_out_pairs=2)


# --- real text --------------------------------------------------------------------------------------------------


def test_real_preferences_come_back_character_by_character(tokenizer: Path, tmp_path: Path) -> None:
    if not GSM8K.is_file():
        pytest.skip(f"no preference file at {GSM8K}")
    pairs = prepare(GSM8K, tokenizer, tmp_path, max_tokens=4096, max_prompt_tokens=2048)
    with gzip.open(GSM8K, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert (pairs.counts.read, pairs.counts.dropped, pairs.counts.cut_prompts) == (len(rows), {}, 0)
    for i, row in enumerate(rows):
        assert pairs.train.texts(i) == (BOS + row["prompt"], row["chosen"] + END, row["rejected"] + END)
