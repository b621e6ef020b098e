"""Drafters of other trainers: which of their config.json SGLang serves, and the refusal of all others.

Where a config.json leaves something out, SGLang uses other sources and other defaults than the trainers do. So a
conversion writes a new config.json that leaves nothing out, and copies no setting that it does not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from sglang_auf.checkpoints.drafter_settings import (
    LATER_PARTS,
    UNREAD,
    UNREAD_WINDOWS,
    draft_setting,
    ignored_settings,
)
from sglang_auf.checkpoints.weights import tapped_layers
from sglang_auf.errors import CardError
from sglang_auf.models.config import ROPE_TYPES, DrafterConfig

EXACT = "a DFlash or Domino drafter that SGLang serves exactly as it was trained"

# Features that a plain DFlash drafter lacks. They are off when absent, null, false or zero; a factor also when one.
FEATURES = (
    *LATER_PARTS,
    *UNREAD,
    *UNREAD_WINDOWS,
    "attention_value_scale",
    "final_logit_softcapping",
    "input_embedding_scale",
    "is_causal",
    "output_multiplier",
    "use_gemma_norm",
)
FACTORS = ("attention_value_scale", "input_embedding_scale", "output_multiplier")

SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
)


@dataclass(frozen=True, slots=True)
class Reading:
    """A config.json of another trainer. kind: which trainer wrote it. config: the same as SGLang's config.json.

    target_name: the target's name in the source, None where it has none. changes: sentences on what was changed.
    drafted: how many tokens it drafts of the target's, None for all.
    """

    kind: str
    config: dict[str, Any]
    target_name: str | None
    changes: tuple[str, ...]
    drafted: int | None = None


def refusal(found: str, reason: str, remedy: str = "serve it with the engine it was trained for") -> CardError:
    """The error for a checkpoint that cannot be converted. reason: why SGLang would not serve it as trained."""
    return CardError(found, f"{EXACT} ({reason})", remedy)


def section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under `key`, empty where there is none."""
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise refusal(f"{key} {value!r} in config.json", "it should be an object", "")
    return value


def served_config(layer: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """SGLang's config.json for drafter layers described as transformers describes a Qwen3.

    layer: config of the layers, with features in dflash_config or beside it. settings: the other fields of
    DrafterConfig. Raises CardError for what SGLang would compute in another way than the trainers.
    """
    nested = section(layer, "dflash_config")
    kinds = layer.get("layer_types") or []
    features = [key for key in FEATURES if is_on(key, nested.get(key, layer.get(key)))]
    if draft_setting(layer, "use_swa") is False:
        features = [key for key in features if key not in UNREAD_WINDOWS]
    if features := features or ignored_settings(layer, settings.get("head", "dflash")):
        raise refusal(f"{', '.join(features)} in config.json", "a plain DFlash drafter has none of these")
    if set(kinds) - {"full_attention"} or (not kinds and layer.get("use_sliding_window")):
        raise refusal(
            f"layer_types {list(kinds) or 'with use_sliding_window'}",
            "speculators' sliding windows are not SGLang's, and SpecForge's have not been tried with this project",
        )
    if layer.get("hidden_act", "silu") != "silu":
        raise refusal(f"hidden_act {layer['hidden_act']!r}", "SGLang's DFlash layers compute silu")
    tapped_layers({"target_layer_ids": settings["target_layer_ids"]})
    theta, scaling = _rotary(layer)
    try:
        drafter = DrafterConfig(
            **{key: layer[key] for key in SHAPE if key in layer}, rope_theta=theta, rope_scaling=scaling, **settings
        )
    except ValidationError as problem:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in problem.errors())
        raise refusal(f"config.json with {reasons}", "no drafter has such sizes", "") from problem
    return {**drafter.to_checkpoint(), "attention_bias": bool(layer.get("attention_bias"))}


def is_on(key: str, value: Any) -> bool:
    """Whether the setting of a feature changes what the drafter computes."""
    return bool(value) and not (key in FACTORS and value == 1)


def config_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on what differs between the config.json `before` and `after`."""
    old, new = dict(_flat(before)), dict(_flat(after))
    for key, value in new.items():
        if key in old and old[key] != value:
            yield f"config.json: {key} {old[key]!r} -> {value!r}"
        elif key not in old and value is not None:
            yield f"config.json: {key} {value!r} added"
    if dropped := [key for key in old if key not in new]:
        yield f"config.json: left out, as SGLang's DFlash does not need them: {', '.join(dropped)}"


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) pairs. Keys of the first nested level are joined with a dot; deeper levels stay nested."""
    for key, value in config.items():
        if isinstance(value, Mapping) and not prefix:
            yield from _flat(value, f"{key}.")
        else:
            yield f"{prefix}{key}", value


def _rotary(layer: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(rope_theta, rope_scaling) from transformers 5's rope_parameters, the older fields, or both where they agree."""
    new, old = section(layer, "rope_parameters"), section(layer, "rope_scaling")
    kinds = {block.get("rope_type", block.get("type", "default")) for block in (new, old) if block}
    thetas = {block["rope_theta"] for block in (new, layer) if block.get("rope_theta") is not None}
    if len(thetas) != 1 or len(kinds) > 1 or "full_attention" in new or "sliding_attention" in new:
        raise refusal(
            f"rope_parameters {new or None}, rope_theta {layer.get('rope_theta')} and rope_scaling {old or None}",
            "they do not describe one rotary embedding",
            "",
        )
    if partial := {block.get("partial_rotary_factor") for block in (new, old, layer)} - {None, 1}:
        raise refusal(
            f"partial_rotary_factor {partial.pop()}",
            "SGLang rotates part of each head, transformers' Qwen3 all of it",
        )
    kind = kinds.pop() if kinds else "default"
    if kind not in ROPE_TYPES:
        raise refusal(
            f"rotary scaling of type {kind!r}",
            f"only {', '.join(ROPE_TYPES)} are computed in the same way by SGLang and the trainers",
        )
    if kind == "default":
        return thetas.pop(), None
    scaling = {key: value for key, value in (old or new).items() if key not in ("rope_theta", "type")}
    return thetas.pop(), {**scaling, "rope_type": kind}
