"""The work of one micro-batch in floating-point operations.

They are two for each weight and token of a product, and twice as many in a backward pass. What is no product is left
out.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sglang_auf.models.config import DrafterConfig
from sglang_auf.models.dflash import Layer
from sglang_auf.training.data.loader import ONLINE
from sglang_auf.training.losses.objectives import DOMINO_OBJECTIVES, OBJECTIVES
from sglang_auf.training.plan.memory import Sizes, target_numbers
from sglang_auf.training.recipe import Recipe

R_ACTIVE = 0.25
"""Share of a block's slots that an objective which stops at a failure is taken to reach."""


def work(recipe: Recipe, config: DrafterConfig, target: Path) -> dict[str, float]:
    """Operations of the largest micro-batch by what makes them; the head's in the mean over the run's objectives.

    Left out: Domino's first pass without gradient, which a rank makes where it has several micro-batches in a step.
    """
    sizes = Sizes.of(recipe)
    hidden, depth = config.hidden_size, config.num_hidden_layers
    queries = config.num_attention_heads * config.head_dim
    with torch.device("meta"):
        layer = sum(parameter.numel() for parameter in Layer(config).parameters())
    passes = 4 if recipe.batch.recompute else 3  # forward once or twice; backward as much as two
    seen = sizes.length / 2 + sizes.width  # keys of an average query
    context = hidden * (
        len(config.target_layer_ids) * hidden + depth * 2 * config.num_key_value_heads * config.head_dim
    )
    head_passes = sum(
        share * _head_passes(name) for name, share in zip(recipe.objective.names, recipe.objective.shares, strict=True)
    )
    found = {
        "drafter: products": 2.0 * passes * (sizes.tokens * depth * layer + sizes.context * context),
        "drafter: attention": 4.0 * passes * sizes.tokens * depth * queries * seen,
        "head": 2.0 * head_passes * sizes.tokens * config.vocab_size * hidden,
    }
    if recipe.features != ONLINE:
        return found
    layers, _ = target_numbers(target, recipe)
    taps = config.target_layer_ids[-1] + 1 if recipe.objective.labels == "text" else config.num_target_layers
    attention = 2.0 * taps * sizes.rows * sizes.length**2 * queries  # half of all pairs
    return {"target": 2.0 * layers * sizes.context + attention, **found}


def _head_passes(objective: str) -> float:
    """Products with the head for each slot: forward and gradient, and Domino's final branch forward once more."""
    if objective in OBJECTIVES:
        return 2 * _reached(objective)
    arm = DOMINO_OBJECTIVES[objective]
    return 2 * _reached(arm.base) + 3 * _reached(arm.final)


def _reached(objective: str) -> float:
    return 1.0 if OBJECTIVES[objective].failures is None else R_ACTIVE
