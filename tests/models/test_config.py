"""The shape of a drafter: from a target, from and to config.json, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sglang_auf.checkpoints.weights import expected_weights
from sglang_auf.errors import CardError, ConfigError
from sglang_auf.models.config import MAX_WINDOW_LAYERS, DrafterConfig
from sglang_auf.models.dflash import Rotary
from tests.support.tiny_models import drafter_config, target_config

DRAFTERS = Path(__file__).parents[2] / "drafters"
DOMINO = {
    "projector_type": "domino",
    "pure_draft_prefix_len": 1,
    "shift_label": True,
    "gru_hidden_dim": 12,
    "emb_dim": 6,
}
SHAPE = {"num_layers": 2, "target_layer_ids": [1, 3], "block_size": 8, "mask_token_id": 3}

QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "max_position_embeddings": 40960,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
# The config of z-lab's drafter for Qwen3-8B, without keys that only transformers reads.
QWEN3_8B_DRAFTER = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "block_size": 16,
    "dflash_config": {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]},
    "num_target_layers": 36,
    "num_hidden_layers": 5,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "max_position_embeddings": 40960,
    "layer_types": ["full_attention"] * 5,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


def made(target: dict[str, Any] | None = None, **changes: Any) -> DrafterConfig:
    return DrafterConfig.for_target(target or target_config(), **{**SHAPE, **changes})


def test_a_drafter_for_qwen3_8b_is_written_as_the_public_one_is() -> None:
    config = DrafterConfig.for_target(
        QWEN3_8B, num_layers=5, target_layer_ids=[1, 9, 17, 25, 33], block_size=16, mask_token_id=151669
    )
    assert config.to_checkpoint() == QWEN3_8B_DRAFTER
    assert DrafterConfig.from_checkpoint(QWEN3_8B_DRAFTER) == config


def test_the_widths_are_the_targets_and_the_depth_is_its_own() -> None:
    config = made()
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (64, 128, 64)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 16)
    assert (config.num_hidden_layers, config.num_target_layers) == (2, 5)


def test_a_target_that_leaves_out_heads_gets_what_transformers_assumes() -> None:
    target = {key: value for key, value in target_config().items() if key not in ("num_key_value_heads", "head_dim")}
    config = made(target)
    assert (config.num_key_value_heads, config.head_dim) == (4, 16)


@pytest.mark.parametrize("head", ["dflash", "domino"])
def test_config_json_says_everything(head: str) -> None:
    extra = {"gru_hidden_dim": 12, "emb_dim": 6} if head == "domino" else {}
    config = made(head=head, **extra)
    stored = json.loads(json.dumps(config.to_checkpoint()))
    assert DrafterConfig.from_checkpoint(stored) == config
    assert expected_weights(stored)["fc.weight"] == (64, 2 * 64)


def test_a_domino_drafter_is_written_as_sglang_reads_it() -> None:
    stored = made(head="domino", gru_hidden_dim=12, emb_dim=6).to_checkpoint()
    assert stored["dflash_config"] == {"mask_token_id": 3, "target_layer_ids": [1, 3], **DOMINO}
    assert stored["emb_dim"] == 6
    assert stored["architectures"] == ["DFlashDraftModel"]


def test_a_dflash_drafter_says_nothing_of_domino() -> None:
    stored = made().to_checkpoint()
    assert not DOMINO.keys() & (stored.keys() | stored["dflash_config"].keys())


@pytest.mark.parametrize("path", sorted(DRAFTERS.glob("*/config.json")), ids=lambda path: path.parent.name)
def test_shipped_drafters_survive_reading_and_writing(path: Path) -> None:
    stored = json.loads(path.read_text())
    assert DrafterConfig.from_checkpoint(stored).to_checkpoint() == stored


# --- rotary positions ---

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, 5e5, LLAMA3),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, 1e5, None),
        (
            {"rope_theta": None, "rope_parameters": {"rope_theta": 1e5, **LLAMA3}},
            1e5,
            {"rope_theta": 1e5, **LLAMA3},
        ),
        (
            {
                "rope_theta": None,
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
                    "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
                },
            },
            1e6,
            None,
        ),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}}, 1e4, None),
    ],
    ids=["old", "old, scaled", "new", "new, scaled", "new, by layer type", "old, in sections"],
)
def test_rotary_positions_are_the_targets_in_either_spelling(
    fields: dict[str, Any], theta: float, scaling: dict[str, Any] | None
) -> None:
    config = made({**target_config(), **fields})
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("fields", "theta", "said"),
    [
        ({"partial_rotary_factor": 0.5}, 1e4, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25}}, 1e7, "partial_rotary_factor 0.25"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 1e4, "type 'yarn'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 5e5}}, 5e5, "type 'longrope'"),
    ],
)
def test_a_rotary_embedding_that_a_drafter_does_not_compute(
    caplog: pytest.LogCaptureFixture, fields: dict[str, Any], theta: float, said: str
) -> None:
    """It is refused where the drafter takes over layers, and replaced where the drafter starts with its own."""
    target = {**target_config(), **fields}
    with pytest.raises(ConfigError, match=f"{said}.*init=random"):
        made(target)
    assert not caplog.records
    config = made(target, plain_rope=True)
    assert (config.rope_theta, config.rope_scaling) == (theta, None)
    assert said in caplog.text and f"theta, {theta:g}" in caplog.text
    Rotary(config)


@pytest.mark.parametrize("name", ["rms_norm_eps", "norm_eps", "layer_norm_epsilon"])
def test_the_epsilon_of_a_target_s_norms_has_several_names(name: str) -> None:
    target = {key: value for key, value in target_config().items() if key != "rms_norm_eps"}
    assert made({**target, name: 3e-5}).rms_norm_eps == 3e-5


@pytest.mark.parametrize(
    "key",
    ["hidden_size", "intermediate_size", "num_attention_heads", "rms_norm_eps", "max_position_embeddings"],
)
def test_a_target_that_lacks_a_size(key: str) -> None:
    with pytest.raises(ConfigError, match=f"no {key}"):
        made({name: value for name, value in target_config().items() if name != key})


# --- what cannot be ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_token_id": 64}, "mask_token_id 64 of 64 tokens"),
        ({"mask_token_id": -1}, "mask_token_id"),
        ({"target_layer_ids": [1, 5]}, r"target_layer_ids \[1, 5\] of 5 layers"),
        ({"target_layer_ids": [-1, 2]}, "target_layer_ids"),
        ({"target_layer_ids": [3, 1]}, "target_layer_ids"),
        ({"target_layer_ids": [1, 1]}, "target_layer_ids"),
        ({"target_layer_ids": []}, "target_layer_ids"),
        ({"block_size": 1}, "block_size"),
        ({"num_layers": 0}, "num_hidden_layers"),
        ({"head": "domino"}, "a domino head without gru_hidden_dim and emb_dim"),
        ({"head": "domino", "emb_dim": 4}, "a domino head without gru_hidden_dim and emb_dim"),
        ({"emb_dim": 4}, "gru_hidden_dim or emb_dim on a dflash head"),
        ({"head": "eagle"}, "head"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        made(**changes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_key_value_heads": 3}, "heads that key heads do not divide"),
        ({"head_dim": 15}, "an odd head_dim 15"),
    ],
)
def test_impossible_targets_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        made({**target_config(), **fields})


def test_the_largest_ids_are_possible() -> None:
    config = made(mask_token_id=63, target_layer_ids=[0, 4])
    assert (config.mask_token_id, config.target_layer_ids) == (63, (0, 4))


def test_an_unknown_field_is_refused_and_a_config_does_not_change() -> None:
    values = made().model_dump()
    with pytest.raises(ValidationError, match="num_taps"):
        DrafterConfig(**values, num_taps=2)
    with pytest.raises(ValidationError, match="frozen"):
        made().block_size = 4  # type: ignore[misc]


# --- other trainers' checkpoints ---


def test_a_sliding_window_begins_where_transformers_lets_it() -> None:
    from transformers import Qwen3Config

    assert Qwen3Config().max_window_layers == MAX_WINDOW_LAYERS
    filled = Qwen3Config(num_hidden_layers=3, use_sliding_window=True, max_window_layers=2)
    assert filled.layer_types == ["full_attention", "full_attention", "sliding_attention"]


def test_what_is_in_dflash_config_comes_before_the_top_level() -> None:
    stored = drafter_config(8)
    stored |= {"mask_token_id": 9, "target_layer_ids": [0], "dflash_config": {**stored["dflash_config"]}}
    stored["dflash_config"]["block_size"] = 4
    config = DrafterConfig.from_checkpoint(stored)
    assert (config.mask_token_id, config.target_layer_ids, config.block_size) == (3, (1, 2), 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["DominoDraftModel"]},
        {"attention_bias": True},
        {"hidden_act": "gelu"},
        {"is_causal": True},
        {"layer_types": ["sliding_attention"]},
        {"use_gemma_norm": True},
        {"partial_rotary_factor": 0.5},
        {"rope_is_neox_style": False},
        {"is_neox_style": False},
        {"input_embedding_scale": 8.0},
        {"layer_types": None, "use_sliding_window": True, "max_window_layers": 0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"dflash_config": {"mask_token_id": 3, "target_layer_ids": [1, 2], "attention_value_scale": 0.5}},
        {"dflash_config": {"mask_token_id": 3, "target_layer_ids": [1, 2], "final_logit_softcapping": 20.0}},
        {"dflash_config": {"mask_token_id": 3, "target_layer_ids": [1, 2], "output_multiplier": 2.0}},
        {"dflash_config": {"mask_token_id": 3, "target_layer_ids": [1, 2], "conv_kernel_size": 2}},
        {"dflash_config": {"mask_token_id": 3, "target_layer_ids": [1, 2], **DOMINO, "shift_label": False}},
    ],
    ids=lambda changes: str(changes)[-40:],
)
def test_what_the_torch_model_would_compute_otherwise_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CardError):
        DrafterConfig.from_checkpoint({**drafter_config(4), **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": False, "is_causal": None, "rope_parameters": None, "layer_types": None},
        {"layer_types": None, "use_sliding_window": True},
        {"partial_rotary_factor": 1.0, "rope_is_neox_style": True, "input_embedding_scale": 1},
        {"dflash_config": {"mask_token_id": 3, "target_layer_ids": [1, 2], "output_multiplier": 1.0}},
        {"dflash_config": {"mask_token_id": 3, "target_layer_ids": [1, 2], **DOMINO}},
    ],
)
def test_settings_that_say_the_default_are_no_obstacle(changes: dict[str, Any]) -> None:
    assert DrafterConfig.from_checkpoint({**drafter_config(4), **changes}).block_size == 4


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps", "max_position_embeddings", "num_target_layers"])
def test_a_missing_size_is_named(key: str) -> None:
    stored = {name: value for name, value in drafter_config(4).items() if name != key}
    with pytest.raises(ValidationError, match=key):
        DrafterConfig.from_checkpoint(stored)
