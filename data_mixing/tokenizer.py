"""Tokenizers of a store: load any, train a byte-level BPE, save, fingerprint.

Text is encoded as it stands: no special tokens are added, and a special token that occurs in the text is encoded
like any other text, so that the end-of-document id occurs only where a document ends.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mixwright.data_mixing.corpora import TokenizerSource
from mixwright.data_mixing.errors import DataError, nearest
from mixwright.data_mixing.plain_data import read_json_object
from mixwright.data_mixing.staging import atomic_file

EOS_TOKEN = "<|endoftext|>"  # nosec B105  # no password
MAX_PIECE_CHARS = 1 << 20
_ENOUGH_FOR_UINT16 = 1 << 16


@dataclass(frozen=True)
class TextTokenizer:
    """Encode and decode for a store. `vocab_size` is the largest id + 1, `encode_batch` gives lists of ids."""

    encode_batch: Callable[[Sequence[str]], list[list[int]]]
    decode: Callable[[Sequence[int]], str]
    vocab_size: int
    eos_id: int

    @property
    def dtype(self) -> str:
        return "uint16" if self.vocab_size <= _ENOUGH_FOR_UINT16 else "uint32"

    def encode_documents(self, texts: Sequence[str]) -> NDArray[Any]:
        """Tokens of all texts, each followed by the end-of-document id; dtype uint16 or uint32 [n].

        A text of more than MAX_PIECE_CHARS is encoded in pieces, which bounds the memory that this takes.
        """
        pieces = [cut_text(text) for text in texts]
        encoded = iter(self.encode_batch([piece for parts in pieces for piece in parts]))
        joined: list[int] = []
        for parts in pieces:
            for _ in parts:
                joined += next(encoded)
            joined.append(self.eos_id)
        return np.array(joined, self.dtype)


def cut_text(text: str) -> list[str]:
    """`text` in pieces of at most MAX_PIECE_CHARS, cut after the last line end in reach or else anywhere."""
    pieces, start = [], 0
    while len(text) - start > MAX_PIECE_CHARS:
        stop = text.rfind("\n", start, start + MAX_PIECE_CHARS) + 1 or start + MAX_PIECE_CHARS
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with EOS_TOKEN as id 0 and all 256 bytes in its alphabet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_trained(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder that `transformers.AutoTokenizer` loads."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS_TOKEN, "bos_token": EOS_TOKEN, "pad_token": EOS_TOKEN,
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    with atomic_file(folder / "tokenizer.json") as file:
        file.write(tokenizer.to_str(pretty=True).encode())
    with atomic_file(folder / "tokenizer_config.json") as file:
        file.write((json.dumps(settings, indent=2) + "\n").encode())


def save_existing(source: TokenizerSource, folder: Path) -> None:
    """Copy the tokenizer of `source.path` (folder, tokenizer.json or hub name) to `folder`.

    Raises DataError when it cannot be loaded, or has no end-of-document token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # seconds, and not needed for a trained one

    assert source.path is not None
    path = Path(source.path)
    try:
        if path.is_file():
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
        else:
            tokenizer = AutoTokenizer.from_pretrained(source.path)  # nosec B615  # the user's choice; the store keeps a copy and its hash
    except Exception as error:  # transformers and tokenizers raise bare Exception for a malformed file
        raise DataError(f"tokenizer {source.path!r}: cannot be loaded: {' '.join(str(error).split())}") from None
    eos_token = source.eos_token or tokenizer.eos_token
    if eos_token is None:
        raise DataError(f"tokenizer {source.path!r}: has no end-of-text token; name one in tokenizer.eos_token")
    if eos_token not in tokenizer.get_vocab():
        hint = nearest(eos_token, tokenizer.all_special_tokens or tokenizer.get_vocab())
        raise DataError(f"tokenizer {source.path!r}: no token {eos_token!r}{hint}")
    tokenizer.eos_token = eos_token
    tokenizer.save_pretrained(folder)


def load_tokenizer(folder: Path) -> TextTokenizer:
    """The tokenizer of a store; `transformers` is imported only for one that has no tokenizer.json."""
    try:
        settings = read_json_object(folder / "tokenizer_config.json")
        if (folder / "tokenizer.json").is_file():
            return _from_json(folder / "tokenizer.json", settings["eos_token"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: not a tokenizer folder: {error}") from None
    return _from_transformers(folder)


def _from_json(path: Path, eos_token: str | dict[str, Any]) -> TextTokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        raise DataError(f"{path}: not a tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # in the sense of: encode them like other text
    eos = _content(eos_token)
    eos_id = tokenizer.token_to_id(eos)
    if eos_id is None:
        raise DataError(f"{path}: its end-of-text token {eos!r} is not in the vocabulary")
    return TextTokenizer(
        encode_batch=lambda texts: [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)],
        decode=lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False),
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        eos_id=eos_id,
    )


def _from_transformers(folder: Path) -> TextTokenizer:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)  # nosec B615  # a local folder

    def encode_batch(texts: Sequence[str]) -> list[list[int]]:
        encoded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)
        return list(encoded["input_ids"])

    return TextTokenizer(
        encode_batch=encode_batch,
        decode=lambda ids: tokenizer.decode(list(ids)),
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        eos_id=tokenizer.eos_token_id,
    )


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 of what determines the ids; raises DataError when `folder` holds no tokenizer.

    In tokenizer.json that is all but what is switched off here (template of special tokens, truncation, padding)
    and the decoder. Without such a file it is every file.
    """
    try:
        if (folder / "tokenizer.json").is_file():
            return _hash_of_json(folder)
        digest = hashlib.sha256()
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: not a tokenizer folder: {error}") from None


def _hash_of_json(folder: Path) -> str:
    tree = read_json_object(folder / "tokenizer.json")
    settings = read_json_object(folder / "tokenizer_config.json")
    parts = {key: tree[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    text = json.dumps({**parts, "eos_token": _content(settings["eos_token"])}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _content(token: str | dict[str, Any]) -> str:
    """A token, which a tokenizer's settings may describe rather than spell."""
    return str(token["content"]) if isinstance(token, dict) else token
