"""What to serve and how: a YAML profile, checked, with `--set key=value` applied on top."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sglang_auf.errors import ConfigError

PROFILES = Path(__file__).parent / "profiles"
CHECKOUT = Path(__file__).parent.parent


class Profile(BaseModel):
    """One server.

    target, drafter: directory, hub id, or (target) a name that `sglang-auf prepare` knows. drafter_notice: printed
    loudly while the profile's own drafter is used. block_size: B; None takes the drafter's. adaptive_block: draft fewer
    slots of it where the load makes them dear (sglang_auf/speculative/adaptive_block.py; CPU only). draft_vocabulary:
    keep to the tokens that the drafter lists, if it lists any (sglang_auf/checkpoints/draft_vocabulary.py).
    thinking: the chat template's mode where it has one. management: open SGLang's routes that change weights, write
    files and pause the engine (guard.py).
    server_args: SGLang's server arguments by their Python names, checked against SGLang when the server starts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str = Field(min_length=1)
    target_revision: str | None = None
    drafter: str | None = Field(default=None, min_length=1)
    drafter_revision: str | None = None
    drafter_notice: str | None = None
    block_size: int | None = Field(default=None, ge=2)
    adaptive_block: bool = False
    draft_vocabulary: bool = True
    device: Literal["cpu", "cuda"]
    dtype: Literal["bfloat16", "float16", "float32", "auto"] = "bfloat16"
    thinking: Literal["on", "off"] | None = None
    management: bool = False
    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=30000, ge=1, le=65535)
    served_model_name: str = Field(min_length=1)
    server_args: dict[str, Any] = Field(default_factory=dict)

    @field_validator("thinking", mode="before")
    @classmethod
    def _yaml_switch(cls, value: object) -> object:
        """YAML 1.1 reads a bare `on` or `off` as a boolean."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def profile_names(directory: Path = PROFILES) -> list[str]:
    return sorted(path.stem for path in directory.glob("*.yaml"))


def default_profile() -> str:
    """The CPU profile where PyTorch sees no CUDA device."""
    import torch

    return "qwen3-8b" if torch.cuda.is_available() else "smollm2-135m"


def load_profile(
    name: str,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    directory: Path = PROFILES,
) -> Profile:
    """The profile `name` with `overrides` ("key=value", "server_args.key=value") and then `flags` (key: value) on top.

    Relative model paths in the file count from the checkout, in an override from the working directory. Raises
    ConfigError for an unknown profile, an unknown key or a value of the wrong type.
    """
    if name not in profile_names(directory):
        raise ConfigError(
            f"profile {name!r}",
            f"one of {', '.join(profile_names(directory))}",
            "give --profile one of these, or add a file to server/profiles",
        )
    path = directory / f"{name}.yaml"
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path.name} is not YAML ({error})", "a YAML mapping", "mend the file") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path.name} holds no mapping", "a YAML mapping", "mend the file")
    for key in ("target", "drafter"):
        if os.path.isdir(local := CHECKOUT / str(content.get(key))):
            content[key] = str(local)
    for override in overrides:
        _apply(override, content)
    try:
        return Profile.model_validate(content | dict(flags or {}))
    except ValidationError as error:
        raise _config_error(name, error) from error


def _apply(override: str, content: dict[str, Any]) -> None:
    """Set one "a.b=value" in place; the value is read as YAML, so 4, true, null and [1, 2] mean what they look like."""
    key, equals, text = override.partition("=")
    *parents, last = key.strip().split(".")
    if not equals or not last or not all(parents):
        raise ConfigError(f"--set {override}", "--set key=value", "for example --set port=30001")
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
    if key.strip() == "drafter":
        content.pop("drafter_notice", None)  # it speaks of the drafter that was just replaced
        content.pop("drafter_revision", None)


def _config_error(name: str, error: ValidationError) -> ConfigError:
    complaints = [
        f"{'.'.join(str(part) for part in problem['loc'])}: {_complaint(problem)}" for problem in error.errors()
    ]
    return ConfigError(
        f"profile {name}: {'; '.join(complaints)}",
        f"the keys {', '.join(Profile.model_fields)}",
        "mend the profile or the --set",
    )


def _complaint(problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        return f"unknown key{suggestion(str(problem['loc'][-1]), Profile.model_fields)}"
    return f"{problem['msg']}, got {problem['input']!r}"


def suggestion(key: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' for a key that is nearly one of the known, else ''."""
    near = difflib.get_close_matches(key, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
