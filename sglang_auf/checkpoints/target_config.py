"""How a target's config.json is read: its language model, and its rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the language model; multimodal targets nest it.

    The names and their order are SGLang's (get_hf_text_config in srt/utils/hf_transformers/common.py).
    """
    thinker: Mapping[str, Any] | None = config.get("thinker_config")
    if thinker:
        return thinker.get("text_config") or thinker
    parts = (config.get(name) for name in ("llm_config", "language_config", "text_config"))
    return next((part for part in parts if part), config)


def rope_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A language model's rope_parameters, those of full attention where they are split by layer type.

    Empty where the file is older than transformers 5 and has rope_theta and rope_scaling instead.
    """
    rope: Mapping[str, Any] = config.get("rope_parameters") or {}
    full: Mapping[str, Any] | None = rope.get("full_attention")
    return full or rope


def is_mrope(config: Mapping[str, Any]) -> bool:
    """Whether positions of a config.json's model have several numbers, as for pictures (SGLang's model_is_mrope)."""
    language = language_config(config)
    rope = {**rope_of(language), **(language.get("rope_scaling") or {})}
    return "mrope_section" in rope and not config.get("language_model_only")


def rope_theta(config: Mapping[str, Any]) -> float:
    """The base of a language model's rotary positions, in either spelling."""
    return float(rope_of(config).get("rope_theta") or config.get("rope_theta") or 10000.0)  # the first Llama's
