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


def refuse_config(path: Path) -> None:
    """Raise TargetError for a model directory whose config.json asks for what the platform does not compute."""
    config = language_config(read_json(path / CONFIG, TargetError))
    attention, rows = list(_other_attention(config)), list(_dependent_rows(config))
    if attention or rows:
        raise _refusal(f"{', '.join([*attention, *rows])} in {path / CONFIG}", servable=not attention)


def _refusal(found: str, servable: bool) -> TargetError:
    """servable: with rows that depend on one another."""
    unless = f", or set {ROW_INVARIANT.name}=0, with which answers depend on the load" if servable else ""
    return TargetError(
        found,
        "full self-attention in every layer, and rows that do not depend on one another, on the CPU platform",
        f"serve this model on a GPU{unless}",
    )


def _other_attention(config: Mapping[str, Any]) -> Iterator[str]:
    yield from sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    for field, meaning in OTHER_ATTENTION.items():
        without_window = field == "sliding_window_pattern" and config.get("sliding_window", "") is None
        if config.get(field) and not without_window:
            yield meaning


def _dependent_rows(config: Mapping[str, Any]) -> Iterator[str]:
    if not ROW_INVARIANT.is_on():
        return
    for field in EXPERTS:
        count = config.get(field)
        if isinstance(count, int) and count > 1:
            yield f"{field} {count}"
    rope = config.get("rope_scaling") or rope_of(config)
    kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, Mapping) else None
    if kind in BY_LONGEST_ROW:
        yield f"rotary positions of type {kind}"


def refuse_modules(model: torch.nn.Module) -> None:
    """Raise TargetError for a loaded SGLang model with a layer that the platform does not compute.

    It finds what a config.json did not say, and models of the hub, whose config.json was not there before.
    """
    from sglang.srt.layers.radix_attention import RadixAttention

    for name, module in model.named_modules():
        if isinstance(module, RadixAttention) and (
            module.is_cross_attention or module.logit_cap or module.sliding_window_size > -1 or module.use_irope
        ):
            what = "an attention with a window, chunks, a soft cap or another text's keys"
            raise _refusal(f"{name}, {what}, in {type(model).__name__}", servable=False)
        if ROW_INVARIANT.is_on() and any(kind.__name__ == "FusedMoE" for kind in type(module).__mro__):
            raise _refusal(f"{name}, experts, in {type(model).__name__}", servable=True)
