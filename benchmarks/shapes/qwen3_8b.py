"""The configurations of Qwen/Qwen3-8B and z-lab/Qwen3-8B-DFlash-b16, as their config.json say, and smaller ones."""

from __future__ import annotations

from typing import Any, Literal

from sglang_auf.checkpoints.weights import default_target_layer_ids
from sglang_auf.errors import ConfigError

TARGET: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "rope_scaling": None,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
MASK = 151669
DRAFT_LAYERS = 5
TAPS = 5


def _drafter(target: dict[str, Any], taps: list[int], mask: int) -> dict[str, Any]:
    return target | {
        "architectures": ["DFlashDraftModel"],
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "block_size": 16,
        "dflash_config": {"mask_token_id": mask, "target_layer_ids": taps},
        "num_hidden_layers": DRAFT_LAYERS,
        "num_target_layers": target["num_hidden_layers"],
        "layer_types": ["full_attention"] * DRAFT_LAYERS,
        "dtype": "bfloat16",
    }


DRAFTER: dict[str, Any] = _drafter(TARGET, [1, 9, 17, 25, 33], MASK)

# For a machine without the memory: the same vocabulary, half of the rest.
HALF: dict[str, Any] = TARGET | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
# Heads are not below 64, since attention kernels of GPUs have no smaller ones.
TOY: dict[str, Any] = TARGET | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 2048,
    "max_position_embeddings": 4096,
    "bos_token_id": 2040,
    "eos_token_id": 2042,
}
TOY_MASK = 2047

Widths = Literal["full", "half", "toy"]
_WIDTHS: dict[Widths, dict[str, Any]] = {"full": TARGET, "half": HALF, "toy": TOY}


def configs(layers: int, widths: Widths = "full") -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json of a target of so many layers, and of the drafter of block 16 for it.

    With full widths and 36 layers they are TARGET and DRAFTER. Raises ConfigError for fewer layers than the drafter's
    taps need.
    """
    target = _WIDTHS[widths] | {"num_hidden_layers": layers}
    return target, _drafter(target, taps(layers), TOY_MASK if widths == "toy" else MASK)


def taps(layers: int) -> list[int]:
    """Five 0-based layers: those of z-lab and SGLang where these are five, else spread over all but the last."""
    chosen = default_target_layer_ids(layers, TAPS) if layers > TAPS else []
    if len(set(chosen)) < TAPS:
        chosen = [round(index * (layers - 2) / (TAPS - 1)) for index in range(TAPS)]
    if len(set(chosen)) < TAPS:
        raise ConfigError(f"--layers {layers}", f"at least {TAPS + 1}: the drafter reads {TAPS} of them, not the last")
    return chosen
