"""config.json of speculators 0.9.0 drafters, read as its training code reads it. That version has no Domino."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sglang_auf.checkpoints.weights import config_size
from sglang_auf.training.convert.common import FEATURES, Reading, config_changes, refusal, section, served_config

# All keys at the top level that say nothing of a plain DFlash drafter beyond what is read here. Later versions write
# the defaults of a Domino head as well, and how it was trained.
KNOWN = frozenset(
    {
        "architectures",
        "auf",
        "auto_map",
        "aux_hidden_state_layer_ids",
        "block_size",
        "bos_token_id",
        "draft_vocab_size",
        "dtype",
        "emb_dim",
        "eos_token_id",
        "gru_hidden_dim",
        "lambda_base_decay_ratio",
        "lambda_base_start",
        "mask_token_id",
        "model_type",
        "pad_token_id",
        "projector_type",
        "pure_draft_prefix_len",
        "sliding_window_non_causal",
        "speculators_config",
        "speculators_model_type",
        "speculators_version",
        "target_hidden_size",
        "tie_word_embeddings",
        "torch_dtype",
        "transformer_layer_config",
        "transformers_version",
        "use_cache",
    }
)
# Settings of the layers, which are refused here as they are where they belong.
OF_THE_LAYERS = (*FEATURES, "layer_types", "shift_label", "use_sliding_window")


def verifier_of(config: Mapping[str, Any]) -> str | None:
    """The target as the config names it: a hub id, or a path on the machine that trained."""
    return section(section(config, "speculators_config"), "verifier").get("name_or_path") or None


def read(config: Mapping[str, Any], target_layers: int | None) -> Reading:
    """Read speculators' config.json. Raises CardError for what SGLang does not serve.

    target_layers: depth of the target, which config.json lacks. Taps are numbered by the layer that reads them (0 is
    the embedding), and the config of the layers is nested.
    """
    kind = config.get("speculators_model_type")
    if kind != "dflash":
        raise refusal(f"a speculators drafter of type {kind!r}", "its type dflash is the only one that SGLang serves")
    layer = section(config, "transformer_layer_config")
    if not layer:
        raise refusal("no transformer_layer_config", "the sizes of the drafter are not known", "fetch it again")
    unknown = [key for key, value in config.items() if key not in KNOWN and key not in OF_THE_LAYERS and value]
    projector = config.get("projector_type")
    if unknown or projector not in (None, "dflash"):
        raise refusal(
            f"{', '.join(unknown) or f'projector_type {projector!r}'} in config.json",
            "what that adds to a DFlash drafter is not known here",
        )
    if config.get("sample_from_anchor"):
        raise refusal("sample_from_anchor", "it was trained to draft from the anchor's slot, and SGLang does not")
    if config.get("target_hidden_size") not in (None, layer.get("hidden_size")):
        raise refusal(f"target_hidden_size {config['target_hidden_size']}", "SGLang's drafter is as wide as its target")
    if config.get("mask_token_id") is None:
        raise refusal("no mask_token_id", "its mask is not known", "set mask_token_id in config.json as it was trained")
    if target_layers is None:
        raise refusal("a config.json without its target", "SGLang needs its depth", "name the target with --target")
    read_by = config.get("aux_hidden_state_layer_ids")
    if not isinstance(read_by, Sequence) or not read_by or not all(type(one) is int and one > 0 for one in read_by):
        raise refusal(
            f"aux_hidden_state_layer_ids {read_by!r}",
            "SGLang taps the outputs of layers, while 0 is the embedding and an empty list no tap at all",
        )
    tapped = [one - 1 for one in read_by]
    beside = {key: config[key] for key in OF_THE_LAYERS if config.get(key)}
    drafted = config_size(config, "draft_vocab_size")
    written = served_config(
        {**layer, **beside},
        num_target_layers=target_layers,
        target_layer_ids=tapped,
        block_size=config_size(config, "block_size"),
        mask_token_id=config["mask_token_id"],
    )
    moved = ("transformer_layer_config", "aux_hidden_state_layer_ids", "mask_token_id")
    before = {**layer, **{key: value for key, value in config.items() if key not in moved}}
    before["dflash_config"] = {"mask_token_id": config["mask_token_id"], "target_layer_ids": tapped}
    changes = (
        "config.json: transformer_layer_config moved to the top level, mask_token_id into dflash_config",
        f"config.json: aux_hidden_state_layer_ids {list(read_by)}, the layers that read what is tapped, "
        f"-> dflash_config.target_layer_ids {tapped}, the layers that put it out",
        *config_changes(before, written),
    )
    version = config.get("speculators_version") or "of unknown version"
    reduced = drafted if drafted != written["vocab_size"] else None
    return Reading(f"speculators {version}", written, verifier_of(config), changes, reduced)
