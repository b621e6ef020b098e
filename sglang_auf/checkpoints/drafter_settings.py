"""The settings in a drafter's config.json: where SGLang reads them, and which it does not serve.

SGLang's DFLASH 0.5.23 (models/dflash.py, speculative/dflash_utils.py) passes over settings that it does not know, so a
drafter of another engine may be served otherwise than it was trained, at a low tau and without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_auf.errors import CardError

ARCHITECTURE = "DFlashDraftModel"
SPECFORGE_DOMINO = "DominoDraftModel"
"""SpecForge's own name of the class of its Domino drafters. SGLang has no class of this name."""
HEADS = ("dflash", "domino")

# Parts of later drafters. SGLang adds weights for them, or ignores them where the key alone exists.
LATER_PARTS = (
    "conv_kernel_size",
    "selector_rank",
    "attention_sink_bias",
    "lilicorr_enabled",
    "quantization_config",
    "compression_config",
)
# Other engines compute a drafter otherwise where these are on. SGLang's DFLASH reads none of them.
UNREAD = ("causal", "sample_from_anchor")
UNREAD_WINDOWS = ("use_swa", "swa_window_size")  # it reads layer_types and sliding_window
UNREAD_IN_DFLASH_CONFIG = ("is_causal", "use_gemma_norm")  # it reads these at the top level
# What else is harmless in dflash_config: read there, or said elsewhere too, or checked here.
KNOWN_IN_DFLASH_CONFIG = frozenset(
    {
        *LATER_PARTS,
        *UNREAD,
        *UNREAD_IN_DFLASH_CONFIG,
        *UNREAD_WINDOWS,
        "attention_value_scale",
        "block_size",
        "emb_dim",
        "final_logit_softcapping",
        "gru_hidden_dim",
        "input_embedding_scale",
        "mask_token",
        "mask_token_id",
        "num_target_layers",
        "output_multiplier",
        "projector_type",
        "pure_draft_prefix_len",
        "shift_label",
        "target_layer_ids",
    }
)
# SpecForge's names of the attention that SGLang has; mla is another one.
ATTENTION_MODES = ("gqa", "mha")


def draft_setting(config: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """A drafter setting, looked up as SGLang does: dflash_config.<key> if that key exists, else the top level.

    A null counts as not set, and a nested null hides the top level (speculative/dflash_utils.py).
    """
    nested = config.get("dflash_config") or {}
    if not isinstance(nested, Mapping):
        raise CardError(f"dflash_config {nested!r} in config.json", "an object", "export the drafter again")
    value = nested.get(key) if key in nested else config.get(key)
    return default if value is None else value


def head_of(config: Mapping[str, Any]) -> str:
    """The proposal head, "dflash" (the target's own head, nothing added) where the config names no projector."""
    return str(draft_setting(config, "projector_type", "dflash"))


def written_by_speculators(config: Mapping[str, Any]) -> bool:
    return "speculators_model_type" in config or "speculators_config" in config


def refuse_unconverted(config: Mapping[str, Any], drafter: str = "DRAFTER", target: str = "TARGET") -> None:
    """Raises CardError for a config.json in the form of another trainer, which says how the drafter is made servable.

    drafter, target: as the user gave them, for the command in the message.
    """
    speculators = written_by_speculators(config)
    if not speculators and config.get("architectures") != [SPECFORGE_DOMINO]:
        return
    kind = config.get("speculators_model_type")
    raise CardError(
        f"{drafter}, " + (f"a {kind} drafter of speculators" if speculators else "a Domino drafter of SpecForge"),
        f"a DFlash or Domino drafter with a config.json that SGLang reads ({ARCHITECTURE})",
        "serve it with the engine it was trained for"
        if speculators and kind != "dflash"
        else f"`sglang-auf convert {drafter} OUT --target {target}`, and give OUT in its place",
    )


def check_kind(config: Mapping[str, Any]) -> None:
    """Raises CardError unless it is an unquantised DFlash or Domino drafter, whose weight names are known here."""
    refuse_unconverted(config)
    served = "a DFlash or Domino drafter without quantisation"
    architectures = config.get("architectures")
    if architectures != [ARCHITECTURE]:
        raise CardError(
            f"architectures {architectures!r} in config.json",
            f'["{ARCHITECTURE}"], the class SGLang serves DFlash and Domino drafters with',
            "AUF serves DFlash and Domino drafters; try this one with --speculative-algorithm DFLASH",
        )
    if head_of(config) not in HEADS:
        raise CardError(
            f"projector_type {head_of(config)!r} in config.json",
            f"{served} (projector_type absent or one of {', '.join(HEADS)})",
            "try this drafter with --speculative-algorithm DFLASH",
        )
    if later := [key for key in LATER_PARTS if draft_setting(config, key)]:
        raise CardError(
            f"{', '.join(later)} in config.json",
            served,
            "try this drafter with --speculative-algorithm DFLASH",
        )
    if ignored := ignored_settings(config, head_of(config)):
        raise CardError(
            f"{', '.join(ignored)} in config.json",
            "a drafter that SGLang computes as it was trained; its DFLASH does not read this",
            "serve it with the engine it was trained for",
        )


def ignored_settings(config: Mapping[str, Any], head: str) -> list[str]:
    """Settings that change what a drafter computes, and that SGLang's DFLASH does not read where they are.

    head: "dflash" or "domino".
    """
    nested = config.get("dflash_config") or {}
    given = config.get("layer_types")
    kinds = given if isinstance(given, list) else []
    found = [key for key in UNREAD if draft_setting(config, key)]
    if kinds and all(kind == "sliding_attention" for kind in kinds) and "causal" in found:
        found.remove("causal")  # as SGLang computes sliding layers in any case
    found += [f"dflash_config.{key}" for key in UNREAD_IN_DFLASH_CONFIG if nested.get(key) and not config.get(key)]
    if head != "domino" and draft_setting(config, "shift_label"):
        found.append("shift_label without a domino head")
    if "sliding_attention" not in kinds and draft_setting(config, "use_swa") is not False:
        found += [f"{key} without sliding layer_types" for key in UNREAD_WINDOWS if draft_setting(config, key)]
    if "attention_value_scale" not in nested and config.get("attention_value_scale") not in (None, 1):
        found.append("attention_value_scale outside of dflash_config")
    return found


def unknown_settings(config: Mapping[str, Any]) -> list[str]:
    """Keys of dflash_config that are on, and whose meaning neither SGLang nor this check knows."""
    nested = config.get("dflash_config") or {}
    plain = nested.get("attention_mode") in ATTENTION_MODES
    return [
        key
        for key, value in nested.items()
        if value and key not in KNOWN_IN_DFLASH_CONFIG and not (key == "attention_mode" and plain)
    ]
