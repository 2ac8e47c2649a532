"""From text and messages to ids: borders, special tokens, ends, and what cannot be encoded."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, ByT5Tokenizer

from mixwright.data_mixing.errors import DataError
from mixwright.pretrain.rpo.config import ColumnsConfig, PairDataConfig
from mixwright.pretrain.rpo.pair_counts import BadPair
from mixwright.pretrain.rpo.raw_pairs import MessagePair, TextPair, read_pair
from mixwright.pretrain.rpo.reading import Row
from mixwright.pretrain.rpo.templates import EncodedPair, PairEncoder, load_tokenizer, tokenizer_fingerprint
from mixwright.pretrain.rpo.truncation import fit
from tests.pretrain.preferences import BOS, CHAT, END, START, said, write_tokenizer

USER, RIGHT, WRONG = said("user", "the river"), said("assistant", "under the stone"), said("assistant", "over a tree")
CHAT_PAIR = MessagePair("f:1", [USER], [RIGHT], [WRONG])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose chats end with its end of text and a line end."""
    return write_tokenizer(tmp_path_factory.mktemp("rpo") / "chat", CHAT)


def encode(folder: Path, pair: TextPair | MessagePair, end: bool = True, template: str | None = None) -> Any:
    tokenizer = load_tokenizer(str(folder), None)
    if template is not None:
        tokenizer.chat_template = template
    (found,) = PairEncoder(tokenizer, end=end).encode([pair])
    return found


class Reference:
    """Ids by the tokenizers library alone: named special tokens, and text in which none is recognised."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.encode_special_tokens = True

    def special(self, token: str) -> int:
        return int(self._tokenizer.token_to_id(token))

    def text(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def turn(self, role: str, content: str) -> list[int]:
        turn = [self.special(START), *self.text(f"{role}\n{content}"), self.special(END)]
        return [*turn, *self.text("\n")]


# --- text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("post", "bos"), [("<s> $A", BOS), ("<s> $A <|im_end|>", BOS), (None, BOS), (None, None)])
def test_texts_are_encoded_apart_with_one_beginning_and_one_end(
    tmp_path: Path, post: str | None, bos: str | None
) -> None:
    folder = write_tokenizer(tmp_path, None, post, bos)
    reference = Reference(folder)
    found = encode(folder, TextPair("f:1", "the river", " sings", "  under\n"))
    head = [reference.special(BOS)] if post else []
    end = [reference.special(END)]
    assert found.prompt == head + reference.text("the river")
    assert found.chosen == reference.text(" sings") + end
    assert found.rejected == reference.text("  under\n") + end
    assert found.num_head == len(head)
    assert encode(folder, TextPair("f:1", "", "a", "b"), end=False).prompt == head


def test_special_tokens_that_a_text_spells_out_are_text(folder: Path) -> None:
    reference = Reference(folder)
    found = encode(folder, TextPair("f:1", f"a {START} b", f"{END}", "plain"))
    assert found.prompt == reference.text(f"a {START} b")
    assert found.chosen == [*reference.text(END), reference.special(END)]
    assert found.chosen.count(reference.special(END)) == 1
    assert found.spells_special
    assert not encode(folder, TextPair("f:1", "a <im_start> b", "one", "two")).spells_special


def test_an_added_token_that_is_not_special_is_one_token_in_text_and_messages(folder: Path) -> None:
    think = Reference(folder).special("<think>")
    assert think in encode(folder, TextPair("f:1", "a", "<think> b", "c")).chosen
    pair = MessagePair("f:1", [USER], [said("assistant", "<think> b")], [WRONG])
    assert think in encode(folder, pair).chosen


def test_a_tokenizer_that_only_adds_an_end_adds_nothing_to_prompts(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    found = encode(tmp_path, TextPair("f:1", "ab", "c</s>", "d"))
    assert (found.prompt, found.rejected) == ([100, 101], [103, 1])
    assert found.chosen == [102, *(ord(letter) + 3 for letter in "</s>"), 1]


def test_texts_that_differ_only_before_the_tokenizer_are_identical(tmp_path: Path) -> None:
    from tokenizers import normalizers

    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert encode(tmp_path, TextPair("f:1", "a", "River", "river")).reason == "identical"
    assert encode(tmp_path, TextPair("f:1", "a", " ", "river")).reason == "empty"


def test_an_end_needs_an_end_of_text_token(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder), None)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"has no end-of-text token .*`data.end: false`"):
        PairEncoder(tokenizer, end=True)
    PairEncoder(tokenizer, end=False)


# --- messages ---------------------------------------------------------------------------------------------------


def test_a_chat_of_several_turns_is_what_its_template_writes(folder: Path) -> None:
    prompt = [said("system", "be bright"), USER, said("assistant", "walks"), said("user", "never é木")]
    found = encode(folder, MessagePair("f:1", prompt, [RIGHT], [WRONG]))
    reference = Reference(folder)
    turns = [token for message in prompt for token in reference.turn(**message)]
    assert found.prompt == [reference.special(BOS), *turns, reference.special(START), *reference.text("assistant\n")]
    assert found.chosen == [*reference.text("under the stone"), reference.special(END)]
    assert found.rejected == [*reference.text("over a tree"), reference.special(END)]
    assert found.num_head == 1
    assert not found.spells_special


def test_without_an_end_completions_are_what_the_template_writes(folder: Path) -> None:
    reference = Reference(folder)
    found = encode(folder, CHAT_PAIR, end=False)
    assert found.chosen == [*reference.text("under the stone"), reference.special(END), *reference.text("\n")]


@pytest.mark.parametrize("closing", ["", "|", "<|im_end|>|"])
def test_an_end_is_added_where_the_template_writes_none_at_the_end(folder: Path, closing: str) -> None:
    template = CHAT.replace("<|im_end|>\n", closing)
    found = encode(folder, CHAT_PAIR, template=template)
    assert AutoTokenizer.from_pretrained(folder).decode(found.chosen) == f"under the stone{closing}{END}"


def test_completions_of_several_messages_end_once_at_their_end(folder: Path) -> None:
    more = [WRONG, said("user", "why"), RIGHT]
    found = encode(folder, MessagePair("f:1", [USER], [RIGHT], more))
    reference = Reference(folder)
    assert found.rejected.count(reference.special(END)) == 3
    assert found.rejected[-1] == reference.special(END)


def test_pairs_of_both_kinds_together_stay_in_their_order(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder), None)
    pairs: list[TextPair | MessagePair] = []
    expected: list[EncodedPair] = []
    for i in range(20):
        text = TextPair(f"f:{i}", "a", str(i), "x")
        pairs += [CHAT_PAIR, text, MessagePair("f", [said("user", END)], [WRONG], [RIGHT])]
        expected += [encode(folder, CHAT_PAIR), encode(folder, text)]
    found = PairEncoder(tokenizer, end=True).encode(pairs)
    assert [one for one in found if isinstance(one, EncodedPair)] == expected
    assert [isinstance(one, BadPair) for one in found] == [False, False, True] * 20


def test_a_template_that_writes_the_prompt_otherwise_before_a_completion_is_refused(folder: Path) -> None:
    template = CHAT.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>")
    with pytest.raises(DataError, match=r"^f:1: the chat template writes the prompt differently .*'<think>' became"):
        encode(folder, CHAT_PAIR, template=template)
    short = "{% if messages|length == 1 %}be good: {% endif %}" + CHAT
    with pytest.raises(DataError, match=r"^f:1: .* from character 0, 'be good"):
        encode(folder, CHAT_PAIR, template=short)


def test_a_template_that_ends_its_prompt_within_a_token_is_refused(folder: Path) -> None:
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template = turns + "{% if add_generation_prompt %}assistant: {% endif %}"
    with pytest.raises(DataError, match=r"^f:1: the tokenizer merges .*\(' under' across the border\)"):
        encode(folder, CHAT_PAIR, template=template)


def test_a_completion_whose_first_white_space_merges_is_a_bad_pair(folder: Path) -> None:
    pair = MessagePair("f:9", [USER], [said("assistant", "\n\nsings")], [WRONG])
    found = encode(folder, pair)
    assert (found.reason, found.where) == ("border", "f:9")
    assert "begins with white space" in str(found)
    assert isinstance(encode(folder, pair, template=CHAT.replace("m.content", "m.content | trim")), EncodedPair)


@pytest.mark.parametrize(
    "message",
    [
        said("user", f"so {END}\n{START}system"),
        {"role": f"user{END}", "content": "hm"},
        {"role": "user", "content": "hm", "calls": [{"name": {"x": BOS}}]},
        {"role": "user", "content": "hm", START: 1},
    ],
)
def test_a_message_that_spells_out_a_special_token_is_bad(folder: Path, message: dict[str, Any]) -> None:
    for prompt, chosen in (([message], [RIGHT]), ([USER], [RIGHT, message])):
        found = encode(folder, MessagePair("f:1", prompt, chosen, [WRONG]))
        assert found.reason == "special_token"
        assert str(found).startswith("f:1: a message spells out the special token '<")


def test_messages_without_a_template_are_one_error_with_its_remedy(tmp_path: Path, folder: Path) -> None:
    plain = write_tokenizer(tmp_path / "plain")
    with pytest.raises(DataError, match=r"^f:1: messages need a chat template, .*`model.chat_template`$"):
        encode(plain, CHAT_PAIR)
    (tmp_path / "chat.jinja").write_text(CHAT)
    tokenizer = load_tokenizer(str(plain), tmp_path / "chat.jinja")
    assert PairEncoder(tokenizer, end=True).encode([CHAT_PAIR]) == [encode(folder, CHAT_PAIR)]
    with pytest.raises(DataError, match=r"none.jinja: chat template cannot be read: .*No such file"):
        load_tokenizer(str(plain), tmp_path / "none.jinja")


def test_a_template_is_refused_that_is_no_jinja_and_refuses_rows_itself(folder: Path) -> None:
    with pytest.raises(DataError, match="the chat template is not valid Jinja: line 1: "):
        encode(folder, CHAT_PAIR, template="{% for m in %}")
    strict = "{% if messages[0].role == 'user' %}{{ raise_exception('no users here') }}{% endif %}" + CHAT
    found = encode(folder, CHAT_PAIR, template=strict)
    assert (found.reason, str(found)) == ("template", "f:1: the chat template refuses it: no users here")


def test_a_folder_without_a_tokenizer_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("", "nowhere"):
        with pytest.raises(DataError, match=r": its tokenizer cannot be loaded: "):
            load_tokenizer(str(tmp_path / name), None)


def test_the_fingerprint_of_a_tokenizer_knows_its_template_and_its_beginning(tmp_path: Path) -> None:
    def identity(name: str, *args: Any) -> str:
        return tokenizer_fingerprint(load_tokenizer(str(write_tokenizer(tmp_path / name, *args)), None))

    variants = [(None,), (CHAT,), (CHAT + " ",), (CHAT, "<s> $A"), (CHAT, None, None)]
    found = [identity(str(i), *variant) for i, variant in enumerate(variants)]
    assert len(set(found)) == len(variants)
    assert identity("again", CHAT) == found[1]
    used = load_tokenizer(str(tmp_path / "1"), None)
    PairEncoder(used, end=True).encode([CHAT_PAIR])
    used("a", truncation=True, max_length=4)
    assert tokenizer_fingerprint(used) == found[1]


# --- rows -------------------------------------------------------------------------------------------------------


def row(**values: Any) -> Row:
    return Row("f:7", values, 0)


MESSAGES = {"prompt": [USER], "chosen": [RIGHT], "rejected": [WRONG]}
TEXTS = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("values", "reason", "problem"),
    [
        ({"prompt": "a", "chosen": "b"}, "field", "no field 'rejected'; valid names: chosen, prompt"),
        ({**TEXTS, "prompt": None}, "field", "field 'prompt' is null, expected text or a list of messages"),
        ({**TEXTS, "chosen": 3}, "field", "field 'chosen' is int"),
        ({**TEXTS, "chosen": {"a": 1}}, "field", "field 'chosen' is dict"),
        ({**TEXTS, "rejected": "\ud800x"}, "field", "unpaired surrogate at character 0"),
        ({**TEXTS, "chosen": ""}, "empty", "the completion of 'chosen' is empty"),
        ({**TEXTS, "rejected": "b"}, "identical", "'chosen' equals 'rejected'"),
        ({**MESSAGES, "prompt": []}, "no_prompt", "'prompt' has no messages"),
        ({**MESSAGES, "chosen": [said("assistant", " \n")]}, "empty", "the completion of 'chosen' is empty"),
        ({**MESSAGES, "chosen": []}, "empty", "the completion of 'chosen' is empty"),
        ({**MESSAGES, "chosen": ["hm"]}, "field", r"chosen\[0\] is str, expected a message"),
        ({**MESSAGES, "chosen": [RIGHT, {"role": "user"}]}, "field", r"chosen\[1\].content is null, expected text"),
        ({**MESSAGES, "chosen": [{"role": 1, "content": ""}]}, "field", r"chosen\[0\].role is int"),
        ({**MESSAGES, "chosen": [said("user", "\udfff")]}, "field", "unpaired surrogate"),
        ({"chosen": [RIGHT], "rejected": [WRONG]}, "no_prompt", "no messages in common"),
        ({"chosen": [USER, RIGHT], "rejected": [USER, RIGHT]}, "identical", "'chosen' equals 'rejected'"),
        ({"chosen": [USER, said("user", "x")], "rejected": [USER, RIGHT]}, "role", "of role 'user'"),
        ({**MESSAGES, "rejected": [said("system", "x")]}, "role", "begins with a message of role 'system'"),
        ({"chosen": [USER, RIGHT], "rejected": [USER]}, "empty", "the completion of 'rejected' is empty"),
    ],
)  # fmt: skip
def test_a_bad_row_says_what_is_wrong(values: dict[str, Any], reason: str, problem: str) -> None:
    with pytest.raises(BadPair, match=f"^f:7: .*{problem}") as caught:
        read_pair(row(**values), ColumnsConfig())
    assert caught.value.reason == reason
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.reason) == (str(caught.value), reason)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({**TEXTS, "chosen": [RIGHT]}, "'chosen' is a list of messages, 'rejected' is text"),
        ({**TEXTS, "prompt": [USER]}, "'prompt' is a list of messages, 'chosen' is text"),
        ({**MESSAGES, "prompt": "a"}, "'prompt' is text, 'chosen' a list of messages; .*`data.columns.prompt: null`"),
        ({"prompt": [USER], "chosen": [USER, RIGHT], "rejected": [USER, WRONG]}, "repeat .*`data.columns.prompt: null"),
    ],
)
def test_wrong_columns_are_an_error_and_no_bad_pair(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=f"^f:7: .*{problem}") as caught:
        read_pair(row(**values), ColumnsConfig())
    assert not isinstance(caught.value, BadPair)


def test_the_messages_that_both_begin_with_are_the_prompt() -> None:
    system, again = said("system", "x"), said("user", "again")
    chosen, rejected = [system, USER, RIGHT, again, RIGHT], [system, USER, RIGHT, again, WRONG]
    expected = MessagePair("f:7", [system, USER, RIGHT, again], [RIGHT], [WRONG])
    nulled = [{**message, "tool_calls": None} for message in chosen]
    for columns in (ColumnsConfig(prompt=None), ColumnsConfig()):
        assert read_pair(row(chosen=nulled, rejected=rejected, prompt=None), columns) == expected
        assert read_pair(row(chosen=chosen, rejected=rejected), columns) == expected
    with pytest.raises(DataError, match=r"`data.columns.prompt: null` wants messages, 'chosen' is text"):
        read_pair(row(**TEXTS), ColumnsConfig(prompt=None))


# --- truncation -------------------------------------------------------------------------------------------------


def test_cutting_keeps_the_prompts_end_and_the_completions_beginning_and_never_leaves_nothing() -> None:
    sizes = itertools.product(range(7), range(1, 6), range(3), range(1, 5), range(1, 5))
    for length_p, length_c, num_head, limit_p, room in sizes:
        prompt = list(range(100, 100 + length_p))
        chosen, rejected = list(range(1, 1 + length_c)), list(range(11, 11 + 3))
        config = PairDataConfig(train="x", max_tokens=limit_p + room, max_prompt_tokens=limit_p)
        found = fit(EncodedPair("f:1", prompt, chosen, rejected, min(num_head, length_p), False), config)
        head = min(num_head, limit_p - 1) if length_p > limit_p else 0
        assert found.prompt == prompt[:head] + prompt[max(length_p - limit_p, 0) + head :]
        left = config.max_tokens - len(found.prompt)
        assert (found.chosen, found.rejected) == (chosen[:left], rejected[:left])
        assert min(len(found.chosen), len(found.rejected)) >= 1
        assert found.cut_prompt == (length_p > limit_p)
        assert found.cut_completions == (length_c > left) + (left < 3)


def test_pairs_that_may_not_be_cut_are_bad() -> None:
    pair = EncodedPair("f:1", [1] * 6, [2, 3, 4, 5], [2, 3, 5], 0, False)
    limits: dict[str, Any] = {"train": "x", "max_tokens": 8}
    with pytest.raises(BadPair, match=r"^f:1: the prompt has 6 tokens, data.max_prompt_tokens is 5$") as long_prompt:
        fit(pair, PairDataConfig(**limits, max_prompt_tokens=5, long_prompt="bad"))
    with pytest.raises(BadPair, match=r"^f:1: a completion has 4 tokens, data.max_tokens leaves room for 2$") as long:
        fit(pair, PairDataConfig(**limits, max_prompt_tokens=6, long_completion="bad"))
    with pytest.raises(BadPair, match=r"^f:1: chosen and rejected have the same first 2 tokens$") as same:
        fit(pair, PairDataConfig(**limits, max_prompt_tokens=6))
    assert [error.value.reason for error in (long_prompt, long, same)] == [
        "long_prompt",
        "long_completion",
        "identical",
    ]
