"""Policy documents: what a user writes, checked and compiled into the integer program that the journal stores.

A document is a flat mapping. `kind` names a file of `mixwright.data_mixing.policies`, which holds `Document` (a
PolicyDocument with the kind's own keys) and `compile_program(document, genesis)`. Adding a kind is adding a file.
Documents are data: nothing in one is imported or executed.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Protocol, cast

from pydantic import AfterValidator, Field

from mixwright.data_mixing import policies
from mixwright.data_mixing.config_file import StrictModel, validate
from mixwright.data_mixing.domain import Cap
from mixwright.data_mixing.entries import Genesis, Segment
from mixwright.data_mixing.errors import ConfigError, PolicyRejected, nearest
from mixwright.data_mixing.loss_weighting import LossWeighting
from mixwright.data_mixing.plain_data import is_text, parse_yaml, secret_in

MAX_DOCUMENT_CHARACTERS = 1 << 20
MAX_DOCUMENT_VALUES = 1 << 17
"""Scalars in a document; more is a mistake, or a YAML file whose aliases expand without end."""

_KIND = re.compile(r"[a-z][a-z0-9_]{0,39}")


class SecretInDocument(PolicyRejected):
    """A policy document holds a secret; the journal does not keep it."""


def _one_line(text: str) -> str:
    """`text` without line breaks and control characters: it is shown in other people's terminals."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


Remark = Annotated[str, Field(max_length=500), AfterValidator(_one_line)]


class PolicyDocument(StrictModel):
    """Keys that every kind of policy has.

    `caps` overrides the run's repetition caps by domain name or glob. `loss_weighting` says how much each sample counts
    from here on (omitted: as before; `strategy: uniform`: all alike). `at_step` asks for an effective step (omitted:
    as soon as possible). A `shadow` is recorded and never committed. `why` and `author` go into the journal.
    """

    kind: str
    caps: dict[str, Cap] = Field(default_factory=dict)
    loss_weighting: LossWeighting | None = None
    at_step: int | None = Field(default=None, ge=0, strict=True)
    shadow: bool = Field(default=False, strict=True)
    why: Remark = ""
    author: Remark = ""


class PolicyKind(Protocol):
    """What a file in `policies/` provides."""

    Document: type[PolicyDocument]

    def compile_program(self, document: PolicyDocument, genesis: Genesis) -> tuple[Segment, ...]:
        """The program in absolute training steps; raises PolicyRejected."""
        ...


def policy_kinds() -> tuple[str, ...]:
    """Names of the kinds that are installed."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(policies.__path__)))


def parse(document: Any) -> tuple[PolicyDocument, PolicyKind]:
    """A document as the model of its kind, and the kind; raises PolicyRejected."""
    mapping = plain_mapping(read_text(document) if isinstance(document, str) else document)
    kind = find_kind(mapping.get("kind"))
    try:
        return validate(kind.Document, mapping, "policy"), kind
    except ConfigError as error:
        lines = [line.removeprefix("policy: ") for line in str(error).splitlines()]
        raise PolicyRejected("; ".join(lines)) from None


def find_kind(name: Any) -> PolicyKind:
    """The file in `policies/` that implements a kind; raises PolicyRejected."""
    kinds = policy_kinds()
    if name is None:
        raise PolicyRejected(f"kind: required key is missing; kinds: {', '.join(kinds)}")
    if not isinstance(name, str) or not _KIND.fullmatch(name) or name not in kinds:
        raise PolicyRejected(f"kind: there is no policy of kind {reprlib.repr(name)}{nearest(str(name)[:80], kinds)}")
    return cast(PolicyKind, importlib.import_module(f"{policies.__name__}.{name}"))


def read_text(text: str) -> Any:
    """The value of YAML text; raises PolicyRejected."""
    if len(text) > MAX_DOCUMENT_CHARACTERS:
        raise PolicyRejected(f"document: {len(text)} characters, at most {MAX_DOCUMENT_CHARACTERS} are taken")
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise PolicyRejected(f"document: not valid YAML: {_one_line(str(error))}") from None


def plain_mapping(document: Any) -> dict[str, Any]:
    """`document` if it is a mapping of plain data of reasonable size; raises PolicyRejected."""
    if not isinstance(document, Mapping):
        raise PolicyRejected(f"document: expected a mapping of keys, found {type(document).__name__}")
    waiting: list[Any] = [document]
    for _ in range(MAX_DOCUMENT_VALUES):
        if not waiting:
            return _without_secrets(document)
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif not (value is None or (is_text(value) if isinstance(value, str) else isinstance(value, (int, float)))):
            raise PolicyRejected(f"document: expected plain text, numbers and lists, found {reprlib.repr(value)}")
    raise PolicyRejected(f"document: more than {MAX_DOCUMENT_VALUES:,} values, or an endless alias")


def _without_secrets(document: Mapping[str, Any]) -> dict[str, Any]:
    key = secret_in(document)
    if key is not None:
        raise SecretInDocument(f"{key}: a secret has no place in a policy: everybody who has the journal can read it")
    return dict(document)


def recordable(document: Any) -> Any:
    """What the journal keeps of a refused document: itself when it is JSON, else a short description of it."""
    try:
        tree = read_text(document) if isinstance(document, str) else document
        mapping = plain_mapping(tree)
        return json.loads(json.dumps(mapping, allow_nan=False))
    except SecretInDocument:
        return "(withheld: it holds a secret)"
    except (PolicyRejected, ValueError, TypeError, RecursionError):
        return document[:1000] if isinstance(document, str) else reprlib.repr(document)
