"""Policy documents: what is taken, what is refused and how it is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.domain import Cap
from mixwright.data_mixing.entries import PROPORTION_TOTAL, Genesis
from mixwright.data_mixing.errors import PolicyRejected
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.policy import MAX_DOCUMENT_VALUES, policy_kinds, recordable
from tests.data_mixing.run_cases import SIZES, TrainerSide, genesis

NAMES = list(SIZES)


def static(**keys: Any) -> dict[str, Any]:
    return {"kind": "static", "mixture": {"code": 1}, **keys}


def refusal(document: Any, run: Genesis | None = None, history: RunHistory | None = None) -> str:
    with pytest.raises(PolicyRejected) as caught:
        accept(document, run or genesis(), history=history)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_document_keeps_what_the_user_wrote_and_nothing_else() -> None:
    entry = accept(static(why="try", author="ann", at_step=5, shadow=True), genesis(), request_id="r1")
    assert entry.document == {
        "kind": "static", "mixture": {"code": 1.0}, "why": "try", "author": "ann", "at_step": 5, "shadow": True,
    }  # fmt: skip
    assert (entry.why, entry.author, entry.at_step, entry.shadow, entry.request_id) == ("try", "ann", 5, True, "r1")


def test_yaml_text_is_a_document_too() -> None:
    assert accept("kind: static\nmixture: {code: 3, wiki: 1}", genesis()) == accept(
        {"kind": "static", "mixture": {"code": 3, "wiki": 1}}, genesis()
    )


def test_an_accepted_document_is_accepted_again_with_the_same_result() -> None:
    first = accept(static(caps={"web-*": {"max_epochs": 2}}, why="x"), genesis())
    assert accept(first.document, genesis()) == first
    assert json.loads(first.model_dump_json())["document"] == first.document


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"cod": 1}, "mixture.cod: no such domain; did you mean 'code'?"),
        ({"zzz": 1}, "mixture.zzz: no such domain; valid names: code, web-a, web-b, wiki"),
        ({"zz*": 1}, "mixture.zz*: matches no domain; valid names: code, web-a, web-b, wiki"),
        ({"code": float("nan")}, "mixture.code: input should be a finite number (found nan)"),
        ({"code": float("inf")}, "mixture.code: input should be a finite number (found inf)"),
        ({"code": -0.5}, "mixture.code: input should be greater than or equal to 0 (found -0.5)"),
        ({"code": True}, "mixture.code: expected a number >= 0 (found True)"),
        ({"code": "much"}, "mixture.code: input should be a valid number, "
         "unable to parse string as a number (found 'much')"),
        ({"code": [1]}, "mixture.code: input should be a valid number"),
        ({"code": None}, "mixture.code: input should be a valid number (found None)"),
        ({"code": 0, "wiki": 0.0}, "mixture: every number is 0; at least one must be positive"),
        ({}, "mixture: expected at least one domain, found an empty mapping"),
        (None, "mixture: expected a mapping of domain names to numbers, found NoneType (found None)"),
        ([0.5, 0.5], "mixture: expected a mapping of domain names to numbers, found list"),
        ({False: 1}, "mixture: a domain name must be text, found False; put it in quotes"),
        ({"web-*": 1, "*-a": 1}, "mixture.*-a: domain 'web-a' is also matched by 'web-*'"),
        ({"code": 1, "cod?": 1}, "mixture.cod?: every domain that it matches is named by a key of its own"),
    ],
)  # fmt: skip
def test_a_wrong_mixture_is_refused_with_its_key_and_the_nearest_name(mixture: Any, message: str) -> None:
    assert refusal(static(mixture=mixture)) == message


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (None, "document: expected a mapping of keys, found NoneType"),
        ([1], "document: expected a mapping of keys, found list"),
        (b"kind: static", "document: expected a mapping of keys, found bytes"),
        ("just text", "document: expected a mapping of keys, found str"),
        ({"mixture": {"code": 1}}, "kind: required key is missing; kinds: " + ", ".join(policy_kinds())),
        ({"kind": "stattic"}, "kind: there is no policy of kind 'stattic'; did you mean 'static'?"),
        ({"kind": "__init__"},
         "kind: there is no policy of kind '__init__'; valid names: " + ", ".join(policy_kinds())),
        ({"kind": "os.path"}, "kind: there is no policy of kind 'os.path'; valid names: " + ", ".join(policy_kinds())),
        ({"kind": ["static"]}, "kind: there is no policy of kind ['static']; did you mean 'static'?"),
        (static(mixure=1), "mixure: unknown key; did you mean 'mixture'?"),
        (static(at_step=1000), "at_step: step 1000 is not in the run, which has steps 0 to 999"),
        (static(at_step=-1), "at_step: input should be greater than or equal to 0 (found -1)"),
        (static(at_step=True), "at_step: input should be a valid integer (found True)"),
        (static(at_step=1.5), "at_step: input should be a valid integer (found 1.5)"),
        (static(shadow="yes"), "shadow: input should be a valid boolean (found 'yes')"),
        (static(caps={"cde": {"max_epochs": 1}}), "caps.cde: no such domain; did you mean 'code'?"),
        (static(caps={"code": {"max_epoch": 1}}), "caps.code.max_epoch: unknown key; did you mean 'max_epochs'?"),
        (static(caps={"code": {"max_epochs": 0}}), "caps.code.max_epochs: input should be greater than 0 (found 0)"),
        (static(caps={"code": {"max_epochs": float("inf")}}),
         "caps.code.max_epochs: input should be a finite number (found inf)"),
        (static(mixture={"code": object}), "document: expected plain text, numbers and lists, found <class 'object'>"),
    ],
)  # fmt: skip
def test_a_wrong_document_is_refused_with_its_key_and_the_nearest_name(document: Any, message: str) -> None:
    assert refusal(document) == message


def test_broken_yaml_is_refused_in_one_line() -> None:
    assert refusal("kind: [static").startswith("document: not valid YAML: while parsing a flow sequence")


def test_a_yaml_bomb_is_refused_quickly() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 12)]
    assert "aliases that expand without end" in refusal("kind: static\n" + "\n".join(lines))


def test_a_document_with_too_many_values_is_refused() -> None:
    assert f"more than {MAX_DOCUMENT_VALUES:,} values" in refusal({"kind": "static", "a": [0] * MAX_DOCUMENT_VALUES})


def test_a_document_that_contains_itself_is_refused() -> None:
    assert "aliases that expand without end" in refusal("&a {kind: static, mixture: *a}")
    endless: dict[str, Any] = {"kind": "static"}
    endless["mixture"] = endless
    assert "an endless alias" in refusal(endless)


@pytest.mark.parametrize(
    "document", [static(mixture={"code": float("nan")}), "&a {b: *a}", {"k": object()}, b"\xff", 3]
)
def test_what_the_journal_keeps_of_a_refused_document_is_json(document: Any) -> None:
    kept = recordable(document)
    assert len(json.dumps(kept, allow_nan=False)) < 2000


def test_control_characters_and_line_breaks_do_not_reach_other_peoples_terminals() -> None:
    assert accept(static(why="\x1b[31mred\nand\tmore"), genesis()).why == "[31mred and more"


def test_every_kind_is_a_file_of_the_policies_folder() -> None:
    files = (Path(__file__).parents[2] / "data_mixing" / "policies").glob("*.py")
    assert list(policy_kinds()) == sorted(file.stem for file in files if file.stem != "__init__")


def test_caps_given_by_glob_reach_every_domain_it_matches_and_a_name_wins() -> None:
    entry = accept(static(caps={"web-*": {"max_epochs": 2}, "web-b": {"max_epochs": 5}}), genesis())
    assert entry.caps == {"web-a": Cap(max_epochs=2), "web-b": Cap(max_epochs=5)}


def test_a_policy_that_leaves_nothing_to_read_is_refused_with_step_and_domain() -> None:
    message = refusal(static(caps={"code": {"max_epochs": 2}}))
    assert message.startswith("caps: from step 250 of 1000 on there would be nothing left to read (code 2 epochs)")


@pytest.mark.parametrize("action", ["stop", "allow"])
def test_a_cap_that_says_stop_or_allow_is_the_users_wish(action: str) -> None:
    assert accept(static(caps={"code": {"max_epochs": 2, "on_exhaust": action}}), genesis()).program


def test_a_dead_end_counts_what_the_run_has_read_already(tmp_path: Path) -> None:
    trainer = TrainerSide(tmp_path / "exp", document=static())
    trainer.report(last_step=499)
    document = {"kind": "static", "mixture": {"code": 1}, "caps": {"code": {"max_epochs": 6}}}
    assert "from step 750" in refusal(document, trainer.genesis, trainer.history)


def test_an_at_step_that_has_passed_is_refused(tmp_path: Path) -> None:
    trainer = TrainerSide(tmp_path / "exp")
    trainer.report(last_step=49)
    assert refusal(static(at_step=49), trainer.genesis, trainer.history).startswith(
        "at_step: step 49 has passed, the first open step is 50;"
    )
    assert accept(static(at_step=50), trainer.genesis, history=trainer.history).at_step == 50


def test_a_program_that_is_too_large_for_a_journal_entry_is_refused() -> None:
    many = genesis(sizes={f"d{n}": 10 for n in range(20_000)})
    points = [{"step": 0, "mixture": {"*": 1}}, {"step": 900, "mixture": {"d0": 1}, "ramp": "linear"}]
    assert "segments x domains may be at most" in refusal({"kind": "schedule", "points": points}, many)


def test_proportions_are_exact_integers_in_catalogue_order() -> None:
    entry = accept(static(mixture={"wiki": 1, "code": 3}), genesis())
    assert entry.program[0].proportions == (PROPORTION_TOTAL * 3 // 4, PROPORTION_TOTAL // 4, 0, 0)
