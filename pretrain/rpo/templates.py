"""From text or messages to token ids of prompt and completions, the same as generation will see.

Text: prompt and completion are encoded apart, as in generation, where a completion follows the ids of its prompt. What
the tokenizer puts before a text (BOS) goes once before the prompt, and nothing else is added.

Messages: the tokenizer's chat template writes the prompt with its generation prompt, and the prompt with a completion.
The ids of the first must begin the ids of the second; the rest is the completion. A template that writes the prompt
otherwise when a completion follows, or ends it where the tokenizer merges across the border, cannot be trained for: a
DataError. Where only the white space that a completion begins with merges, the pair is bad.

With `end` a completion ends with the end-of-text id, once: white space that a template writes after it is left out.

Special tokens that a text spells out are data. In a plain text they are encoded like any text. A rendered chat does not
show who wrote them, so a message that spells one out, in its content, role or any other key, makes the pair bad. Added
tokens that are not special (<think>) are meant to be written by models, and are encoded as such in both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from mixwright.data_mixing.answers import one_line
from mixwright.data_mixing.errors import DataError
from mixwright.data_mixing.manifest import fingerprint
from mixwright.pretrain.rpo.pair_counts import BadPair
from mixwright.pretrain.rpo.raw_pairs import Message, MessagePair, TextPair, strings_in

_SHOWN = 30
_WITHOUT_MASKS = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}  # nosec B105  # a switch


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of a pair. The first `num_head` of the prompt (BOS) stay when its beginning is cut off.

    `spells_special`: one of its texts spells out a special token.
    """

    where: str
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    num_head: int
    spells_special: bool


@dataclass(frozen=True)
class _Chat:
    """A pair as the chat template writes it: the prompt, and the prompt with each completion."""

    pair: MessagePair
    prompt: str
    chosen: str
    rejected: str


def load_tokenizer(model_folder: str, chat_template: Path | None) -> Any:
    """The tokenizer of a Hugging Face folder, with the template of a Jinja file if one is given; raises DataError."""
    from transformers import AutoTokenizer  # seconds, and not needed to open pairs

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_folder)  # nosec B615  # the user's model, without its code
    except Exception as error:  # transformers and tokenizers raise bare Exception for a malformed file
        raise DataError(f"{model_folder}: its tokenizer cannot be loaded: {one_line(error)}") from None
    if chat_template is not None:
        try:
            tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{chat_template}: chat template cannot be read: {one_line(error)}") from None
    return tokenizer


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Identifies what decides ids: vocabulary, rules, special tokens and chat template."""
    if getattr(tokenizer, "is_fast", False):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules.pop("truncation", None)  # both depend on the last call, and are not used here
        rules.pop("padding", None)
    else:
        added = {str(number): str(token) for number, token in tokenizer.added_tokens_decoder.items()}
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "added": added}
    return fingerprint([rules, tokenizer.special_tokens_map, tokenizer.chat_template])


class PairEncoder:
    """Encodes pairs with a tokenizer, of which it uses everything but truncation and padding."""

    def __init__(self, tokenizer: Any, *, end: bool) -> None:
        """Raises DataError when completions are to `end` and the tokenizer has no end-of-text token."""
        if end and tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end-of-text token (eos_token) that completions could end with; name one in its "
                "tokenizer_config.json, or set `data.end: false`"
            )
        self._tokenizer = tokenizer
        self._eos_id: int | None = tokenizer.eos_token_id if end else None
        self._head = _leading_ids(tokenizer)
        special = [
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content
        ]
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")

    def encode(self, pairs: Sequence[TextPair | MessagePair]) -> list[EncodedPair | BadPair]:
        """Ids of each pair, or why there are none; raises DataError for what is wrong with template or tokenizer."""
        texts = [(i, pair) for i, pair in enumerate(pairs) if isinstance(pair, TextPair)]
        messages = [(i, pair) for i, pair in enumerate(pairs) if isinstance(pair, MessagePair)]
        found: dict[int, EncodedPair | BadPair] = {}
        found |= zip((i for i, _ in texts), self._encode_texts([pair for _, pair in texts]), strict=True)
        found |= zip((i for i, _ in messages), self._encode_messages([pair for _, pair in messages]), strict=True)
        return [found[i] for i in range(len(pairs))]

    # --- text -----------------------------------------------------------------------------------------------------

    def _encode_texts(self, pairs: Sequence[TextPair]) -> list[EncodedPair | BadPair]:
        ids = self._ids([text for pair in pairs for text in (pair.prompt, pair.chosen, pair.rejected)], as_text=True)
        return [self._text_pair(pair, *ids[3 * i : 3 * i + 3]) for i, pair in enumerate(pairs)]

    def _text_pair(
        self, pair: TextPair, prompt: list[int], chosen: list[int], rejected: list[int]
    ) -> EncodedPair | BadPair:
        spells_special = self._spelt((pair.prompt, pair.chosen, pair.rejected)) is not None
        return self._finished(pair.where, [*self._head, *prompt], chosen, rejected, spells_special)

    # --- messages -------------------------------------------------------------------------------------------------

    def _encode_messages(self, pairs: Sequence[MessagePair]) -> list[EncodedPair | BadPair]:
        if pairs and self._tokenizer.chat_template is None:
            raise DataError(
                f"{pairs[0].where}: messages need a chat template, which the tokenizer does not have; name a Jinja "
                "file in `model.chat_template`"
            )
        chats = [self._chat(pair) for pair in pairs]
        written = [chat for chat in chats if isinstance(chat, _Chat)]
        ids = iter(self._ids([text for c in written for text in (c.prompt, c.chosen, c.rejected)], as_text=False))
        return [
            self._chat_pair(chat, next(ids), next(ids), next(ids)) if isinstance(chat, _Chat) else chat
            for chat in chats
        ]  # fmt: skip

    def _chat(self, pair: MessagePair) -> _Chat | BadPair:
        """What the template writes; the prompt must be the beginning of both others."""
        messages = [*pair.prompt, *pair.chosen, *pair.rejected]
        if (token := self._spelt(strings_in(messages))) is not None:
            return BadPair(pair.where, "special_token", f"a message spells out the special token {token!r}")
        try:
            prompt = self._render(pair.prompt, add_generation_prompt=True)
            chosen, rejected = (self._render([*pair.prompt, *rest]) for rest in (pair.chosen, pair.rejected))
        except TemplateSyntaxError as error:
            raise DataError(f"the chat template is not valid Jinja: line {error.lineno}: {one_line(error)}") from None
        except Exception as error:  # templates are programs, and may fail in any way
            return BadPair(pair.where, "template", f"the chat template refuses it: {one_line(error)}")
        for whole in (chosen, rejected):
            if not whole.startswith(prompt):
                raise _changed_prompt(pair.where, prompt, whole)
        return _Chat(pair, prompt, chosen, rejected)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        text: str = self._tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text

    def _chat_pair(
        self, chat: _Chat, prompt: list[int], chosen: list[int], rejected: list[int]
    ) -> EncodedPair | BadPair:
        completions = ((chat.pair.chosen, chosen), (chat.pair.rejected, rejected))
        for completion, ids in completions:
            if ids[: len(prompt)] != prompt:
                return self._merged(chat.pair.where, completion, prompt, ids)
        start = len(prompt)
        return self._finished(chat.pair.where, prompt, chosen[start:], rejected[start:], spells_special=False)

    def _merged(self, where: str, completion: Sequence[Message], prompt: list[int], ids: list[int]) -> BadPair:
        """Why ids do not begin with the prompt's, although the text does; raises DataError if it is the template's."""
        place = _first_difference(prompt, ids)
        merged = self._tokenizer.decode(ids[place : place + 1], clean_up_tokenization_spaces=False)
        problem = (
            f"the tokenizer merges the end of the templated prompt with the completion ({merged!r} across the border)"
        )
        if completion[0]["content"][:1].isspace():
            return BadPair(where, "border", f"{problem}; the completion begins with white space")
        raise DataError(f"{where}: {problem}; the chat template must end its prompt where a token ends")

    # --- both -----------------------------------------------------------------------------------------------------

    def _ids(self, texts: list[str], as_text: bool) -> list[list[int]]:
        """Ids of each text without added special tokens; `as_text`: spelt-out ones are encoded like any text."""
        if not texts:
            return []
        encoded = self._tokenizer(texts, add_special_tokens=False, split_special_tokens=as_text, **_WITHOUT_MASKS)
        return list(encoded["input_ids"])

    def _spelt(self, texts: Iterable[str]) -> str | None:
        """The first special token that is spelt out."""
        return next((match[0] for text in texts if (match := self._special.search(text))), None)

    def _finished(
        self, where: str, prompt: list[int], chosen: list[int], rejected: list[int], spells_special: bool
    ) -> EncodedPair | BadPair:
        if not chosen or not rejected:
            return BadPair(where, "empty", "a completion has no tokens")
        chosen, rejected = self._ended(chosen), self._ended(rejected)
        if chosen == rejected:
            return BadPair(where, "identical", "chosen and rejected have the same tokens")
        return EncodedPair(where, prompt, chosen, rejected, self._num_head(prompt), spells_special)

    def _ended(self, ids: list[int]) -> list[int]:
        if self._eos_id is None:
            return ids
        if self._eos_id in ids:
            stop = len(ids) - ids[::-1].index(self._eos_id)
            if not self._tokenizer.decode(ids[stop:]).strip():
                return ids[:stop]
        return [*ids, self._eos_id]

    def _num_head(self, prompt: list[int]) -> int:
        """How many ids at the beginning of a prompt are not its text: what the tokenizer adds, or a template's BOS."""
        if self._head and prompt[: len(self._head)] == self._head:
            return len(self._head)
        bos_id = self._tokenizer.bos_token_id
        return int(bos_id is not None and prompt[:1] == [bos_id])


def _leading_ids(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    starts = range(len(whole) - len(plain) + 1)
    return list(whole[: next((i for i in starts if whole[i : i + len(plain)] == plain), 0)])


def _first_difference(one: Sequence[Any], other: Sequence[Any]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _changed_prompt(where: str, prompt: str, whole: str) -> DataError:
    place = _first_difference(prompt, whole)
    alone, before = prompt[place : place + _SHOWN], whole[place : place + _SHOWN]
    return DataError(
        f"{where}: the chat template writes the prompt differently when a completion follows: from character {place}, "
        f"{alone!r} became {before!r}; a prompt with its generation prompt must be how the whole conversation begins"
    )
