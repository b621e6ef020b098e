"""A training recipe: everything that decides which weights come out, as checked YAML.

`extends: other.yaml` takes another recipe and changes what is written below it; `--set a.b=value` changes it once more.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sglang_auf.errors import ConfigError
from sglang_auf.training.losses.objectives import DOMINO_OBJECTIVES, OBJECTIVES, ObjectiveSettings

RECIPES = Path(__file__).parent / "recipes"


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSettings(_Settings):
    """What is learnt from.

    sources: files or hub data sets (their `split`), read in this order. max_length: tokens of a conversation; longer
    ones are rejected or truncated, as `overlong` says. held_out: conversations kept for evaluation, the same ones for
    every seed and objective. thinking: the chat template's mode, None where it has none. min_answer_tokens:
    conversations with fewer are rejected (None: the block size).
    """

    sources: tuple[str, ...] = ()
    split: str = "train"
    max_length: int = Field(ge=2)
    overlong: Literal["reject", "truncate"] = "reject"
    held_out: int = Field(default=64, ge=1)
    thinking: Literal["on", "off"] | None = None
    min_answer_tokens: int | None = Field(default=None, ge=1)

    @field_validator("thinking", mode="before")
    @classmethod
    def _yaml_switch(cls, value: object) -> object:
        """YAML 1.1 reads a bare `on` or `off` as a boolean."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class DrafterSettings(_Settings):
    """The drafter to train; its widths are the target's.

    target_layer_ids: 0-based layers whose outputs are tapped. init: "random", or one target layer for each drafter
    layer, whose weights it starts from. init_from: a drafter checkpoint of this shape to start from, or one of fewer
    layers; then `init` is for the layers it lacks, which add nothing at first: o_proj and down_proj are 0.
    """

    num_layers: int = Field(ge=1)
    target_layer_ids: tuple[int, ...] = Field(min_length=1)
    block_size: int = Field(ge=2)
    mask_token_id: int = Field(ge=0)
    head: Literal["dflash", "domino"] = "dflash"
    gru_hidden_dim: int | None = Field(default=None, ge=1)
    emb_dim: int | None = Field(default=None, ge=1)
    init: Literal["random"] | tuple[int, ...] = "random"
    init_from: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if list(self.target_layer_ids) != sorted(set(self.target_layer_ids)) or self.target_layer_ids[0] < 0:
            raise ValueError("target_layer_ids must be layer numbers from 0 on, each larger than the one before")
        sizes = (self.gru_hidden_dim, self.emb_dim)
        if self.head == "domino" and None in sizes:
            raise ValueError("head domino needs gru_hidden_dim and emb_dim")
        if self.head == "dflash" and sizes != (None, None):
            raise ValueError("gru_hidden_dim and emb_dim belong to head domino")
        if self.init != "random":
            named, of = len(self.init), self.num_layers
            if self.init_from is None and named != of:
                raise ValueError(f"init names {named} target layers for num_layers {of}")
            if self.init_from is not None and not 0 < named < of:
                raise ValueError(
                    f"init names {named} target layers for num_layers {of} beside init_from, where it is for the "
                    "layers that the earlier drafter lacks, and random where it lacks none"
                )
        return self


class OptimiserSettings(_Settings):
    """adamw for all weights, or muon for the matrices of the layers and fc with adamw for the rest.

    lr: peak learning rate of AdamW, muon_lr: of Muon (the step's RMS is matched to AdamW's, so they are comparable).
    weight_decay holds for both. clip: largest norm of the gradient.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(gt=0, lt=1)
    muon_lr: float | None = Field(default=None, gt=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = Field(default=0.95, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0, lt=1)
    clip: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must lie in [0, 1)")
        if (self.name == "muon") != (self.muon_lr is not None):
            raise ValueError("muon_lr belongs to name muon, which needs it")
        return self


class ScheduleSettings(_Settings):
    """Linear warm-up over warmup_ratio of all steps, then cosine to 0. Length: `epochs` or `max_steps`, one of them."""

    epochs: int | None = Field(default=None, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    warmup_ratio: float = Field(default=0.04, ge=0, lt=1)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("give one of epochs and max_steps (the other as null)")
        return self


class BatchSettings(_Settings):
    """One optimiser step.

    batch_tokens, batch_rows: padded tokens and conversations of a micro-batch, at most. micro_batches: in one step,
    over all ranks together, so that a recipe means the same step on any number of ranks (which must divide it).
    anchors_per_row: blocks of one conversation.
    """

    batch_tokens: int = Field(ge=2)
    batch_rows: int | None = Field(default=None, ge=1)
    micro_batches: int = Field(default=1, ge=1)
    anchors_per_row: int = Field(ge=1)


class Recipe(_Settings):
    """One training run. target: directory, hub id or prepared name. features: "online", or a cache directory.

    evaluate_every, log_every and save_every count optimiser steps. keep_last: checkpoints kept beside the best one.
    """

    target: str = Field(min_length=1)
    target_revision: str | None = None
    data: DataSettings
    drafter: DrafterSettings
    objective: ObjectiveSettings
    optimiser: OptimiserSettings
    schedule: ScheduleSettings
    batch: BatchSettings
    features: str = Field(default="online", min_length=1)
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = Field(default=42, ge=0, lt=2**31)
    log_every: int = Field(default=10, ge=1)
    evaluate_every: int = Field(default=200, ge=1)
    save_every: int = Field(default=200, ge=1)
    keep_last: int = Field(default=2, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        known = DOMINO_OBJECTIVES if self.drafter.head == "domino" else OBJECTIVES
        if self.objective.name not in known:
            raise ValueError(
                f"objective.name {self.objective.name} is none of head {self.drafter.head}: {', '.join(known)}"
            )
        if self.batch.batch_tokens < self.data.max_length:
            raise ValueError(
                f"batch.batch_tokens {self.batch.batch_tokens} is below data.max_length {self.data.max_length}"
            )
        if self.min_answer_tokens > self.data.max_length:
            raise ValueError(f"data.max_length {self.data.max_length} is below {self.min_answer_tokens} answer tokens")
        return self

    def with_sources(self, sources: Sequence[str]) -> Self:
        """The same recipe on other data."""
        return self.model_copy(update={"data": self.data.model_copy(update={"sources": tuple(sources)})})

    @property
    def min_answer_tokens(self) -> int:
        return self.data.min_answer_tokens or self.drafter.block_size


FREE_TO_DIFFER = frozenset({"log_every", "evaluate_every", "save_every", "keep_last", "data.sources"})
"""What may change between two starts of one run: no weight depends on it. (The data's hash is compared elsewhere.)"""


def recipe_names(directory: Path = RECIPES) -> list[str]:
    return sorted(path.stem for path in directory.glob("*.yaml"))


def load_recipe(path_or_name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe file, or one of ours by name, with "a.b=value" overrides on top. Raises ConfigError."""
    content = _content(_find(path_or_name))
    for override in overrides:
        _apply(override, content)
    return parse_recipe(content, path_or_name)


def parse_recipe(content: Mapping[str, Any], source: str) -> Recipe:
    """Check the keys and values of a recipe. source: where they come from, for the message. Raises ConfigError."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise ConfigError(
            f"recipe {source}: " + "; ".join(_complaint(problem) for problem in error.errors()),
            "the keys and values of sglang_auf/training/recipe.py",
            "mend the recipe or the --set",
        ) from error


def differences(ours: Recipe, theirs: Recipe) -> list[str]:
    """["optimiser.lr: 0.0006 here, 0.001 there", ...] of the fields that decide the weights."""
    return list(_differences(ours.model_dump(mode="json"), theirs.model_dump(mode="json"), ()))


def _find(path_or_name: str) -> Path:
    for path in (Path(path_or_name).expanduser(), RECIPES / f"{path_or_name}.yaml"):
        if os.path.isfile(path):
            return path
    near = difflib.get_close_matches(path_or_name, recipe_names(), n=1)
    raise ConfigError(
        f"recipe {path_or_name!r}{f' (did you mean {near[0]}?)' if near else ''}",
        f"a YAML file, or one of {', '.join(recipe_names())}",
        "give the path of a recipe, or one of these names",
    )


def _content(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a recipe file, laid over that of the recipe it extends."""
    path = path.resolve()
    if path in above:
        chain = " -> ".join(link.name for link in (*above, path))
        raise ConfigError(
            f"recipes that extend each other: {chain}", "a recipe that ends the chain", "remove one extends"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{above[-1].name} extends {path}", "an existing recipe", "correct extends") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML ({error})", "a YAML mapping", "mend the file") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no mapping", "a YAML mapping", "mend the file")
    base = content.pop("extends", None)
    if base is None:
        return content
    return _merged(_content(path.parent / str(base), (*above, path)), content)


def _merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`change` over `base`: mappings are merged, all else is replaced."""
    both = {
        key: _merged(base[key], value)
        for key, value in change.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return {**base, **change, **both}


def _apply(override: str, content: dict[str, Any]) -> None:
    """Set one "a.b=value" in place; the value is read as YAML, so 4, true, null and [1, 2] mean what they look like."""
    key, equals, text = override.partition("=")
    *parents, last = key.strip().split(".")
    if not equals or not last or not all(parents):
        raise ConfigError(f"--set {override}", "--set key=value", "for example --set optimiser.lr=0.001")
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


def _complaint(problem: Any) -> str:
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {location}{_suggestion(problem['loc'])}"
    message = problem["msg"].removeprefix("Value error, ")
    got = "" if isinstance(problem["input"], (dict, BaseModel)) else f", got {problem['input']!r}"
    return f"{location}: {message}{got}" if location else f"{message}{got}"


def _suggestion(location: Sequence[Any]) -> str:
    """' (did you mean ...?)' for a key that is nearly one of its section's, else ''."""
    model: Any = Recipe
    for part in location[:-1]:
        model = model.model_fields[part].annotation
    near = difflib.get_close_matches(str(location[-1]), list(model.model_fields), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _differences(ours: Any, theirs: Any, path: tuple[str, ...]) -> Iterator[str]:
    name = ".".join(path)
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in ours:
            yield from _differences(ours[key], theirs[key], (*path, key))
    elif ours != theirs and name not in FREE_TO_DIFFER:
        yield f"{name}: {ours!r} here, {theirs!r} there"
