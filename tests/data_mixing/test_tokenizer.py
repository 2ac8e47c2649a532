"""Tokenizers of a store: trained, copied, loaded back; what they encode and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from mixwright.data_mixing.corpora import TokenizerSource
from mixwright.data_mixing.errors import DataError
from mixwright.data_mixing.tokenizer import (
    EOS_TOKEN,
    MAX_PIECE_CHARS,
    cut_text,
    load_tokenizer,
    save_existing,
    save_trained,
    tokenizer_hash,
    train_tokenizer,
)
from tests.data_mixing.corpora_for_tests import sentences

ODD = ["", " ", "\n\n  x", "été 木 \U0001f600", "\x00\x7f", f"a {EOS_TOKEN} b", "x" * 3000, "a\r\nb\ttab", "\u202e"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "tokenizer"
    save_trained(train_tokenizer(sentences(1, 200), 400), folder)
    return folder


def test_any_text_comes_back_from_its_tokens(trained: Path) -> None:
    tokenizer = load_tokenizer(trained)
    for text in [*ODD, *sentences(2, 20)]:
        (ids,) = tokenizer.encode_batch([text])
        assert tokenizer.decode(ids) == text


def test_the_end_of_text_id_occurs_only_where_a_document_ends(trained: Path) -> None:
    tokenizer = load_tokenizer(trained)
    texts = [f"a {EOS_TOKEN} b", EOS_TOKEN, "plain"]
    tokens_n = tokenizer.encode_documents(texts)
    ends = np.flatnonzero(tokens_n == tokenizer.eos_id)
    assert len(ends) == 3
    starts = [0, *(ends[:-1] + 1)]
    assert [tokenizer.decode(tokens_n[a:b].tolist()) for a, b in zip(starts, ends, strict=True)] == texts


def test_a_very_long_text_is_encoded_in_pieces_that_end_with_lines(trained: Path) -> None:
    tokenizer = load_tokenizer(trained)
    line = "the river sings under the stone\n"
    text = line * (5 * MAX_PIECE_CHARS // (2 * len(line))) + "x" * (MAX_PIECE_CHARS + 5)
    pieces = cut_text(text)
    assert "".join(pieces) == text
    assert [len(piece) <= MAX_PIECE_CHARS for piece in pieces] == [True] * 5
    assert [piece.endswith("stone\n") for piece in pieces] == [True, True, True, False, False]
    assert cut_text("") == [""]
    short = line * 100
    tokens_n = tokenizer.encode_documents([short, text, short])
    ends = np.flatnonzero(tokens_n == tokenizer.eos_id)
    assert len(ends) == 3
    assert tokenizer.decode(tokens_n[ends[0] + 1 : ends[1]].tolist()) == text


def test_training_twice_gives_the_same_tokenizer(trained: Path, tmp_path: Path) -> None:
    save_trained(train_tokenizer(iter(sentences(1, 200)), 400), tmp_path / "again")
    assert tokenizer_hash(tmp_path / "again") == tokenizer_hash(trained)
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()


def test_training_does_not_depend_on_the_number_of_threads(trained: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from mixwright.data_mixing.tokenizer import *;"
        "from tests.data_mixing.corpora_for_tests import sentences;"
        "save_trained(train_tokenizer(sentences(1, 200), 400), Path(sys.argv[1]))"
    )
    root = Path(__file__).resolve().parents[2]
    for threads in ("1", "5"):
        environment = {"RAYON_NUM_THREADS": threads, "PATH": "/usr/bin:/bin"}
        folder = tmp_path / threads
        subprocess.run([sys.executable, "-c", script, str(folder)], cwd=root, env=environment, check=True)
        assert tokenizer_hash(folder) == tokenizer_hash(trained)


def test_transformers_loads_the_trained_folder_and_agrees(trained: Path) -> None:
    ours, theirs = load_tokenizer(trained), AutoTokenizer.from_pretrained(trained)
    texts = [text for text in ODD if EOS_TOKEN not in text] + sentences(3, 10)
    assert ours.encode_batch(texts) == theirs(texts, add_special_tokens=False)["input_ids"]
    assert theirs.eos_token_id == ours.eos_id
    assert len(theirs) == ours.vocab_size == 400
    assert theirs.decode(theirs("a (b), c's.")["input_ids"]) == "a (b), c's."


def test_little_text_gives_a_smaller_vocabulary_than_asked_for(tmp_path: Path) -> None:
    save_trained(train_tokenizer(["abc"], 5000), tmp_path / "t")
    assert load_tokenizer(tmp_path / "t").vocab_size < 270


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_a_vocabulary_beyond_sixteen_bits_is_stored_in_thirty_two(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    vocabulary = {EOS_TOKEN: 0, **{f"w{i}": i for i in range(1, vocab_size)}}
    tokenizer = load_tokenizer(word_level(tmp_path / "t", vocabulary))
    assert tokenizer.dtype == dtype
    found = tokenizer.encode_documents([f"w{vocab_size - 1} w7"])
    assert found.dtype == dtype
    assert found.tolist() == [vocab_size - 1, 7, 0]


# --- tokenizers from elsewhere ---------------------------------------------------------------------------------


def word_level(folder: Path, vocabulary: dict[str, int]) -> Path:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=EOS_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    save_trained(tokenizer, folder)
    return folder


def other_tokenizer(folder: Path) -> Path:
    """With a normaliser, a template that adds special tokens, truncation and padding: all of which must not act."""
    tokenizer = train_tokenizer(sentences(1, 50), 300)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.normalizer = normalizers.Lowercase()
    ids = {name: tokenizer.token_to_id(name) for name in ("<s>", "</s>")}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(name, ids[name]) for name in ids]
    )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=64)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def test_a_folder_is_copied_and_encodes_without_special_tokens_truncation_or_padding(tmp_path: Path) -> None:
    path = other_tokenizer(tmp_path / "other")
    save_existing(TokenizerSource(path=str(path)), tmp_path / "copy")
    tokenizer = load_tokenizer(tmp_path / "copy")
    (ids,) = tokenizer.encode_batch(["The River SINGS over </s> and <s> the stone"])
    assert tokenizer.decode(ids) == "the river sings over </s> and <s> the stone"
    assert tokenizer.eos_id == AutoTokenizer.from_pretrained(path).convert_tokens_to_ids("</s>")
    assert tokenizer.eos_id not in ids


def test_a_single_file_needs_the_name_of_its_end_of_text_token(tmp_path: Path, trained: Path) -> None:
    file = str(trained / "tokenizer.json")
    with pytest.raises(DataError, match=r"has no end-of-text token; name one in tokenizer\.eos_token"):
        save_existing(TokenizerSource(path=file), tmp_path / "a")
    with pytest.raises(DataError, match=r"no token '<eot>'; (did you mean|valid names)"):
        save_existing(TokenizerSource(path=file, eos_token="<eot>"), tmp_path / "b")
    save_existing(TokenizerSource(path=file, eos_token=EOS_TOKEN), tmp_path / "c")
    assert load_tokenizer(tmp_path / "c").encode_batch(["the river"]) == load_tokenizer(trained).encode_batch(
        ["the river"]
    )
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def test_a_tokenizer_without_a_fast_form_is_used_through_transformers(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path / "byt5")
    save_existing(TokenizerSource(path=str(tmp_path / "byt5")), tmp_path / "copy")
    assert not (tmp_path / "copy" / "tokenizer.json").exists()
    tokenizer = load_tokenizer(tmp_path / "copy")
    assert tokenizer.encode_batch(["ab", "</s>"]) == [[100, 101], [63, 50, 118, 65]]
    assert tokenizer.encode_documents(["ab"]).tolist() == [100, 101, 1]
    assert tokenizer.decode([100, 101]) == "ab"
    assert len(tokenizer_hash(tmp_path / "copy")) == 64


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", '{"version": "1.0", "model": {"type": "None"}}'])
def test_garbage_for_a_tokenizer_is_one_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer '.*tokenizer.json': cannot be loaded: "):
        save_existing(TokenizerSource(path=str(tmp_path / "tokenizer.json"), eos_token="x"), tmp_path / "out")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    with pytest.raises(DataError, match=r"tokenizer.json: not a tokenizer: "):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_is_not_there_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"tokenizer '.*nowhere': cannot be loaded: "):
        save_existing(TokenizerSource(path=str(tmp_path / "nowhere")), tmp_path / "out")
    with pytest.raises(DataError, match="not a tokenizer folder"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_tokenizer_whose_end_of_text_token_is_unknown_is_refused(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((trained / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<none>"}))
    with pytest.raises(DataError, match="its end-of-text token '<none>' is not in the vocabulary"):
        load_tokenizer(tmp_path)


def test_loading_a_trained_tokenizer_does_not_import_transformers(trained: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from mixwright.data_mixing.tokenizer import load_tokenizer;"
        "load_tokenizer(Path(sys.argv[1])).encode_batch(['x']); print('transformers' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", script, str(trained)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
