"""Which models the CPU platform does not serve: by their config.json before anything loads, then by what was loaded.

What its kernels lack would fail at the first request, or answer otherwise than the model. And what computes a row
otherwise beside other rows than alone breaks the promise that speculation changes no answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sglang_auf.checkpoints.target_config import language_config, rope_of
from sglang_auf.env import ROW_INVARIANT
from sglang_auf.errors import TargetError
from sglang_auf.files import CONFIG, read_json

OTHER_ATTENTION = {
    "attn_logit_softcapping": "soft-capped attention",
    "sliding_window_pattern": "sliding windows in some layers",
    "full_attention_interval": "linear attention in some layers",
    "hybrid_override_pattern": "layers without attention",
    "attention_chunk_size": "attention in chunks",
    "kv_lora_rank": "latent attention",
}
"""Field of a config.json -> what it means where it is set."""

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Fields that count experts. Each computes those rows of a batch that chose it, in one product of as many rows."""

BY_LONGEST_ROW = ("longrope", "su")
"""Kinds of rotary positions that rotate all rows of a batch in one way or another, by its furthest position."""

UNLESS = f"{ROW_INVARIANT.name}=0 serves it, with answers that depend on the load"


def refuse_config(path: Path) -> None:
    """Raise TargetError for a model directory whose config.json asks for what the platform does not compute."""
    if found := ", ".join(_unserved(language_config(read_json(path / CONFIG, TargetError)))):
        raise TargetError(
            f"{found} in {path / CONFIG}",
            "full self-attention in every layer, and rows that do not depend on one another, on the CPU platform",
            "serve this model on a GPU",
        )


def _unserved(config: Mapping[str, Any]) -> Iterator[str]:
    yield from sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    for field, meaning in OTHER_ATTENTION.items():
        without_window = field == "sliding_window_pattern" and config.get("sliding_window", "") is None
        if config.get(field) and not without_window:
            yield meaning
    if ROW_INVARIANT.is_on():
        for field in EXPERTS:
            count = config.get(field)
            if isinstance(count, int) and count > 1:
                yield f"{field} {count} ({UNLESS})"
        rope = config.get("rope_scaling") or rope_of(config)
        kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, Mapping) else None
        if kind in BY_LONGEST_ROW:
            yield f"rotary positions of type {kind} ({UNLESS})"


def refuse_modules(model: torch.nn.Module) -> None:
    """Raise TargetError for a loaded SGLang model with a layer that the platform does not compute.

    It finds what a config.json did not say, and models of the hub, whose config.json was not there before.
    """
    from sglang.srt.layers.radix_attention import RadixAttention

    for name, module in model.named_modules():
        if isinstance(module, RadixAttention) and (
            module.is_cross_attention or module.logit_cap or module.sliding_window_size > -1 or module.use_irope
        ):
            found = f"{name}, an attention with a window, chunks, a soft cap or another text's keys"
        elif ROW_INVARIANT.is_on() and any(kind.__name__ == "FusedMoE" for kind in type(module).__mro__):
            found = f"{name}, experts ({UNLESS})"
        else:
            continue
        raise TargetError(
            f"{found}, in {type(model).__name__}",
            "full self-attention in every layer, and rows that do not depend on one another, on the CPU platform",
            "serve this model on a GPU",
        )
