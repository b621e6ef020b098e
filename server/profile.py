"""What to serve and how: a YAML profile, checked, with `--set key=value` applied on top."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from sglang_auf.errors import ConfigError
from sglang_auf.recording.settings import RecordSettings
from sglang_auf.settings import Settings, Thinking, apply_override, checked, read_yaml

PROFILES = Path(__file__).parent / "profiles"
CHECKOUT = Path(__file__).parent.parent


class Profile(Settings):
    """One server.

    target: directory, hub id, or a name that `sglang-auf prepare` knows.
    drafter: directory or hub id; None only for a server that is always plain.
    drafter_notice: warning that is logged as long as the profile's own drafter is used.
    block_size: B; None takes the drafter's.
    tree: verify a tree of drafts, as large as the load makes worthwhile (speculative/tree.py); else a chain of the
        whole block. A GPU verifies a chain either way.
    tree_nodes: nodes of each request's tree at any load; None lets the load decide. Without trees it says nothing.
    draft_vocabulary: draft only tokens that the drafter lists, if it has a list (checkpoints/draft_vocabulary.py).
    thinking: the chat template's mode; None where the template has none.
    record: keep answers for training (recording/settings.py); by default none are kept.
    management: open the routes that change weights, write files and pause the engine (middleware.Guard).
    served_model_name: the model's name for clients.
    server_args: SGLang's server arguments by their Python names; checked against SGLang when the server starts.
    """

    target: str = Field(min_length=1)
    target_revision: str | None = None
    drafter: str | None = Field(default=None, min_length=1)
    drafter_revision: str | None = None
    drafter_notice: str | None = None
    block_size: int | None = Field(default=None, ge=2)
    tree: bool = True
    tree_nodes: int | None = Field(default=None, ge=1)
    draft_vocabulary: bool = True
    device: Literal["cpu", "cuda"]
    dtype: Literal["bfloat16", "float16", "float32", "auto"] = "bfloat16"
    thinking: Thinking = None
    record: RecordSettings = RecordSettings()
    management: bool = False
    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=30000, ge=1, le=65535)
    served_model_name: str = Field(min_length=1)
    server_args: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _trees_are_a_cpus(self) -> Self:
        if self.tree_nodes is not None and self.device != "cpu":
            raise ValueError(f"tree_nodes on {self.device}, where a chain of the whole block is verified")
        return self


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

    Relative model paths count from the checkout in the file, and from the working directory in an override. Raises
    ConfigError for an unknown profile, an unknown key or a value of the wrong type.
    """
    if name not in profile_names(directory):
        raise ConfigError(
            f"profile {name!r}",
            f"one of {', '.join(profile_names(directory))}",
            "give --profile one of these, or add a file to server/profiles",
        )
    content = read_yaml(directory / f"{name}.yaml")
    for key in ("target", "drafter"):
        if os.path.isdir(local := CHECKOUT / str(content.get(key))):
            content[key] = str(local)
    said: dict[str, Any] = {}
    if any(apply_override(override, said) == "drafter" for override in overrides):
        for about_the_files_own in ("drafter_notice", "drafter_revision"):
            content.pop(about_the_files_own, None)
    for override in overrides:
        apply_override(override, content)
    return checked(
        Profile,
        content | dict(flags or {}),
        f"profile {name}",
        f"the keys {', '.join(Profile.model_fields)}",
        "change the profile or the --set",
    )
