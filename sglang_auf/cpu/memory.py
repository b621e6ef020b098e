"""KV memory on a CPU: the layout of the pool, its size, and the refusal of a model that does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sglang_auf.checkpoints.target_config import language_config
from sglang_auf.errors import TargetError
from sglang_auf.files import CONFIG, PICKLES, read_json, weight_files
from sglang_auf.process import cgroups

GIB = 1 << 30
# Most tokens of a pool, unless one context or --max-total-tokens is more: 32 requests of 4096 tokens.
MOST_TOKENS = 131_072
# Slots behind a whole context for the verify steps at its end: two blocks of 32 (hooks/aborts.py).
ROOM = 64
# For the operating system, the HTTP process, activations and torch's own allocations.
RESERVED = 2 * GIB
# A weight is held twice: as loaded (the drafter reads some directly) and packed for products. The third copy of a
# drafter's keys and values is small beside what is reserved.
WEIGHT_COPIES = 2
MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),  # cgroup 2
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # cgroup 1
)
"""Of a control group: its limit, what it uses, and the row of memory.stat with what it gives up for the asking."""


class CpuKVPool(MHATokenToKVPool):  # type: ignore[misc]
    """SGLang's pool with K and V of a slot side by side, so that a kernel finds both at one address (kernels.py).

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
        # Upstream compiles a Triton kernel here that moves slots; block drafting never moves any.
        self._kv_copy_config = None

    def interleaved(self, layer_id: int) -> torch.Tensor:
        """[slots, 2, key heads, head_dim] of one layer."""
        return self._layers[layer_id - self.start_layer]

    def _store_kv_layer(self, layer_idx: int, loc: torch.Tensor, cache_k: torch.Tensor, cache_v: torch.Tensor) -> None:
        from sglang_auf.cpu import kernels  # needs numba; only the scheduler computes

        kernels.store(cache_k.flatten(1), cache_v.flatten(1), self._layers[layer_idx], loc.long().contiguous())


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Memory of a model, in bytes."""

    weights: int
    kv_per_token: int

    @classmethod
    def of(cls, path: Path) -> ModelSize:
        """From config.json and the sizes of a local checkpoint's files. float32 loads as bf16, in half the bytes."""
        config = _language_config(path)
        try:
            layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
            head_dim = config.get("head_dim") or config["hidden_size"] // heads
        except KeyError as missing:
            raise TargetError(
                f"no {missing} in {path / CONFIG}",
                "the configuration of a decoder with key and value heads",
                "serve a model whose configuration has it, or give --max-total-tokens",
            ) from missing
        kv_heads = config.get("num_key_value_heads") or heads
        weights = sum(file.stat().st_size for file in _weight_files(path))
        if "float32" in str(config.get("dtype") or config.get("torch_dtype")):
            weights //= 2
        return cls(weights, layers * 2 * kv_heads * head_dim * torch.bfloat16.itemsize)

    def __add__(self, other: ModelSize) -> ModelSize:
        return ModelSize(self.weights + other.weights, self.kv_per_token + other.kv_per_token)


def _weight_files(path: Path) -> list[Path]:
    """What SGLang would read of a directory; [] where there is nothing yet, as for weights that are made up."""
    if any(path.glob("*.safetensors")):
        return weight_files(path, TargetError)
    return [file for pattern in PICKLES for file in path.glob(pattern)]


def _language_config(path: Path) -> Mapping[str, Any]:
    """What config.json of a model directory says of the language model."""
    return language_config(read_json(path / CONFIG, TargetError))


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, or of a control group around it where that is less."""
    left = (_left_in(group, *files) for group in cgroups("memory") for files in MEMORY_FILES)
    return min([int(psutil.virtual_memory().available), *(free for free in left if free is not None)])


def _left_in(group: Path, limit_file: str, used_file: str, cached: str) -> int | None:
    """Bytes that a control group may still take; None where it has no limit, or is of the other kind."""
    try:
        limit = (group / limit_file).read_text().strip()
        used = int((group / used_file).read_text())
        parts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    # What was read from files and not used lately counts as used, and is given up for the asking.
    return None if limit == "max" else int(limit) - used + int(parts[cached])


def pool_tokens(size: ModelSize, context_length: int, available: int) -> int:
    """Tokens of the KV pool with `available` free bytes. Raises TargetError if not even one context fits."""
    weights = WEIGHT_COPIES * size.weights
    free = available - RESERVED - weights
    tokens = min(max(MOST_TOKENS, context_length + ROOM), free // size.kv_per_token)
    if tokens < context_length:
        need = RESERVED + weights + context_length * size.kv_per_token
        raise TargetError(
            f"{available / GIB:.1f} GiB of free memory",
            f"{need / GIB:.1f} GiB: weights twice ({weights / GIB:.1f}), KV of one context of {context_length} tokens "
            f"({context_length * size.kv_per_token / GIB:.1f}), {RESERVED / GIB:.0f} reserved",
            "free memory, use a smaller model, or shorten the context: --set server_args.context_length=N "
            "(SGLang's own launcher: --context-length N)",
        )
    return int(tokens)


def local_checkpoints(server_args: Any) -> list[Path] | None:
    """The directories of target and drafter; None when one is a hub id, which SGLang fetches later."""
    names = (server_args.model_path, server_args.speculative_draft_model_path)
    paths = [Path(name) for name in names if name]
    return paths if all((path / CONFIG).is_file() for path in paths) else None


def plan_pool(server_args: Any) -> int | None:
    """--max-total-tokens for this machine; None when a checkpoint is not local yet, and SGLang decides."""
    paths = local_checkpoints(server_args)
    if paths is None:
        return None
    size = sum((ModelSize.of(path) for path in paths[1:]), ModelSize.of(paths[0]))
    context = server_args.context_length or _language_config(paths[0]).get("max_position_embeddings") or 4096
    return pool_tokens(size, int(context), free_memory())
