"""config.json of SpecForge 0.2.0 drafters, DFlash and Domino, read as its training code reads it.

z-lab's DFlash checkpoints have the same form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_auf.checkpoints.weights import ARCHITECTURE, default_target_layer_ids, size
from sglang_auf.training.convert.common import Reading, differences, is_on, refused, section, served

DOMINO = "DominoDraftModel"

# All that a DFlash or Domino drafter has in dflash_config.
KNOWN = frozenset(
    {
        "mask_token_id",
        "mask_token",
        "target_layer_ids",
        "block_size",
        "num_target_layers",
        "projector_type",
        "emb_dim",
        "gru_hidden_dim",
        "shift_label",
        "pure_draft_prefix_len",
    }
)


def read(config: Mapping[str, Any], target_layers: int | None) -> Reading:
    """target_layers: depth of the target where config.json does not say it. Raises CardError for what is not served.

    SpecForge reads its settings in dflash_config and nowhere else, and block_size at the top level.
    """
    architectures = config.get("architectures")
    if architectures not in ([ARCHITECTURE], [DOMINO]):
        raise refused(
            f"architectures {architectures!r}", "SGLang's DFlash has that backbone and Domino's head, no other model"
        )
    nested = section(config, "dflash_config")
    projector = nested.get("projector_type")
    unknown = [key for key in nested if key not in KNOWN and is_on(key, nested[key])]
    if unknown or projector not in (None, "dflash", "domino"):
        raise refused(
            f"{', '.join(unknown) or f'projector_type {projector!r}'} in dflash_config",
            "what that adds to a DFlash drafter is not known here",
        )
    if nested.get("mask_token_id") is None:
        raise refused(
            "no dflash_config.mask_token_id",
            "SpecForge then takes one from the tokenizer when it trains, and does not write it down",
            "set dflash_config.mask_token_id to the one in the training run's log",
        )
    domino = architectures == [DOMINO] or projector == "domino"
    depth = target_layers if config.get("num_target_layers") is None else size(config, "num_target_layers")
    if depth is None:
        raise refused("no num_target_layers", "SGLang needs the target's depth", "name the target with --target")
    written = served(
        config,
        num_target_layers=depth,
        target_layer_ids=nested.get("target_layer_ids")
        or default_target_layer_ids(depth, size(config, "num_hidden_layers")),
        block_size=_block_size(config, nested),
        mask_token_id=nested["mask_token_id"],
        **_domino_sizes(config, nested) if domino else {},
    )
    if domino:
        written["dflash_config"]["shift_label"] = bool(nested.get("shift_label", False))
    return Reading("SpecForge", written, None, tuple(differences(config, written)))


def _block_size(config: Mapping[str, Any], nested: Mapping[str, Any]) -> Any:
    """SpecForge trains with the one at the top level, SGLang serves with the nested one."""
    sizes = {config.get("block_size"), nested.get("block_size")} - {None}
    if len(sizes) > 1:
        raise refused(
            f"block_size {config['block_size']}, and {nested['block_size']} in dflash_config",
            "one of them was not trained",
            "remove the wrong one",
        )
    return sizes.pop() if sizes else None


def _domino_sizes(config: Mapping[str, Any], nested: Mapping[str, Any]) -> dict[str, Any]:
    """SpecForge's defaults, prefix 0 and labels not shifted, are not SGLang's, which has none."""
    if elsewhere := [key for key in ("emb_dim", "gru_hidden_dim") if nested.get(key) is None]:
        sections = [key for key in config if isinstance(config[key], Mapping) and key.endswith("_config")]
        raise refused(
            f"a Domino drafter without {' and '.join(elsewhere)} in dflash_config (config.json has "
            f"{', '.join(sections) or 'no such object'})",
            "SpecForge 0.2.0 reads Domino's settings there alone, so another version trained it",
            "move them there as that version reads them, shift_label and pure_draft_prefix_len included",
        )
    prefix = nested.get("pure_draft_prefix_len", 0)
    if prefix != 1:
        said = "" if "pure_draft_prefix_len" in nested else " (SpecForge's default: dflash_config does not say)"
        raise refused(
            f"a Domino drafter with pure_draft_prefix_len {prefix}{said}",
            "SGLang serves 1 alone, exactly one draft without correction",
            "train it again with pure_draft_prefix_len 1",
        )
    return {"head": "domino", "emb_dim": nested["emb_dim"], "gru_hidden_dim": nested["gru_hidden_dim"]}
