"""What to serve and how: a YAML profile, checked, with `--set key=value` applied on top.

`extends: qwen3-8b` takes another profile, one of ours or a file beside this one, and changes the keys below it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from sglang_auf.recording.settings import RecordSettings
from sglang_auf.settings import Settings, Thinking, apply_override, checked, merged, read_settings

PROFILES = Path(__file__).parent / "profiles"
CHECKOUT = Path(__file__).parent.parent

ABOUT = {
    "target": ("target_revision", "served_model_name"),
    "drafter": ("drafter_revision", "drafter_notice"),
}
"""What a profile says about a model; of a model that is given in its place, it says nothing."""


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
    served_model_name: the model's name for clients; None takes the target's.
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
    served_model_name: str | None = Field(default=None, min_length=1)
    server_args: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _trees_are_a_cpus(self) -> Self:
        if self.tree_nodes is not None and self.device != "cpu":
            raise ValueError(f"tree_nodes on {self.device}, where a chain of the whole block is verified")
        return self


def default_profile() -> str:
    """The CPU profile where PyTorch sees no CUDA device."""
    import torch

    return "qwen3-8b" if torch.cuda.is_available() else "smollm2-135m"


def load_profile(
    path_or_name: str,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    directory: Path = PROFILES,
) -> Profile:
    """A profile file, or one of `directory` by name, with "key=value" overrides and then `flags` (key: value) on top.

    Relative model paths count from the checkout in our own profiles, and from the working directory in other files and
    in overrides. Raises ConfigError for a file that cannot be read, an unknown key or a value of the wrong type.
    """
    content: dict[str, Any] = {}
    for path, layer in read_settings(path_or_name, directory, "profile"):
        if path.parent == directory.resolve():
            _count_from_checkout(layer)
        content = merged(_without_stale(content, layer), layer)
    said: dict[str, Any] = {}
    for override in overrides:
        apply_override(override, said)
    content = _without_stale(content, said)
    for override in overrides:
        apply_override(override, content)
    return checked(
        Profile,
        content | dict(flags or {}),
        f"profile {path_or_name}",
        f"the keys {', '.join(Profile.model_fields)}",
        "change the profile or the --set",
    )


def _count_from_checkout(content: dict[str, Any]) -> None:
    for key in ABOUT.keys() & content.keys():
        if os.path.isdir(local := CHECKOUT / str(content[key])):
            content[key] = str(local)


def _without_stale(content: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`content` without what it says about models that `change` replaces."""
    replaced = [model for model in ABOUT if model in change and change[model] != content.get(model)]
    stale = {key for model in replaced for key in ABOUT[model]}
    return {key: value for key, value in content.items() if key not in stale}
