"""Tiny random targets and drafters, written as checkpoints that SGLang loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sglang_auf.checkpoints.weights import expected_weights

VOCABULARY = 64
LAYERS = 5


def target_config(head_dim: int = 16, vocabulary: int = VOCABULARY) -> dict[str, Any]:
    """A Llama: 5 layers, 4 heads on 2 key heads."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4 * head_dim,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def drafter_config(block_size: int, head_dim: int = 16, vocabulary: int = VOCABULARY, **dflash: Any) -> dict[str, Any]:
    """A DFlash drafter of one layer for that target; `dflash` adds to dflash_config (a Domino head, say)."""
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "block_size": block_size,
        "dflash_config": {"mask_token_id": 3, "target_layer_ids": [1, 2], **dflash},
        "num_target_layers": LAYERS,
        "num_hidden_layers": 1,
        "hidden_size": 4 * head_dim,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 512,
        "layer_types": ["full_attention"],
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "dtype": "bfloat16",
    }


def write_target(
    directory: Path, head_dim: int = 16, vocabulary: int = VOCABULARY, bias: bool = False, **fields: Any
) -> Path:
    """Random weights whose distributions are neither flat nor certain.

    bias: at q, k, v and o too. fields: of config.json.
    """
    config = target_config(head_dim, vocabulary) | {"attention_bias": bias} | fields
    hidden, inner, kv = config["hidden_size"], config["intermediate_size"], 2 * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.k_proj.weight": (kv, hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}.mlp.up_proj.weight": (inner, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, inner),
        }
        if bias:
            shapes |= {f"{prefix}.self_attn.{name}_proj.bias": (hidden if name in "qo" else kv,) for name in "qkvo"}
    return _write(directory, config, shapes, seed=1)


def write_gemma4(directory: Path) -> Path:
    """A text model of Gemma 4, as transformers saves it: scaled embeddings, a sliding window, a partial rope."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    torch.manual_seed(1)
    config = Gemma4TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=40,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        global_head_dim=16,
        hidden_size_per_layer_input=0,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention", "full_attention"],
        initializer_range=0.3,
    )
    Gemma4ForCausalLM(config).bfloat16().save_pretrained(directory)
    return directory


def write_qwen2(directory: Path, tied: bool = False) -> Path:
    """A Qwen2, as transformers saves it: biases at q, k and v. tied: the head is the embedding."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    model = Qwen2ForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    model.bfloat16().save_pretrained(directory)
    return directory


def write_drafter(
    directory: Path, block_size: int = 4, head_dim: int = 16, vocabulary: int = VOCABULARY, seed: int = 2, **dflash: Any
) -> Path:
    """Random weights: drafts that are nearly always wrong, which exactness must not notice."""
    config = drafter_config(block_size, head_dim, vocabulary, **dflash)
    return _write(directory, config, expected_weights(config), seed)


def _write(directory: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: (torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.2).bfloat16()
        for name, shape in shapes.items()
    }
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
