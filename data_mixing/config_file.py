"""YAML files to typed configurations: every mistake is one line that names file, key and the nearest valid key."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from mixwright.data_mixing.errors import ConfigError, nearest
from mixwright.data_mixing.plain_data import parse_yaml, read_text, secret_in


class StrictModel(BaseModel):
    """A frozen configuration or record: unknown keys are errors, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


Model = TypeVar("Model", bound=BaseModel)

MAX_MISTAKES = 40
"""Of one document that are told one by one: a refusal is kept in the journal and read by people."""


def load_config(model: type[Model], path: Path, overrides: Sequence[str] = ()) -> Model:
    """Read `path` as `model`, with `key.sub=value` overrides applied first.

    Raises ConfigError when the file is missing, is not a YAML mapping, or does not fit the model.
    """
    tree = read_yaml(path)
    for override in overrides:
        set_override(tree, override)
    return validate(model, tree, str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises ConfigError naming the file (and line, for a syntax error)."""
    try:
        text = read_text(path)
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such file{nearest(path.name, siblings) if siblings else ''}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        tree = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of keys at the top level, found {type(tree).__name__}")
    _refuse_secrets(tree, str(path))
    return tree


def _refuse_secrets(tree: Any, origin: str) -> None:
    """What is configured is copied: into the run's folder, manifests of jobs and stores, the journal."""
    key = secret_in(tree)
    if key is not None:
        raise ConfigError(
            f"{origin}: {key}: a secret has no place in a configuration, which is copied to where others read it; "
            "give it by the environment variable that its owner documents"
        )


def set_override(tree: dict[str, Any], override: str) -> None:
    """Apply one `key.sub=value` (value read as YAML) to a nested mapping in place."""
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: expected key.sub=value")
    *parents, leaf = key.split(".")
    node: Any = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is a value, not a section")
    try:
        node[leaf] = parse_yaml(value)
        _refuse_secrets({leaf: node[leaf]}, f"override {key}")
    except ValueError as error:
        raise ConfigError(f"override {reprlib.repr(override)}: the value is not valid YAML: {error}") from None


def validate(model: type[Model], tree: Mapping[str, Any], origin: str) -> Model:
    """`tree` as `model`; raises ConfigError with one line per mistake, prefixed by `origin`."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = list(dict.fromkeys(f"{origin}: {_describe(model, item)}" for item in error.errors()))
        further = [f"{origin}: {len(lines) - MAX_MISTAKES} further mistakes"] if len(lines) > MAX_MISTAKES else []
        raise ConfigError("\n".join(lines[:MAX_MISTAKES] + further)) from None


def differences(old: object, new: object, key: str = "") -> dict[str, tuple[object, object]]:
    """Both values of every dotted key in which two nested mappings differ; None for what is not there."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return {} if old == new else {key: (old, new)}
    names = [*old, *(name for name in new if name not in old)]
    found: dict[str, tuple[object, object]] = {}
    for name in names:
        found |= differences(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
    return found


def shown_differences(old: object, new: object, most: int = 3) -> str:
    """The first differing keys as `key.sub: 1 there, 2 here; ...`, for an error about what is there already."""
    found = differences(old, new)
    parts = [f"{key}: {reprlib.repr(a)} there, {reprlib.repr(b)} here" for key, (a, b) in list(found.items())[:most]]
    return "; ".join([*parts, f"{len(found) - most} more"] if len(found) > most else parts)


def _describe(model: type[BaseModel], item: Any) -> str:
    """One pydantic error as `key.sub: what is wrong (found ...)`."""
    path = [str(part) for part in item["loc"]]
    key = ".".join(path) or "(top level)"
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key{nearest(path[-1], _keys_at(model, path[:-1]))}"
    if item["type"] == "missing":
        return f"{key}: required key is missing"
    message = item["msg"].removeprefix("Value error, ")
    found = item["input"]
    shown = "" if isinstance(found, (dict, list, BaseModel)) else f" (found {found!r})"
    return f"{key}: {message[0].lower() + message[1:]}{shown}"


def _keys_at(model: type[BaseModel], path: Iterable[str]) -> list[str]:
    """Names of the fields that are valid below `path`, following nested and union-typed models."""
    models = [model]
    for part in path:
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        # Parts that are no field name (an index, a mapping key, a union tag) stay at the same models.
        if fields:
            models = [found for field in fields for found in _models_in(field.annotation)]
        else:
            tagged = [m for m in models if part in _tags(m)]
            models = tagged or models
    return [name for m in models for name in m.model_fields]


def _tags(model: type[BaseModel]) -> set[str]:
    """Values of a model's `kind` field, by which pydantic labels the member of a tagged union."""
    field = model.model_fields.get("kind")
    return set(map(str, get_args(field.annotation))) if field else set()


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _models_in(argument)]
