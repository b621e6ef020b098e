"""The recipe of an adaptation: that of the drafter, begun from it, on the rows of the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_auf.checkpoints.card import DrafterCard
from sglang_auf.checkpoints.writing import RECIPE
from sglang_auf.errors import CardError, ConfigError
from sglang_auf.files import CONFIG, read_json
from sglang_auf.models.config import DrafterConfig
from sglang_auf.settings import apply_override, read_yaml
from sglang_auf.training.recipe import Recipe, parse_recipe

OBJECTIVE = {"dflash": "auf", "domino": "b-auf"}
"""The default objective of each head."""

MAX_LENGTH = 2048
"""Tokens of a row where the drafter's card does not say."""

KEPT_BACK = 8
"""Rows that the trainer keeps from training, because it has to evaluate. They decide nothing."""


def recipe_for(
    drafter: Path, card: DrafterCard, target: str | None, sources: Sequence[Path], overrides: Sequence[str]
) -> Recipe:
    """One pass over `sources`, from the drafter in directory `drafter`.

    Data, optimiser and batches are those of its recipe where it has one. target: None for the recipe's or the card's.
    Raises ConfigError.
    """
    content = _of_drafter(drafter, card)
    config = DrafterConfig.from_checkpoint(read_json(drafter / CONFIG, CardError))
    if target is not None:
        content |= {"target": target, "target_revision": None}
    if content.get("target") is None:
        raise ConfigError(f"{drafter}, which does not say what its target is", "its target", "give --target")
    content["data"] |= {"sources": [str(source) for source in sources], "split": "train", "overlong": "truncate"}
    content["data"]["held_out"] = KEPT_BACK
    content["drafter"] = {
        "num_layers": config.num_hidden_layers,
        **config.model_dump(
            include={"target_layer_ids", "block_size", "mask_token_id", "head", "gru_hidden_dim", "emb_dim"}
        ),
        "init_from": str(drafter),
    }
    content["objective"] = {**content.get("objective", {}), "name": OBJECTIVE[config.head], "earlier": []}
    content["schedule"] = {**content.get("schedule", {}), "epochs": 1, "max_steps": None}
    content |= {"features": "online", "evaluate_every": None, "keep_last": 1}
    for override in overrides:
        apply_override(override, content)
    return parse_recipe(content, f"of {drafter}, adapted")


def _of_drafter(drafter: Path, card: DrafterCard) -> dict[str, Any]:
    """The drafter's own recipe; for a drafter without one, what its card says, and sizes that fit most machines."""
    if (drafter / RECIPE).is_file():
        return read_yaml(drafter / RECIPE)
    length = min(card.max_length or MAX_LENGTH, MAX_LENGTH)
    return {
        "target": card.target_name,
        "data": {"max_length": length, "thinking": card.thinking},
        "optimiser": {"lr": 1e-4},
        "batch": {"batch_tokens": length, "anchors_per_row": 64},
    }
