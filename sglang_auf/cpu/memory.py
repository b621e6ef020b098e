"""KV memory on a CPU: the pool's layout, its size from free memory, and the refusal of a model that does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sglang_auf.errors import TargetError
from sglang_auf.files import read_json

GIB = 1 << 30
# Tokens a pool holds at most unless one context or --max-total-tokens is more: 32 requests of 4096 tokens.
MOST_TOKENS = 131_072
# Left to the operating system, the HTTP process, activations and torch's own allocations.
RESERVED = 2 * GIB
# A weight is held twice: as loaded (the drafter reads some raw) and reordered for oneDNN.
WEIGHT_COPIES = 2


class CpuKVPool(MHATokenToKVPool):  # type: ignore[misc]
    """SGLang's pool with K and V of a slot side by side: one address of a layer finds both (kernels.py).

    Each layer is one tensor [slots, 2, key heads, head_dim]; `k_buffer` and `v_buffer` are views of it.
    """

    def _create_buffers_normal(self) -> None:
        if self.head_dim != self.v_head_dim:
            raise TargetError(
                f"key heads of {self.head_dim} and value heads of {self.v_head_dim} dimensions",
                "equal head dimensions on the CPU platform",
                "serve this model on a GPU",
            )
        shape = (self.size + self.page_size, 2, self.head_num, self.head_dim)
        self._layers = [torch.zeros(shape, dtype=self.store_dtype) for _ in range(self.layer_num)]
        self.k_buffer = [layer[:, 0] for layer in self._layers]
        self.v_buffer = [layer[:, 1] for layer in self._layers]

    def _init_kv_copy_and_warmup(self) -> None:
        # Upstream compiles a Triton kernel here for moving slots, which block drafting never does.
        self._kv_copy_config = None

    def interleaved(self, layer_id: int) -> torch.Tensor:
        """[slots, 2, key heads, head_dim] of one layer."""
        return self._layers[layer_id - self.start_layer]

    def _store_kv_layer(self, layer_idx: int, loc: torch.Tensor, cache_k: torch.Tensor, cache_v: torch.Tensor) -> None:
        from sglang_auf.cpu import kernels  # with numba: for the scheduler alone

        kernels.store(cache_k.flatten(1), cache_v.flatten(1), self._layers[layer_idx], loc.long().contiguous())


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What a model takes, in bytes; kv is per token."""

    weights: int
    kv_per_token: int

    @classmethod
    def of(cls, path: Path) -> ModelSize:
        """From config.json and the sizes of the safetensors files of a local checkpoint."""
        config = _language_config(path)
        try:
            layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
            head_dim = config.get("head_dim") or config["hidden_size"] // heads
        except KeyError as missing:
            raise TargetError(
                f"no {missing} in {path / 'config.json'}",
                "the configuration of a decoder with key and value heads",
                "serve a model whose configuration has it, or give --max-total-tokens",
            ) from missing
        kv_heads = config.get("num_key_value_heads") or heads
        weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        return cls(weights, layers * 2 * kv_heads * head_dim * torch.bfloat16.itemsize)

    def __add__(self, other: ModelSize) -> ModelSize:
        return ModelSize(self.weights + other.weights, self.kv_per_token + other.kv_per_token)


def _language_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory; of a multimodal one the part for text."""
    config = read_json(path / "config.json", TargetError)
    return config.get("text_config") or config


def pool_tokens(size: ModelSize, context_length: int, available: int) -> int:
    """Tokens for the KV pool with `available` bytes free now; TargetError if not even one context fits."""
    weights = WEIGHT_COPIES * size.weights
    free = available - RESERVED - weights
    tokens = min(max(MOST_TOKENS, context_length), free // size.kv_per_token)
    if tokens < context_length:
        need = RESERVED + weights + context_length * size.kv_per_token
        raise TargetError(
            f"{available / GIB:.1f} GiB of free memory",
            f"{need / GIB:.1f} GiB: weights twice ({weights / GIB:.1f}), KV of one context of {context_length} tokens "
            f"({context_length * size.kv_per_token / GIB:.1f}), {RESERVED / GIB:.0f} reserved",
            "free memory, take a smaller model, or shorten the context with --context-length",
        )
    return int(tokens)


def local_checkpoints(server_args: Any) -> list[Path] | None:
    """The target's and the drafter's directories; None when one is a hub id that SGLang has yet to fetch."""
    names = (server_args.model_path, server_args.speculative_draft_model_path)
    paths = [Path(name) for name in names if name]
    return paths if all((path / "config.json").is_file() for path in paths) else None


def refuse_other_attention(server_args: Any) -> None:
    """TargetError for a model with attention that the CPU backend lacks: better here than at the first token."""
    for path in local_checkpoints(server_args) or ():
        config = _language_config(path)
        layer_types = set(config.get("layer_types") or ()) - {"full_attention"}
        if layer_types or config.get("attn_logit_softcapping"):
            raise TargetError(
                f"{', '.join(sorted(layer_types)) or 'soft-capped attention'} in {path / 'config.json'}",
                "full self-attention in every layer on the CPU platform",
                "serve this model on a GPU",
            )


def plan_pool(server_args: Any) -> int | None:
    """--max-total-tokens for a server on this machine; None when a checkpoint is not local yet (SGLang sizes then)."""
    paths = local_checkpoints(server_args)
    if paths is None:
        return None
    size = sum((ModelSize.of(path) for path in paths[1:]), ModelSize.of(paths[0]))
    context = server_args.context_length or _language_config(paths[0]).get("max_position_embeddings", 4096)
    return pool_tokens(size, int(context), psutil.virtual_memory().available)
