"""config.json of SpecForge 0.2.0 drafters, DFlash and Domino, read as its training code reads it.

z-lab's DFlash checkpoints have the same form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_auf.checkpoints.drafter_settings import ARCHITECTURE, SPECFORGE_DOMINO, unknown_settings
from sglang_auf.checkpoints.weights import config_size, default_target_layer_ids
from sglang_auf.training.convert.common import Reading, config_changes, refusal, section, served_config


def read(config: Mapping[str, Any], target_layers: int | None) -> Reading:
    """Read SpecForge's config.json. Raises CardError for what SGLang does not serve.

    target_layers: depth of the target, used if config.json lacks it. SpecForge reads block_size at the top level and
    its other settings in dflash_config only.
    """
    architectures = config.get("architectures")
    if architectures not in ([ARCHITECTURE], [SPECFORGE_DOMINO]):
        raise refusal(f"architectures {architectures!r}", "SGLang's DFlash serves only DFlash and Domino drafters")
    nested = section(config, "dflash_config")
    projector = nested.get("projector_type")
    unknown = unknown_settings(config)
    if unknown or projector not in (None, "dflash", "domino"):
        raise refusal(
            f"{', '.join(unknown) or f'projector_type {projector!r}'} in dflash_config",
            "what that adds to a DFlash drafter is not known here",
        )
    if nested.get("mask_token_id") is None:
        raise refusal(
            "no dflash_config.mask_token_id",
            "SpecForge then takes one from the tokenizer when it trains, and does not write it down",
            "set dflash_config.mask_token_id to the one in the training run's log",
        )
    if config.get("draft_vocab_size") not in (None, config.get("vocab_size")):
        raise refusal(
            f"a reduced draft vocabulary, {config['draft_vocab_size']} of {config.get('vocab_size')} tokens",
            "which tokens these are is known for drafters of speculators alone",
            "train it again with the full vocabulary",
        )
    domino = architectures == [SPECFORGE_DOMINO] or projector == "domino"
    depth = target_layers if config.get("num_target_layers") is None else config_size(config, "num_target_layers")
    if depth is None:
        raise refusal("no num_target_layers", "SGLang needs the target's depth", "name the target with --target")
    written = served_config(
        config,
        num_target_layers=depth,
        target_layer_ids=nested.get("target_layer_ids")
        or default_target_layer_ids(depth, config_size(config, "num_hidden_layers")),
        block_size=_block_size(config, nested),
        mask_token_id=nested["mask_token_id"],
        **_domino_sizes(config, nested) if domino else {},
    )
    if domino:
        written["dflash_config"]["shift_label"] = bool(nested.get("shift_label", False))
    return Reading("SpecForge", written, None, tuple(config_changes(config, written)))


def _block_size(config: Mapping[str, Any], nested: Mapping[str, Any]) -> Any:
    """SpecForge trains with the value at the top level; SGLang serves with the nested one."""
    sizes = {config.get("block_size"), nested.get("block_size")} - {None}
    if len(sizes) > 1:
        raise refusal(
            f"block_size {config['block_size']}, and {nested['block_size']} in dflash_config",
            "it was trained with one of them",
            "remove the other one",
        )
    return sizes.pop() if sizes else None


def _domino_sizes(config: Mapping[str, Any], nested: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of Domino's head. SGLang has no defaults for what SpecForge leaves out (prefix 0, labels not shifted)."""
    if missing := [key for key in ("emb_dim", "gru_hidden_dim") if nested.get(key) is None]:
        sections = [key for key in config if isinstance(config[key], Mapping) and key.endswith("_config")]
        raise refusal(
            f"a Domino drafter without {' and '.join(missing)} in dflash_config (config.json has "
            f"{', '.join(sections) or 'no such object'})",
            "SpecForge 0.2.0 reads Domino's settings only there, so another version trained it",
            "move them there as that version reads them, shift_label and pure_draft_prefix_len included",
        )
    prefix = nested.get("pure_draft_prefix_len", 0)
    if prefix != 1:
        said = "" if "pure_draft_prefix_len" in nested else " (SpecForge's default, as dflash_config has none)"
        raise refusal(
            f"a Domino drafter with pure_draft_prefix_len {prefix}{said}",
            "SGLang serves only 1, which is one draft without correction",
            "train it again with pure_draft_prefix_len 1",
        )
    return {"head": "domino", "emb_dim": nested["emb_dim"], "gru_hidden_dim": nested["gru_hidden_dim"]}
