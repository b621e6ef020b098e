"""A command line made from a settings model: one flag a field, so that defaults and descriptions stand once."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from sglang_auf.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


def add_flags(parser: argparse.ArgumentParser, model: type[BaseModel], positional: Collection[str] = ()) -> None:
    """Add a flag (or, for the fields in `positional`, an argument) for each field of `model` that has a description.

    A field without one is not for users to set. A flag or an argument that is not given is absent from the parsed
    options, so that defaults live in the model alone.
    """
    for name, field in model.model_fields.items():
        if field.description is None:
            continue
        if name in positional:
            several: dict[str, Any] = {"nargs": "+"} if _takes_several(field.annotation) else {}
            if not field.is_required():
                several = {"nargs": "*" if several else "?", "default": argparse.SUPPRESS}
            parser.add_argument(name, metavar=name.upper(), help=field.description, **several)
            continue
        flag = _flag(name, field)
        kind: dict[str, Any] = {"metavar": flag.removeprefix("--").replace("-", "_").upper()}
        if field.annotation is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif get_origin(field.annotation) is Literal:
            kind = {"metavar": f"{{{','.join(map(str, get_args(field.annotation)))}}}"}
        elif _takes_several(field.annotation):
            kind["action"] = "append"
        parser.add_argument(
            flag,
            dest=name,
            required=field.is_required(),
            default=argparse.SUPPRESS,
            help=_help(field),
            **kind,
        )


def from_flags(model: type[Model], options: Mapping[str, Any]) -> Model:
    """The parsed options as a `model`. Raises ConfigError, which names the flag."""
    try:
        return model.model_validate(options)
    except ValidationError as error:
        problem = error.errors()[0]
        if not problem["loc"]:  # of several fields together
            found = problem["msg"].removeprefix("Value error, ")
            raise ConfigError(found, "flags that fit together", "add what is missing, or leave one out") from None
        name = str(problem["loc"][0])
        field = next(field for key, field in model.model_fields.items() if name in (key, field.alias))
        found = f"{_flag(name, field)} {problem['input']}"
        raise ConfigError(found, problem["msg"].removeprefix("Value error, ")) from None


def _takes_several(annotation: Any) -> bool:
    """Whether the type is a tuple, also an annotated or optional one."""
    return get_origin(annotation) is tuple or any(_takes_several(part) for part in get_args(annotation))


def _flag(name: str, field: FieldInfo) -> str:
    return "--" + (field.alias or name).replace("_", "-")


def _help(field: FieldInfo) -> str:
    default = field.default
    if field.is_required() or default is None or field.default_factory is not None or default == ():
        return field.description or ""
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{field.description} (default: {shown})"
