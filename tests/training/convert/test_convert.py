"""Conversion of SpecForge 0.2.0 and speculators 0.9.0 drafters, whose files are written here as theirs are."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_auf import cli
from sglang_auf.checkpoints.card import CARD_NAME, check_drafter, load_card
from sglang_auf.checkpoints.weights import expected_weights
from sglang_auf.errors import CardError, ConfigError, TargetError
from sglang_auf.models.config import DrafterConfig
from sglang_auf.models.dflash import Drafter
from sglang_auf.training.convert.convert import Conversion, convert
from tests.support.tiny_models import drafter_config, write_target

Tensors = dict[str, torch.Tensor]
DOMINO = {
    "projector_type": "domino",
    "emb_dim": 8,
    "gru_hidden_dim": 16,
    "shift_label": True,
    "pure_draft_prefix_len": 1,
}
ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
REMOVED = object()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("targets") / "tiny")


def layers() -> dict[str, Any]:
    """What both trainers save of a Qwen3Config of transformers 5."""
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "layer_types": ["full_attention"],
        "max_position_embeddings": 512,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "pad_token_id": None,
        "rms_norm_eps": 1e-06,
        "rope_parameters": ROPE,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 64,
    }


def specforge_config(**dflash: Any) -> dict[str, Any]:
    domino = "projector_type" in dflash
    return {
        **layers(),
        **({"emb_dim": 8} if domino else {}),
        "architectures": ["DominoDraftModel" if domino else "DFlashDraftModel"],
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "block_size": 4,
        "dflash_config": {"mask_token_id": 3, "target_layer_ids": [1, 2], **dflash},
        "draft_vocab_size": 64,
        "dtype": "bfloat16",
        "num_target_layers": 5,
        "rope_theta": 10000.0,
        "transformers_version": "5.8.1",
    }


def speculators_config(verifier: Path | str | None) -> dict[str, Any]:
    return {
        "architectures": ["DFlashDraftModel"],
        "auto_map": {"": "config.DFlashSpeculatorConfig"},
        "aux_hidden_state_layer_ids": [2, 3],
        "block_size": 4,
        "draft_vocab_size": 64,
        "dtype": "bfloat16",
        "mask_token_id": 3,
        "sample_from_anchor": False,
        "sliding_window_non_causal": False,
        "speculators_config": {
            "algorithm": "dflash",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "accept_tolerance": 0.0,
                    "proposal_type": "greedy",
                    "speculative_tokens": 3,
                    "verifier_accept_k": 1,
                }
            ],
            "verifier": {
                "architectures": ["LlamaForCausalLM"],
                "name_or_path": None if verifier is None else str(verifier),
            },
        },
        "speculators_model_type": "dflash",
        "speculators_version": "0.9.0",
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": layers(),
        "transformers_version": "5.19.0",
    }


def changed(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy with other values; a__b is b in a."""
    copy: dict[str, Any] = json.loads(json.dumps(config))
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = copy
        for name in sections:
            place = place[name]
        if value is REMOVED:
            del place[key]
        else:
            place[key] = value
    return copy


def weights_of(head: str = "dflash", dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """As both trainers name them: what a drafter of this shape holds."""
    config = drafter_config(4, **(DOMINO if head == "domino" else {}))
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in expected_weights(config).items()}


def checkpoint(directory: Path, config: dict[str, Any], weights: Tensors | None = None) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    head = "domino" if "projector_type" in config.get("dflash_config", {}) else "dflash"
    save_file(weights or weights_of(head), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def converted(
    tmp_path: Path, config: dict[str, Any], target: Path | None, weights: Tensors | None = None
) -> Conversion:
    source = checkpoint(tmp_path / "source", config, weights)
    return convert(str(source), tmp_path / "out", target=None if target is None else str(target))


def refusal(tmp_path: Path, config: dict[str, Any], target: Path | None, weights: Tensors | None = None) -> str:
    with pytest.raises(CardError) as caught:
        converted(tmp_path, config, target, weights)
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]  # nothing half-written
    return str(caught.value)


# What is taken in


def test_a_specforge_dflash_drafter(tmp_path: Path, target: Path) -> None:
    result = converted(tmp_path, specforge_config(), target)
    assert result.kind == "SpecForge"
    checked = check_drafter(str(result.path), str(target))
    card = checked.card
    assert (card.block_size, card.mask_token_id, card.target_layer_ids, card.head) == (4, 3, (1, 2), "dflash")
    assert all(
        torch.equal(value, weights_of()[name]) for name, value in load_file(tmp_path / "out/model.safetensors").items()
    )
    assert len(result.changes) == 2
    assert "auto_map.AutoModel" in result.changes[0] and "rope_parameters.rope_theta" in result.changes[0]
    assert result.changes[1] == "weights: none changed"


def test_a_specforge_domino_drafter_gets_the_class_sglang_has(tmp_path: Path, target: Path) -> None:
    result = converted(tmp_path, specforge_config(**DOMINO), target)
    assert "config.json: architectures ['DominoDraftModel'] -> ['DFlashDraftModel']" in result.changes
    assert check_drafter(str(result.path), str(target)).card.head == "domino"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dflash_config"] == {"mask_token_id": 3, "target_layer_ids": [1, 2], **DOMINO}
    assert config["emb_dim"] == 8
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in weights_of("domino").items())


def test_a_speculators_drafter(tmp_path: Path, target: Path) -> None:
    result = converted(tmp_path, speculators_config("owner/tiny"), target)
    assert result.kind == "speculators 0.9.0"
    checked = check_drafter(str(result.path), str(target))
    assert checked.card.target_layer_ids == (1, 2)  # read by layers 2 and 3
    assert any("[2, 3]" in change and "target_layer_ids [1, 2]" in change for change in result.changes)
    assert "config.json: num_target_layers 5 added" in result.changes
    assert checked.card.target_name == "owner/tiny"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**drafter_config(4), "bos_token_id": 1, "eos_token_id": 2}
    assert all(
        torch.equal(value, weights_of()[name]) for name, value in load_file(tmp_path / "out/model.safetensors").items()
    )


@pytest.mark.parametrize("mode", ["gqa", "mha"])
def test_the_attention_that_specforge_assumes_may_be_spelled_out(tmp_path: Path, target: Path, mode: str) -> None:
    path = converted(tmp_path, specforge_config(attention_mode=mode), target).path
    assert "attention_mode" not in json.loads((path / "config.json").read_text())["dflash_config"]


def test_settings_of_a_speculators_drafter_that_change_nothing(tmp_path: Path, target: Path) -> None:
    """Versions after 0.9.0 write the defaults of a Domino head, too."""
    unused = {"projector_type": "dflash", "pure_draft_prefix_len": 1, "emb_dim": 256, "gru_hidden_dim": 1024}
    off = {"shift_label": False, "layer_types": None, "aux_hidden_state_scales": None, "something_new": 0}
    result = converted(tmp_path, changed(speculators_config(target), **unused, **off, auf=True), None)
    config = json.loads((result.path / "config.json").read_text())
    assert config == {**drafter_config(4), "bos_token_id": 1, "eos_token_id": 2}


def test_our_own_drafter_loads_what_was_converted(tmp_path: Path, target: Path) -> None:
    converted(tmp_path, specforge_config(**DOMINO), target)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    drafter = Drafter(DrafterConfig.from_checkpoint(config))
    drafter.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)


def test_a_speculators_drafter_is_checked_against_the_target_it_names(tmp_path: Path, target: Path) -> None:
    result = converted(tmp_path, speculators_config(target), None)
    card = load_card(result.path)
    assert card.target_name == "tiny"  # the directory's name: its place on this machine says nothing elsewhere
    assert card.target_config_hash is not None
    assert not any("not checked" in warning for warning in result.warnings)


def test_what_the_source_does_not_say_stays_unknown(tmp_path: Path, target: Path) -> None:
    card = load_card(converted(tmp_path, specforge_config(), target).path)
    assert (card.thinking, card.chat_template_hash, card.max_length, card.objective, card.tau) == (None,) * 5
    assert not card.derived


def test_the_training_command_that_speculators_leaves_is_kept(tmp_path: Path, target: Path) -> None:
    source = checkpoint(tmp_path / "source", speculators_config(target))
    (source / "train_command.txt").write_text("train --block-size 4")
    assert load_card(convert(str(source), tmp_path / "out").path).recipe == "train --block-size 4"


def test_without_a_target_it_says_so(tmp_path: Path) -> None:
    result = converted(tmp_path, specforge_config(), None)
    assert any("not checked against a target" in warning for warning in result.warnings)
    assert json.loads((tmp_path / "out" / CARD_NAME).read_text())["target_name"] is None


def test_a_drafter_of_another_target_is_refused(tmp_path: Path, target: Path) -> None:
    assert "num_target_layers 6, where the target's is 5" in refusal(
        tmp_path, changed(specforge_config(), num_target_layers=6), target
    )


def test_taps_that_are_not_said_are_specforges_choice(tmp_path: Path, target: Path) -> None:
    weights = {**weights_of(), "fc.weight": torch.ones(64, 64, dtype=torch.bfloat16)}
    config = changed(specforge_config(), dflash_config__target_layer_ids=REMOVED)
    result = converted(tmp_path, config, target, weights)
    assert load_card(result.path).target_layer_ids == (2,)
    assert "config.json: dflash_config.target_layer_ids [2] added" in result.changes


def test_labels_not_shifted_and_biases_are_kept(tmp_path: Path, target: Path) -> None:
    """SpecForge takes false for a shift_label that is not said, where SGLang looks at the top level."""
    config = changed(
        specforge_config(**DOMINO), dflash_config__shift_label=REMOVED, shift_label=True, attention_bias=True
    )
    biases = {
        f"layers.0.self_attn.{name}_proj.bias": torch.ones(size, dtype=torch.bfloat16)
        for name, size in (("q", 64), ("k", 32), ("v", 32), ("o", 64))
    }
    result = converted(tmp_path, config, target, {**weights_of("domino"), **biases})
    written = json.loads((result.path / "config.json").read_text())
    assert written["dflash_config"]["shift_label"] is False
    assert written["attention_bias"] is True
    assert "config.json: dflash_config.shift_label False added" in result.changes


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": REMOVED},
        {"rope_theta": REMOVED},
        {"rope_parameters": {**ROPE, "mrope_section": [2, 3, 3], "mrope_interleaved": True}},
    ],
)
def test_one_rotary_embedding_however_it_is_spelled(tmp_path: Path, target: Path, changes: dict[str, Any]) -> None:
    written = json.loads(
        (converted(tmp_path, changed(specforge_config(), **changes), target).path / "config.json").read_text()
    )
    assert (written["rope_theta"], written["rope_scaling"]) == (10000.0, None)


def test_rotary_scaling_is_carried_over(tmp_path: Path, target: Path) -> None:
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    config = changed(
        speculators_config(target), transformer_layer_config__rope_parameters={"rope_theta": 500.0, **llama3}
    )
    written = json.loads((converted(tmp_path, config, target).path / "config.json").read_text())
    assert (written["rope_theta"], written["rope_scaling"]) == (500.0, llama3)


# Weights


def test_other_names_and_types_are_named(tmp_path: Path, target: Path) -> None:
    kept = weights_of("domino", torch.float32)
    stored = {
        ("logit_head." if name.startswith(("prefix_gru.", "embed_proj.")) else "model.") + name: value
        for name, value in kept.items()
    }
    result = converted(tmp_path, specforge_config(**DOMINO), target, stored)
    written = load_file(result.path / "model.safetensors")
    assert all(torch.equal(written[name], value.bfloat16()) for name, value in kept.items())
    assert "weights: logit_head.embed_proj.0.weight -> embed_proj.0.weight" in result.changes
    assert "weights: model.fc.weight -> fc.weight" in result.changes
    assert f"weights: {len(kept)} cast from float32 to bfloat16" in result.changes


def test_copies_of_the_targets_tables_are_left_out(tmp_path: Path, target: Path) -> None:
    tables = load_file(target / "model.safetensors")
    extra = {
        "embed_tokens.weight": tables["model.embed_tokens.weight"],
        "lm_head.weight": tables["lm_head.weight"],
        "verifier_lm_head.weight": tables["lm_head.weight"].clone(),
        "verifier_norm.weight": tables["model.norm.weight"],
        "rotary_emb.inv_freq": torch.ones(8),
    }
    result = converted(tmp_path, speculators_config(target), None, {**weights_of(), **extra})
    assert load_file(result.path / "model.safetensors").keys() == weights_of().keys()
    assert [change for change in result.changes if change.startswith("weights")] == [
        "weights: embed_tokens.weight left out: equal to the target's, which SGLang drafts with",
        "weights: lm_head.weight left out: equal to the target's, which SGLang drafts with",
        "weights: rotary_emb.inv_freq left out: SGLang computes it",
        "weights: verifier_lm_head.weight left out: only training reads it",
        "weights: verifier_norm.weight left out: only training reads it",
    ]


def test_a_table_of_its_own_is_refused(tmp_path: Path, target: Path) -> None:
    own = load_file(target / "model.safetensors")["model.embed_tokens.weight"] + 1
    weights = {**weights_of(), "embed_tokens.weight": own}
    assert "embed_tokens.weight that is not the target's" in refusal(tmp_path, specforge_config(), target, weights)


def test_a_table_that_cannot_be_compared_is_named(tmp_path: Path) -> None:
    weights = {**weights_of(), "lm_head.weight": torch.ones(64, 64)}
    result = converted(tmp_path, specforge_config(), None, weights)
    assert any("lm_head.weight left out" in change and "not compared" in change for change in result.changes)


LISTED = torch.tensor([0, 1, 5, 9, 40, 63])
"""The tokens of a reduced vocabulary."""


def reduced(target: Path, **changes: torch.Tensor | None) -> tuple[dict[str, Any], Tensors]:
    """config.json and weights of a speculators drafter of the LISTED tokens; a change to None removes a weight."""
    in_list = torch.zeros(64, dtype=torch.bool)
    in_list[LISTED] = True
    extra = {
        "lm_head.weight": load_file(target / "model.safetensors")["lm_head.weight"][LISTED].contiguous(),
        "d2t": LISTED - torch.arange(len(LISTED)),
        "t2d": in_list,
        **changes,
    }
    weights = {name: tensor for name, tensor in {**weights_of(), **extra}.items() if tensor is not None}
    return changed(speculators_config(target), draft_vocab_size=len(LISTED)), weights


def test_a_reduced_vocabulary_becomes_our_list(tmp_path: Path, target: Path) -> None:
    config, weights = reduced(target)
    result = converted(tmp_path, config, None, weights)
    checked = check_drafter(str(result.path), str(target))
    assert checked.vocabulary is not None and checked.vocabulary.tokens == tuple(LISTED.tolist())
    assert load_file(result.path / "model.safetensors").keys() == weights_of().keys()
    assert any("draft_vocabulary.json: 6 of 64 tokens" in change for change in result.changes)
    convert(str(tmp_path / "source"), result.path, force=True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lm_head.weight": torch.ones(6, 64)}, "a head that is not the target's"),
        ({"lm_head.weight": torch.ones(7, 64)}, "a head that is not the target's"),
        ({"d2t": LISTED.flip(0) - torch.arange(6)}, "a d2t of 6 that are not ascending ids"),
        ({"d2t": LISTED + 1 - torch.arange(6)}, "a d2t of 6 that are not ascending ids"),
        ({"d2t": torch.zeros(5, dtype=torch.int64)}, "a d2t of 5"),
        ({"d2t": torch.zeros(6, dtype=torch.int64)}, "a t2d of other tokens than d2t"),
        ({"d2t": None}, "without d2t"),
        ({"lm_head.weight": None}, "without lm_head.weight"),
    ],
)
def test_a_reduced_vocabulary_that_is_not_the_targets_is_refused(
    tmp_path: Path, target: Path, changes: dict[str, Any], reason: str
) -> None:
    config, weights = reduced(target, **changes)
    assert reason in refusal(tmp_path, config, target, weights)


def test_a_reduced_vocabulary_needs_the_targets_weights(tmp_path: Path, target: Path) -> None:
    config, weights = reduced(target)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((target / "config.json").read_text())
    source = checkpoint(tmp_path / "source", config, weights)
    with pytest.raises(CardError, match="no weights of the target") as caught:
        convert(str(source), tmp_path / "out", target=str(tmp_path / "bare"))
    assert "--target" in caught.value.remedy


def test_shards_are_joined(tmp_path: Path, target: Path) -> None:
    source = checkpoint(tmp_path / "source", specforge_config())
    (source / "model.safetensors").unlink()
    names = sorted(weights_of())
    parts = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, some in parts.items():
        save_file({name: weights_of()[name] for name in some}, source / file)
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    result = convert(str(source), tmp_path / "out", target=str(target))
    assert load_file(result.path / "model.safetensors").keys() == weights_of().keys()
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CardError, match=r"lacks model-00002-of-00002\.safetensors"):
        convert(str(source), tmp_path / "again", target=str(target))


# What is refused, with the reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dflash_config__pure_draft_prefix_len": 0}, "pure_draft_prefix_len 0"),
        ({"dflash_config__pure_draft_prefix_len": 3}, "pure_draft_prefix_len 3"),
        ({"dflash_config__pure_draft_prefix_len": REMOVED, "pure_draft_prefix_len": 1}, "SpecForge's default"),
        ({"dflash_config__emb_dim": REMOVED, "domino_config": {"emb_dim": 8}}, "domino_config"),
        ({"dflash_config__gru_hidden_dim": REMOVED}, "without gru_hidden_dim"),
    ],
)
def test_domino_heads_that_sglang_lacks(tmp_path: Path, target: Path, changes: dict[str, Any], reason: str) -> None:
    assert reason in refusal(tmp_path, changed(specforge_config(**DOMINO), **changes), target)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["DFlash2DraftModel"]}, "DFlash2DraftModel"),
        ({"architectures": ["DSparkDraftModel"]}, "DSparkDraftModel"),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "LlamaForCausalLMEagle3"),
        ({"dflash_config__projector_type": "dspark"}, "projector_type 'dspark'"),
        ({"dflash_config__selector_rank": 256}, "selector_rank"),
        ({"dflash_config__conv_kernel_size": 2}, "conv_kernel_size"),
        ({"dflash_config__attention_sink_bias": True}, "attention_sink_bias"),
        ({"dflash_config__output_multiplier": 2.0}, "output_multiplier"),
        ({"dflash_config__something_new": 1}, "something_new"),
        ({"dflash_config__attention_mode": "mla"}, "attention_mode"),
        ({"dflash_config__causal": True}, "causal"),
        ({"dflash_config__use_swa": True}, "use_swa"),
        ({"dflash_config__shift_label": True}, "shift_label without a domino head"),
        ({"sample_from_anchor": True}, "sample_from_anchor"),
        ({"dflash_config__mask_token_id": None}, "does not write it down"),
        ({"dflash_config__mask_token_id": 64}, "mask_token_id 64 of 64 tokens"),
        ({"dflash_config__target_layer_ids": [2, 1]}, "larger than the one before"),
        ({"dflash_config__target_layer_ids": [1, 5]}, "of 5 layers"),
        ({"dflash_config__block_size": 8}, "block_size 4, and 8 in dflash_config"),
        ({"dflash_config": "domino"}, "should be an object"),
        ({"num_target_layers": 0}, "num_target_layers 0"),
        ({"layer_types": ["sliding_attention"], "sliding_window": 128}, "sliding_attention"),
        ({"layer_types": REMOVED, "use_sliding_window": True}, "use_sliding_window"),
        ({"is_causal": True}, "is_causal"),
        ({"use_gemma_norm": True}, "use_gemma_norm"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"draft_vocab_size": 32}, "reduced draft vocabulary, 32 of 64"),
        ({"head_dim": REMOVED}, "head_dim"),
        ({"rope_theta": 1e6}, "do not describe one rotary embedding"),
        ({"rope_theta": REMOVED, "rope_parameters": REMOVED}, "do not describe one rotary embedding"),
        ({"rope_parameters": {"full_attention": ROPE}}, "do not describe one rotary embedding"),
        ({"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0}}, "rotary scaling of type 'yarn'"),
        ({"rope_parameters": {**ROPE, "partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25"),
    ],
)
def test_specforge_drafters_that_are_not_served_as_trained(
    tmp_path: Path, target: Path, changes: dict[str, Any], reason: str
) -> None:
    assert reason in refusal(tmp_path, changed(specforge_config(), **changes), target)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"speculators_model_type": "dspark"}, "type 'dspark'"),
        ({"speculators_model_type": "dflash2"}, "type 'dflash2'"),
        ({"speculators_model_type": "xpress"}, "type 'xpress'"),
        ({"speculators_model_type": "domino"}, "type 'domino'"),
        ({"draft_vocab_size": 32}, "reduced draft vocabulary, 32 of 64 tokens, without d2t and lm_head.weight"),
        ({"draft_vocab_size": REMOVED}, "draft_vocab_size"),
        ({"sample_from_anchor": True}, "sample_from_anchor"),
        ({"mask_token_id": None}, "no mask_token_id"),
        ({"target_hidden_size": 128}, "target_hidden_size 128"),
        ({"aux_hidden_state_layer_ids": [0, 3]}, "0 is the embedding"),
        ({"aux_hidden_state_layer_ids": None}, "aux_hidden_state_layer_ids None"),
        ({"aux_hidden_state_layer_ids": []}, r"aux_hidden_state_layer_ids []"),
        ({"aux_hidden_state_layer_ids": [3, 2]}, "larger than the one before"),
        ({"aux_hidden_state_layer_ids": [2, 5]}, "tapped layers [4]"),  # the last layer of a Llama
        ({"block_size": REMOVED}, "block_size"),
        ({"transformer_layer_config": None}, "no transformer_layer_config"),
        ({"transformer_layer_config__layer_types": ["sliding_attention"]}, "sliding_attention"),
        ({"transformer_layer_config__hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quantization_config"),
        ({"layer_types": ["sliding_attention"]}, "layer_types ['sliding_attention']"),
        ({"use_sliding_window": True, "transformer_layer_config__layer_types": REMOVED}, "use_sliding_window"),
        ({"sliding_window": 128}, "sliding_window in config.json"),
        ({"shift_label": True}, "shift_label without a domino head"),
        ({"causal": True}, "causal"),
        ({"aux_hidden_state_scales": [1.0, 0.5]}, "aux_hidden_state_scales"),
        ({"projector_type": "domino"}, "projector_type 'domino'"),
        ({"something_new": 1}, "something_new"),
    ],
)
def test_speculators_drafters_that_are_not_served_as_trained(
    tmp_path: Path, target: Path, changes: dict[str, Any], reason: str
) -> None:
    assert reason in refusal(tmp_path, changed(speculators_config(target), **changes), target)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("t2d", torch.ones(64, dtype=torch.bool), "reduced draft vocabulary"),
        ("markov_head.markov_w1.weight", torch.ones(64, 8), "markov_head.markov_w1.weight, which SGLang does not read"),
        ("model.fc.weight", torch.ones(64, 128), "two weights for fc.weight"),
        ("norm.weight", torch.full((64,), float("nan")), "norm.weight with 64 of 64 not finite"),
        ("norm.weight", torch.ones(64, dtype=torch.int8), "norm.weight of type torch.int8"),
        ("fc.weight", torch.ones(64, 192), r"fc.weight of shape [64, 192] instead of [64, 128]"),
    ],
)
def test_weights_that_are_not_served_as_trained(
    tmp_path: Path, target: Path, name: str, value: torch.Tensor, reason: str
) -> None:
    assert reason in refusal(tmp_path, specforge_config(), target, {**weights_of(), name: value})


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_state.pt"])
def test_a_pickle_is_never_opened(tmp_path: Path, target: Path, name: str) -> None:
    source = checkpoint(tmp_path / "source", specforge_config())
    (source / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    convert(str(source), tmp_path / "beside", target=str(target))  # with safetensors beside it, it does not matter
    (source / "model.safetensors").unlink()
    (source / "config.json").unlink()  # SpecForge's training state has none
    with pytest.raises(CardError, match=rf"no weights as \*\.safetensors in .*{name}.*may run any code"):
        convert(str(source), tmp_path / "out", target=str(target))
    assert not (tmp_path / "exploded").exists()


def test_a_mask_embedding_of_its_own_is_refused(tmp_path: Path, target: Path) -> None:
    source = checkpoint(tmp_path / "source", specforge_config())
    (source / "mask_embedding.pt").write_bytes(b"")
    with pytest.raises(CardError, match="the target's own embedding of the mask token"):
        convert(str(source), tmp_path / "out", target=str(target))


def test_a_drafter_of_this_project_needs_no_conversion(tmp_path: Path, target: Path) -> None:
    out = converted(tmp_path, specforge_config(), target).path
    with pytest.raises(CardError, match=r"is already a drafter of this project .*; it needs no conversion"):
        convert(str(out), tmp_path / "again", target=str(target))
    assert not (tmp_path / "again").exists()


def test_damaged_and_absent_files_are_refused(tmp_path: Path, target: Path) -> None:
    source = checkpoint(tmp_path / "source", specforge_config())
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CardError, match="truncated"):
        convert(str(source), tmp_path / "out", target=str(target))
    weights.unlink()
    with pytest.raises(CardError, match=r"no weights .*\(it holds: config.json\)"):
        convert(str(source), tmp_path / "out", target=str(target))
    with pytest.raises(CardError, match="no directory"):
        convert(str(tmp_path / "nowhere"), tmp_path / "out", target=str(target))


def test_a_target_is_needed_where_nothing_names_one(tmp_path: Path) -> None:
    assert "--target" in refusal(tmp_path, speculators_config(None), None)


def test_a_named_target_that_is_not_here(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", speculators_config("/somebody/elses/disk/model"))
    with pytest.raises(TargetError, match=r"which the checkpoint names as its target.*--target"):
        convert(str(source), tmp_path / "out")


def test_another_version_of_speculators_is_named(tmp_path: Path, target: Path) -> None:
    result = converted(tmp_path, changed(speculators_config(target), speculators_version="0.5.0"), target)
    assert "written by speculators 0.5.0, but read as a checkpoint of speculators 0.9.0" in result.warnings


# The command


def test_the_command_names_every_change(tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint(tmp_path / "source", specforge_config(**DOMINO))
    arguments = ["convert", str(source), str(tmp_path / "out"), "--target", str(target)]
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "config.json: architectures ['DominoDraftModel'] -> ['DFlashDraftModel']"
    assert lines[-2].startswith("warning: auf_card.json does not say: thinking")
    assert lines[-1] == f"{tmp_path / 'out'}, from SpecForge"
    origin = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert origin["changes"] == [line for line in lines if line.startswith(("config.json", "weights"))]
    assert origin["converted_from"]["name"] == "source"
    assert cli.main(arguments) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.main([*arguments, "--force"]) == 0


def test_the_source_is_not_written_over(tmp_path: Path, target: Path) -> None:
    source = checkpoint(tmp_path / "source", specforge_config())
    with pytest.raises(ConfigError, match="is no export"):
        convert(str(source), source, target=str(target), force=True)
    assert sorted(file.name for file in source.iterdir()) == ["config.json", "model.safetensors"]
