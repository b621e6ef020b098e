"""The drafter against transformers' Qwen3 layers, block by block; masks, names, kinds of rotary scaling, types."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)

from sglang_auf.checkpoints.weights import expected_weights
from sglang_auf.errors import ConfigError
from sglang_auf.models.config import DrafterConfig
from sglang_auf.models.dflash import Drafter, Rotary
from tests.support.tiny_models import drafter_config

BLOCK, LENGTH = 4, 12
ANCHORS = torch.tensor([[0, 3, 9], [12, 5, 1]])
DOMINO = {
    "projector_type": "domino",
    "pure_draft_prefix_len": 1,
    "shift_label": True,
    "gru_hidden_dim": 12,
    "emb_dim": 6,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_drafter(*, layers: int = 2, **changes: Any) -> Drafter:
    """Weights that are far from their initial values, norms included."""
    config = DrafterConfig.from_checkpoint({**drafter_config(BLOCK), "layer_types": None, **changes})
    drafter = Drafter(config.model_copy(update={"num_hidden_layers": layers}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in drafter.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.3 * noise if weight.ndim == 1 else 0.15 * noise)
    return drafter


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """features [2, LENGTH, 2 * 64], embeddings [2, 3, BLOCK, 64]."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(2, LENGTH, 128, generator=generator), torch.randn(2, 3, BLOCK, 64, generator=generator)


# --- names ---


@pytest.mark.parametrize("dflash", [{}, DOMINO], ids=["dflash", "domino"])
@pytest.mark.parametrize("layers", [1, 3])
def test_state_dict_is_the_checkpoint(dflash: dict[str, Any], layers: int) -> None:
    config = DrafterConfig.from_checkpoint(drafter_config(BLOCK, **dflash))
    config = config.model_copy(update={"num_hidden_layers": layers})
    found = {name: tuple(weight.shape) for name, weight in Drafter(config).state_dict().items()}
    assert found == expected_weights(config.to_checkpoint())


def test_everything_in_the_state_dict_is_trained() -> None:
    drafter = make_drafter()
    features, embeddings = inputs()
    drafter(features, embeddings, ANCHORS).square().sum().backward()
    assert [name for name, weight in drafter.named_parameters() if weight.grad is None or not weight.grad.any()] == []


# --- values ---


def loaded(module: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str) -> torch.nn.Module:
    module.load_state_dict({name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)})
    return module


def reference(drafter: Drafter, features: torch.Tensor, block: torch.Tensor, anchor: int) -> torch.Tensor:
    """One block, from transformers' Qwen3 parts: features [S, taps * H], block [B, H] -> [B, H].

    Attention runs over [context before the anchor, block] without a mask; only the block's rows are used.
    """
    ours, state = drafter.config, drafter.state_dict()
    config = Qwen3Config(
        hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size,
        num_attention_heads=ours.num_attention_heads,
        num_key_value_heads=ours.num_key_value_heads,
        head_dim=ours.head_dim,
        rms_norm_eps=ours.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta},
        max_position_embeddings=ours.max_position_embeddings,
        attn_implementation="eager",
    )

    def norm(name: str) -> torch.nn.Module:
        return loaded(Qwen3RMSNorm(ours.hidden_size, ours.rms_norm_eps), state, f"{name}.")

    context = norm("hidden_norm")(features[:anchor] @ state["fc.weight"].T)
    positions = torch.cat([torch.arange(anchor), anchor + torch.arange(len(block))])
    turns = Qwen3RotaryEmbedding(config)(features, positions[None])
    x = block
    for index in range(ours.num_hidden_layers):
        layer = f"layers.{index}"
        attention = loaded(Qwen3Attention(config, 0), state, f"{layer}.self_attn.")
        rows = torch.cat([context, norm(f"{layer}.input_layernorm")(x)])[None]
        x = x + attention(rows, turns, None)[0][0, anchor:]
        mlp = loaded(Qwen3MLP(config), state, f"{layer}.mlp.")
        x = x + mlp(norm(f"{layer}.post_attention_layernorm")(x))
    return norm("norm")(x)


@torch.no_grad()
def test_equals_transformers_qwen3_layers_block_by_block() -> None:
    drafter = make_drafter()
    features, embeddings = inputs()
    found = drafter(features, embeddings, ANCHORS)
    assert found.shape == embeddings.shape
    for row in range(2):
        for block in range(3):
            expected = reference(drafter, features[row], embeddings[row, block], int(ANCHORS[row, block]))
            torch.testing.assert_close(found[row, block], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_block_sees_nothing_from_its_anchor_on_and_no_other_block() -> None:
    drafter = make_drafter()
    features, embeddings = inputs()
    before = drafter(features, embeddings, ANCHORS)
    for row, block in [(0, 0), (0, 1), (1, 1)]:
        other_features, other_embeddings = features.clone(), torch.full_like(embeddings, 5.0)
        other_features[row, int(ANCHORS[row, block]) :] = 50.0
        other_features[1 - row] = 50.0
        other_embeddings[row, block] = embeddings[row, block]
        after = drafter(other_features, other_embeddings, ANCHORS)
        torch.testing.assert_close(after[row, block], before[row, block], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_block_sees_the_feature_before_its_anchor_and_all_its_own_slots() -> None:
    drafter = make_drafter()
    features, embeddings = inputs()
    before = drafter(features, embeddings, ANCHORS)
    for position in range(LENGTH):
        other = features.clone()
        other[:, position] += 1.0
        changed = (drafter(other, embeddings, ANCHORS) - before).abs().flatten(2).amax(2) > 1e-4
        assert changed.tolist() == ANCHORS.gt(position).tolist()
    for slot in range(BLOCK):
        other = embeddings.clone()
        other[:, :, slot] += 1.0
        changed = (drafter(features, other, ANCHORS) - before).abs().amax(3) > 1e-4
        assert changed.all()


# --- rotary positions ---


@pytest.mark.parametrize("position", [0, 1, 511, 30_000])
def test_rotation_is_transformers(position: int) -> None:
    config = make_drafter(rope_theta=1e6).config
    x = torch.randn(2, 3, 4, config.head_dim)  # [rows, tokens, heads, D]
    positions = torch.tensor([[0, 5, position], [position, 2, 1]])
    theirs = Qwen3RotaryEmbedding(
        Qwen3Config(head_dim=config.head_dim, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    )
    cos, sin = theirs(x, positions)
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(Rotary(config)(x, positions), expected, rtol=0, atol=5e-3 if position > 1000 else 1e-4)


@pytest.mark.parametrize(
    "scaling",
    [{"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}, LLAMA3],
    ids=["default", "linear", "linear, old key", "llama3"],
)
def test_frequencies_are_transformers(scaling: dict[str, Any]) -> None:
    config = make_drafter(rope_theta=1e4, rope_scaling=scaling, head_dim=64).config
    kind = scaling.get("rope_type", "linear")
    theirs = Qwen3Config(
        head_dim=64,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": 1e4, **scaling, "rope_type": kind},
    )
    compute = Qwen3RotaryEmbedding.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    expected, attention_factor = compute(theirs)
    assert attention_factor == 1.0
    torch.testing.assert_close(Rotary(config).inverse(), expected, rtol=1e-6, atol=0)


def test_llama3_has_all_three_ranges() -> None:
    """Otherwise the test above would prove little."""
    plain = Rotary(make_drafter(head_dim=64).config).inverse()
    ratio = plain / Rotary(make_drafter(head_dim=64, rope_scaling=LLAMA3).config).inverse()
    assert ratio[0] == 1
    assert ((ratio > 1.001) & (ratio < 7.999)).any()
    assert ratio[-1] == 8


def test_a_kind_that_is_not_computed_is_refused_when_the_drafter_is_made() -> None:
    with pytest.raises(ConfigError, match="yarn"):
        make_drafter(rope_scaling={"rope_type": "yarn", "factor": 4.0})


def test_positions_do_not_suffer_from_a_cast_of_the_weights() -> None:
    drafter = make_drafter()
    positions = torch.tensor([[4000]])
    x = torch.randn(1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    exact = drafter.rotary(x, positions)
    rounded = drafter.bfloat16().rotary(x, positions)
    assert torch.equal(rounded, exact)


# --- types and initial values ---


@torch.no_grad()
def test_bfloat16_stays_near_float32() -> None:
    drafter = make_drafter()
    features, embeddings = inputs()
    exact = drafter(features, embeddings, ANCHORS)
    found = drafter.bfloat16()(features.bfloat16(), embeddings.bfloat16(), ANCHORS)
    assert found.dtype == torch.bfloat16
    assert ((found.float() - exact).norm() / exact.norm()) < 0.02


def test_norms_are_computed_in_float32() -> None:
    norm = make_drafter().norm
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
    assert torch.equal(norm(x), exact.bfloat16())


def test_a_new_drafter_is_small_and_its_correction_is_zero() -> None:
    config = DrafterConfig.from_checkpoint(drafter_config(BLOCK, **DOMINO))
    torch.manual_seed(0)
    drafter = Drafter(config)
    assert 0.018 < drafter.fc.weight.std() < 0.022
    assert drafter.layers[0].mlp.up_proj.weight.std() < 0.022
    assert not drafter.embed_proj[2].weight.any()
    assert drafter.embed_proj[0].weight.any()
