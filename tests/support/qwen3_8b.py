"""The configurations of Qwen/Qwen3-8B and z-lab/Qwen3-8B-DFlash-b16, as their config.json say. No weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.training.step_shapes import QWEN3_8B

TARGET: dict[str, Any] = QWEN3_8B | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "rope_scaling": None,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
DRAFTER: dict[str, Any] = TARGET | {
    "architectures": ["DFlashDraftModel"],
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    "block_size": 16,
    "dflash_config": {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]},
    "num_hidden_layers": 5,
    "num_target_layers": 36,
    "layer_types": ["full_attention"] * 5,
    "dtype": "bfloat16",
}


def write_target(directory: Path) -> Path:
    """Only its config.json."""
    (directory / "config.json").write_text(json.dumps(TARGET))
    return directory
