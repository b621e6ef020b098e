"""The weights a drafter starts from: random, layers of the target, or an earlier drafter with no more layers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import safe_open
from torch import nn

from sglang_auf.checkpoints.target_config import language_config
from sglang_auf.checkpoints.target_facts import TargetFacts
from sglang_auf.checkpoints.unused_token import unused_token
from sglang_auf.checkpoints.weights import RECOMPUTED, default_target_layer_ids
from sglang_auf.errors import CardError, ConfigError, TargetError
from sglang_auf.files import CONFIG, find_model, read_json, weight_files
from sglang_auf.models.config import DrafterConfig
from sglang_auf.models.dflash import Drafter
from sglang_auf.models.loading import load_drafter
from sglang_auf.training.data.features import check_taps
from sglang_auf.training.recipe import AUTO, DrafterSettings, Recipe

logger = logging.getLogger(__name__)

NO_COUNTERPART = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
"""Weights of a drafter's layers that a Llama's layers lack. They start at 1."""

IN_NO_WEIGHT = {
    "block_size",
    "mask_token_id",
    "rms_norm_eps",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
}
"""Fields of a drafter's config that its weights do not depend on."""

READS = ("block_size", "mask_token_id")
"""Those of them that change what its weights get to read."""

LAST_PRODUCTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
"""A layer adds products with these weights to the residual stream. While they are 0 the layer adds nothing, and in the
first step only they have a gradient."""


def chosen(recipe: Recipe, target: Path) -> Recipe:
    """The recipe with the taps and the mask of the target in directory `target` where it says "auto". They are logged.

    Equal targets give equal values. Raises TargetError for a target that cannot be tapped or has no id for the mask.
    """
    drafter, facts = recipe.drafter, TargetFacts.of(target)
    values: dict[str, object] = {}
    if drafter.target_layer_ids == AUTO:
        last = facts.tappable_layers - 1
        spread = default_target_layer_ids(facts.num_layers, drafter.num_layers)
        # A shallow target has fewer layers than are asked for, or lacks the last of them.
        values["target_layer_ids"] = tuple(sorted({min(max(layer, 0), last) for layer in spread}))
    if drafter.mask_token_id == AUTO:
        values["mask_token_id"] = unused_token(target, facts.vocab_size)
    for name, value in values.items():
        logger.info("drafter.%s: %s, chosen for %s", name, value, facts.name)
    return recipe.with_drafter(**values)


def shape_of(settings: DrafterSettings, target: Path) -> DrafterConfig:
    """The drafter a recipe asks for, at the widths of the target in directory `target`. settings: without "auto".

    Raises ConfigError for sizes or taps that do not fit the target, TargetError for one that cannot be tapped.
    """
    facts = TargetFacts.of(target)
    check_taps(settings.taps, facts, "--set drafter.target_layer_ids=auto chooses layers of this target")
    if settings.mask >= facts.vocab_size:
        raise ConfigError(
            f"mask_token_id {settings.mask} of {facts.vocab_size} tokens",
            f"an id below {facts.vocab_size} that no text of {facts.name} uses",
            "--set drafter.mask_token_id=auto chooses one",
        )
    try:
        return DrafterConfig.for_target(
            language_config(read_json(target / CONFIG, TargetError)),
            num_layers=settings.num_layers,
            target_layer_ids=settings.taps,
            block_size=settings.block_size,
            mask_token_id=settings.mask,
            head=settings.head,
            gru_hidden_dim=settings.gru_hidden_dim,
            emb_dim=settings.emb_dim,
            plain_rope=settings.init == "random",
        )
    except ValidationError as error:
        raise ConfigError(
            f"a drafter for {target.name} with " + "; ".join(problem["msg"] for problem in error.errors()),
            "sizes in the recipe's section `drafter` that fit the target",
        ) from error


def initial_drafter(config: DrafterConfig, settings: DrafterSettings, target: Path, seed: int) -> Drafter:
    """A float32 drafter on the CPU. Equal arguments give equal weights.

    Raises ConfigError where the target's layers or the earlier drafter do not fit, CardError for a broken earlier one.
    """
    torch.manual_seed(seed)
    drafter = Drafter(config)
    if settings.init != "random":
        _copy_target_layers(drafter, target, settings.init)
    if settings.init_from is not None:
        _copy_drafter(drafter, settings)
    return drafter


def _copy_drafter(drafter: Drafter, settings: DrafterSettings) -> None:
    """Copy an earlier drafter's weights into `drafter`, and let layers that the earlier one lacks add nothing at first.

    Training then continues from what the earlier drafter proposes, without noise in its residual stream.
    """
    source = str(settings.init_from)
    earlier = load_drafter(find_model(source, ("*.json", "*.safetensors"), CardError))
    ours, theirs = drafter.config.model_dump(), earlier.config.model_dump()
    new = ours["num_hidden_layers"] - theirs["num_hidden_layers"]
    different = [
        f"{name} {theirs[name]} instead of {ours[name]}"
        for name in ours
        if ours[name] != theirs[name] and name not in IN_NO_WEIGHT and (name != "num_hidden_layers" or new < 0)
    ]
    if different:
        raise ConfigError(
            f"drafter.init_from {source} with {', '.join(different)}",
            "a drafter of the recipe's shape, or of fewer layers",
        )
    if settings.init != "random" and len(settings.init) != new:
        raise ConfigError(
            f"drafter.init {list(settings.init)} beside init_from {source}, which lacks {new} of the recipe's layers",
            "one target layer for each layer that the earlier drafter lacks, or random",
        )
    changed = [f"{name} {ours[name]} instead of {theirs[name]}" for name in READS if ours[name] != theirs[name]]
    if changed:
        logger.warning("drafter.init_from %s goes on with %s: it has to learn that", source, " and ".join(changed))
    drafter.load_state_dict({**drafter.state_dict(), **earlier.state_dict()})
    for layer in drafter.layers[len(earlier.layers) :]:
        for name in LAST_PRODUCTS:
            nn.init.zeros_(layer.get_parameter(name))


def _copy_target_layers(drafter: Drafter, target: Path, layers: Sequence[int]) -> None:
    """Copy target layers into the drafter's last layers, and the target's final norm, which its head expects."""
    ends = list(drafter.layers)[len(drafter.layers) - len(layers) :]
    places = {f"model.layers.{layer}.": end for layer, end in zip(layers, ends, strict=True)}
    if len(places) < len(layers):
        raise ConfigError(f"drafter.init {list(layers)}", "each target layer once")
    tensors = _tensors(target, (*places, "model.norm."))
    for prefix, module in {**places, "model.norm.": drafter.norm}.items():
        own = module.state_dict()
        found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        faults = [f"no {prefix}{name}" for name in own if name not in found and name not in NO_COUNTERPART]
        faults += [f"{prefix}{name}, which a drafter lacks" for name in found if name not in own]
        faults += [
            f"{prefix}{name} of shape {list(tensor.shape)} instead of {list(own[name].shape)}"
            for name, tensor in found.items()
            if name in own and tensor.shape != own[name].shape
        ]
        if faults:
            raise ConfigError(
                f"drafter.init from {target.name}, which has {'; '.join(faults[:3])}",
                "target layers that exist and have the weights of a drafter's layers, or random",
            )
        module.load_state_dict({**own, **found})


def _tensors(target: Path, prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The target's weights whose names begin with one of `prefixes`. No others are read."""
    found = {}
    for file in weight_files(target, TargetError):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                if name.startswith(prefixes) and not name.endswith(RECOMPUTED):
                    found[name] = opened.get_tensor(name).float()
    return found
