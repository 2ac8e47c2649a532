"""Fields as the signature of their class, for pydantic models and NamedTuples; Griffe does so for dataclasses alone."""

from __future__ import annotations

import ast
from typing import Any

import griffe

BASES = {"StrictModel", "PolicyDocument", "OnlineDocument", "NamedTuple"}


class FieldSignatures(griffe.Extension):
    """Gives such a class an `__init__` of its own fields."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Griffe calls this once the members of a class are read."""
        if not {str(base).rsplit(".", 1)[-1] for base in cls.bases} & BASES or "__init__" in cls.members:
            return
        parameters = griffe.Parameters(
            griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword),
            *(
                griffe.Parameter(
                    name, annotation=field.annotation, kind=griffe.ParameterKind.keyword_only, default=_default(field)
                )
                for name, field in cls.attributes.items()
                if field.annotation is not None and not name.startswith("_")
            ),
        )
        if len(parameters) > 1:
            cls.set_member("__init__", griffe.Function("__init__", parameters=parameters))


def _default(field: griffe.Attribute) -> str | griffe.Expr | None:
    """The default that a reader sees: of `Field(8, gt=0)` it is 8, of `Field(gt=0)` there is none."""
    if not isinstance(field.value, griffe.ExprCall) or str(field.value.function) != "Field":
        return field.value
    for argument in field.value.arguments:
        if not isinstance(argument, griffe.ExprKeyword):
            return argument
        if argument.name == "default":
            return argument.value
        if argument.name == "default_factory":
            return _made_by(str(argument.value))
    return None


def _made_by(factory: str) -> str:
    """`dict` makes {}, `lambda: x` makes x, `Config` makes Config()."""
    tree = ast.parse(factory, mode="eval").body
    if isinstance(tree, ast.Lambda):
        return ast.unparse(tree.body)
    return {"dict": "{}", "list": "[]", "tuple": "()"}.get(factory, f"{factory}()")
