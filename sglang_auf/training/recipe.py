"""A training recipe: every setting that decides which weights come out, as checked YAML.

`extends: other.yaml` takes another recipe and changes the keys below it. `--set a.b=value` changes a recipe once more:
the arms of the paper are `--set objective.name=decay`, `auf+decay`, `f-auf+d` and so on, on one recipe for each head.
`--set "objective.earlier=[{name: decay, until: 0.25}]"` trains a quarter of the steps with another objective first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from sglang_auf.settings import Settings, Thinking, apply_override, checked, merged, read_settings
from sglang_auf.training.losses.objectives import DOMINO_OBJECTIVES, OBJECTIVES, ObjectiveSettings

RECIPES = Path(__file__).parent / "recipes"

Auto = Literal["auto"]
AUTO: Auto = "auto"
"""What a target decides when the run begins (initial_weights.py, `chosen`)."""


class DataSettings(Settings):
    """The conversations to learn from.

    sources: files, folders or hub data sets, read in this order. split: of folders and data sets that name none.
    max_length: most tokens of a conversation; `overlong` says whether longer ones are rejected or truncated. held_out:
    conversations kept for evaluation, the same ones for every seed and objective. thinking: the chat template's mode,
    None where it has none. min_answer_tokens: conversations with fewer are rejected (None: the block size).
    """

    sources: tuple[str, ...] = ()
    split: str = "train"
    max_length: int = Field(ge=2)
    overlong: Literal["reject", "truncate"] = "reject"
    held_out: int = Field(default=64, ge=1)
    thinking: Thinking = None
    min_answer_tokens: int | None = Field(default=None, ge=1)


class DrafterSettings(Settings):
    """The drafter to train; its widths are the target's.

    target_layer_ids: 0-based layers whose outputs are tapped, "auto" for as many as the drafter has layers, spread over
    the target's depth. mask_token_id: stands in the slots to fill; "auto" for one that no text uses. init: "random", or
    one target layer for each drafter layer, whose weights the drafter layer starts from. init_from: a drafter
    checkpoint of this shape to start from, or one of fewer layers. `init` is then for the layers it lacks, which add
    nothing at first (o_proj and down_proj are 0).
    """

    num_layers: int = Field(ge=1)
    target_layer_ids: Auto | Annotated[tuple[int, ...], Field(min_length=1)]
    block_size: int = Field(ge=2)
    mask_token_id: Auto | Annotated[int, Field(ge=0)]
    head: Literal["dflash", "domino"] = "dflash"
    gru_hidden_dim: int | None = Field(default=None, ge=1)
    emb_dim: int | None = Field(default=None, ge=1)
    init: Literal["random"] | tuple[int, ...] = "random"
    init_from: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        taps = self.target_layer_ids
        if taps != AUTO and (list(taps) != sorted(set(taps)) or taps[0] < 0):
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
                    f"init names {named} target layers for num_layers {of} beside init_from: it must name one for each "
                    "layer that the earlier drafter lacks, or be random"
                )
        return self

    @property
    def taps(self) -> tuple[int, ...]:
        """target_layer_ids, once they are chosen."""
        assert self.target_layer_ids != AUTO, "initial_weights.chosen comes first"
        return self.target_layer_ids

    @property
    def mask(self) -> int:
        """mask_token_id, once it is chosen."""
        assert self.mask_token_id != AUTO, "initial_weights.chosen comes first"
        return self.mask_token_id


class OptimiserSettings(Settings):
    """adamw trains all weights; muon trains the matrices of the layers and fc, and AdamW the rest.

    lr, muon_lr: peak learning rates of AdamW and Muon (the RMS of Muon's step is matched to AdamW's, so they are
    comparable). weight_decay: of both. clip: largest norm of the gradient.
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


class ScheduleSettings(Settings):
    """Linear warm-up over warmup_ratio of all steps, then a cosine to 0. Exactly one of epochs and max_steps is set."""

    epochs: int | None = Field(default=None, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    warmup_ratio: float = Field(default=0.04, ge=0, lt=1)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("give one of epochs and max_steps (the other as null)")
        return self


class BatchSettings(Settings):
    """One optimiser step.

    batch_tokens, batch_rows: most padded tokens and most conversations of a micro-batch. micro_batches: micro-batches
    of a step over all ranks together, so that a recipe means the same step on any number of ranks (which must divide
    it). anchors_per_row: most blocks of a conversation. recompute: keep only the input of each drafter layer, and
    compute its other activations again in the backward pass: far less memory, about a third more work in the drafter.
    """

    batch_tokens: int = Field(ge=2)
    batch_rows: int | None = Field(default=None, ge=1)
    micro_batches: int = Field(default=1, ge=1)
    anchors_per_row: int = Field(ge=1)
    recompute: bool = False


class Recipe(Settings):
    """One training run.

    target: directory, hub id or prepared name. features: "online", or a cache directory. evaluate_every, log_every,
    save_every: optimiser steps; evaluate_every None: the last step alone is evaluated. save_minutes: a checkpoint is
    saved too where the last one is so old. keep_last: checkpoints kept beside the best one.
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
    evaluate_every: int | None = Field(default=200, ge=1)
    save_every: int = Field(default=200, ge=1)
    save_minutes: float = Field(default=30, gt=0)
    keep_last: int = Field(default=2, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        known = DOMINO_OBJECTIVES if self.drafter.head == "domino" else OBJECTIVES
        for name in self.objective.names:
            if name not in known:
                raise ValueError(f"objective {name} is none of head {self.drafter.head}: {', '.join(known)}")
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

    def with_drafter(self, **values: Any) -> Self:
        """The same recipe with other values in its section `drafter`."""
        return self.model_copy(update={"drafter": self.drafter.model_copy(update=values)})

    @property
    def min_answer_tokens(self) -> int:
        return self.data.min_answer_tokens or self.drafter.block_size


FREE_TO_DIFFER = frozenset(
    {"log_every", "evaluate_every", "save_every", "save_minutes", "keep_last", "data.sources", "batch.recompute"}
)
"""Settings that may change between two starts of one run, as no weight depends on them. The data itself is compared by
its hash."""


def load_recipe(path_or_name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe file, or one of ours by name, with "a.b=value" overrides on top. Raises ConfigError."""
    content: dict[str, Any] = reduce(merged, (layer for _, layer in read_settings(path_or_name, RECIPES, "recipe")))
    for override in overrides:
        apply_override(override, content)
    return parse_recipe(content, path_or_name)


def parse_recipe(content: Mapping[str, Any], source: str) -> Recipe:
    """Check the keys and values of a recipe. source: where they come from, for the message. Raises ConfigError."""
    return checked(
        Recipe,
        content,
        f"recipe {source}",
        "the keys and values of sglang_auf/training/recipe.py",
        "change the recipe or the --set",
    )


def differences(ours: Recipe, theirs: Recipe) -> list[str]:
    """["optimiser.lr: 0.0006 here, 0.001 there", ...] of the settings that decide the weights."""
    return list(_differences(ours.model_dump(mode="json"), theirs.model_dump(mode="json"), ()))


def _differences(ours: Any, theirs: Any, path: tuple[str, ...]) -> Iterator[str]:
    name = ".".join(path)
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in ours:
            yield from _differences(ours[key], theirs[key], (*path, key))
    elif ours != theirs and name not in FREE_TO_DIFFER:
        yield f"{name}: {ours!r} here, {theirs!r} there"
