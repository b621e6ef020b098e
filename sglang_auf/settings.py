"""Settings from YAML files and `--set a.b=value`: read, merged, checked, and refused with one kind of sentence."""

from __future__ import annotations

import difflib
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from sglang_auf.errors import AufError, ConfigError

Model = TypeVar("Model", bound=BaseModel)

_SHORT = reprlib.Repr()  # values in messages: a list of a thousand tokens must not fill the terminal
_SHORT.maxstring = _SHORT.maxother = 200


class Settings(BaseModel):
    """What a user sets: no key is unknown, and nothing changes after the check."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _yaml_switch(value: object) -> object:
    """YAML 1.1 reads a bare `on` or `off` as a boolean."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Thinking = Annotated[Literal["on", "off"] | None, BeforeValidator(_yaml_switch)]
"""The chat template's mode, None where the template has none."""


def enable_thinking(thinking: str | None) -> bool | None:
    """The value of the template's variable enable_thinking; None (the variable is not set) unless "on" or "off"."""
    return {"on": True, "off": False}.get(thinking or "")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError when it is missing, no YAML, or no mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})", "a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML ({error})", "a YAML mapping") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no mapping", "a YAML mapping")
    return content


def settings_names(ours: Path) -> list[str]:
    """Names of the YAML files in `ours`, a directory of this project."""
    return sorted(path.stem for path in ours.glob("*.yaml"))


def find_settings(path_or_name: str, ours: Path, beside: Path | None = None) -> Path | None:
    """The YAML file at a path, or the one of this name in `ours`; None where there is neither.

    beside: the directory that a relative path counts from; None: the working directory.
    """
    path = Path(os.path.expanduser(path_or_name)) if beside is None else beside / path_or_name
    if os.path.isfile(path):
        return path
    return ours / f"{path_or_name}.yaml" if path_or_name in settings_names(ours) else None


def read_settings(path_or_name: str, ours: Path, kind: str) -> list[tuple[Path, dict[str, Any]]]:
    """A YAML file, or one of `ours` by name, behind the files that it extends: (path, mapping) of each, the base first.

    `extends` names a file, relative to the one that says it, or one of `ours`; the mappings do not have it. kind: what
    the file holds, "recipe" for example. Raises ConfigError for a file that is missing, no YAML or no mapping, and for
    files that extend each other.
    """
    known = ", ".join(settings_names(ours))
    path = find_settings(path_or_name, ours)
    if path is None:
        near = suggestion(path_or_name, settings_names(ours))
        raise ConfigError(f"{kind} {path_or_name!r}{near}", f"a YAML file, or one of {known}")
    layers: list[tuple[Path, dict[str, Any]]] = []
    while True:
        path = path.resolve()
        if path in (extending := [link for link, _ in layers]):
            chain = " -> ".join(link.name for link in (*extending, path))
            raise ConfigError(f"{kind}s that extend each other: {chain}", f"a chain of {kind}s that ends")
        content = read_yaml(path)
        base = content.pop("extends", None)
        layers.append((path, content))
        if base is None:
            return layers[::-1]
        extender, path = path, find_settings(str(base), ours, path.parent)
        if path is None:
            raise ConfigError(
                f"{extender.name} extends {base}, which is no file beside it",
                f"an existing {kind}, or one of {known}",
            )


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`change` over `base`: mappings are merged, all else is replaced."""
    both = {
        key: merged(base[key], value)
        for key, value in change.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return {**base, **change, **both}


def apply_override(override: str, content: dict[str, Any]) -> str:
    """Set one "a.b=value" in `content`, and return its key "a.b". Raises ConfigError.

    The value is read as YAML, so 4, true, null and [1, 2] mean what they look like.
    """
    key, equals, text = override.partition("=")
    *parents, last = key.strip().split(".")
    if not equals or not last or not all(parents) or not text.strip():  # an unset variable of a shell leaves nothing
        raise ConfigError(f"--set {override}", "--set key=value", "for example --set a.b=1, or --set a.b=null")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML ({error})", "a YAML value", "quote it") from error
    place = content
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ConfigError(f"--set {override}: {parent} is a single value", "no key below it", f"--set {parent}=...")
    place[last] = value
    return key.strip()


def checked(
    model: type[Model],
    content: Mapping[str, Any] | bytes,
    source: str,
    expected: str,
    remedy: str = "",
    error: type[AufError] = ConfigError,
) -> Model:
    """`content` (a mapping, or JSON as bytes) as a `model`.

    Raises `error`, which says what is wrong with every key. source: where the content comes from, for the message.
    """
    try:
        return model.model_validate_json(content) if isinstance(content, bytes) else model.model_validate(content)
    except ValidationError as problem:
        raise error(f"{source}: {complaints(problem, model)}", expected, remedy) from problem


def complaints(error: ValidationError, model: type[BaseModel]) -> str:
    """What is wrong with which key, in one sentence; an unknown key comes with the key that it nearly is."""
    return "; ".join(_complaint(problem, model) for problem in error.errors())


def suggestion(key: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' for a key that is nearly one of the known, else ''."""
    near = difflib.get_close_matches(key, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _complaint(problem: Any, model: type[BaseModel]) -> str:
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        section = _section(model, problem["loc"][:-1])
        return f"unknown key {location}{suggestion(str(problem['loc'][-1]), section.model_fields)}"
    message = problem["msg"].removeprefix("Value error, ")
    got = "" if isinstance(problem["input"], (dict, BaseModel, bytes)) else f", got {_SHORT.repr(problem['input'])}"
    return f"{location}: {message}{got}" if location else f"{message}{got}"


def _section(model: type[BaseModel], location: Sequence[str | int]) -> type[BaseModel]:
    """The model of the section at `location`, also inside a list or a mapping of sections."""
    for part in location:
        if part in model.model_fields:
            model = next(_models_in(model.model_fields[str(part)].annotation), model)
    return model


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)
