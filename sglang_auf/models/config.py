"""The shape of a drafter, and its config.json.

This is the one definition of the format that this project trains and exports: DFlash (arXiv 2602.06036) and Domino
(arXiv 2605.29707) drafters as SGLang 0.5.23 reads them (models/dflash.py, speculative/dflash_utils.py).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sglang_auf.checkpoints.drafter_settings import ARCHITECTURE, draft_setting, head_of
from sglang_auf.checkpoints.target_config import rope_of, rope_theta
from sglang_auf.checkpoints.weights import expected_weights, tapped_layers
from sglang_auf.errors import CardError, ConfigError

logger = logging.getLogger(__name__)

Head = Literal["dflash", "domino"]

# Rotary embeddings that SGLang, transformers and the drafter here compute in the same way.
ROPE_TYPES = ("default", "linear", "llama3")
# What targets call the epsilon of their RMS norms: most of them, LFM2, Nemotron-H.
NORM_EPS = ("rms_norm_eps", "norm_eps", "layer_norm_epsilon")
# Where a Qwen3 that says nothing else begins to slide (transformers' Qwen3Config).
MAX_WINDOW_LAYERS = 28


class DrafterConfig(BaseModel):
    """Sizes of a drafter.

    The widths are the target's, because the drafter borrows its embedding and head. target_layer_ids: 0-based layers
    of the target whose outputs are tapped, ascending. block_size: B, anchor included. rope_scaling: the target's, or
    None. gru_hidden_dim, emb_dim: state of the GRU and rank of the correction, for the domino head only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2)
    vocab_size: int = Field(ge=1)
    rms_norm_eps: float = Field(gt=0)
    rope_theta: float = Field(gt=0)
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int = Field(ge=1)
    block_size: int = Field(ge=2)
    mask_token_id: int = Field(ge=0)
    target_layer_ids: tuple[int, ...] = Field(min_length=1)
    num_target_layers: int = Field(ge=1)
    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None
    head: Head = "dflash"
    gru_hidden_dim: int | None = Field(default=None, ge=1)
    emb_dim: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        domino = self.head == "domino"
        faults = [
            (self.mask_token_id >= self.vocab_size, f"mask_token_id {self.mask_token_id} of {self.vocab_size} tokens"),
            (
                list(self.target_layer_ids) != sorted(set(self.target_layer_ids))
                or self.target_layer_ids[0] < 0
                or self.target_layer_ids[-1] >= self.num_target_layers,
                f"target_layer_ids {list(self.target_layer_ids)} of {self.num_target_layers} layers",
            ),
            (self.num_attention_heads % self.num_key_value_heads != 0, "heads that key heads do not divide"),
            (self.head_dim % 2 != 0, f"an odd head_dim {self.head_dim}"),
            (domino and not (self.gru_hidden_dim and self.emb_dim), "a domino head without gru_hidden_dim and emb_dim"),
            (not domino and bool(self.gru_hidden_dim or self.emb_dim), "gru_hidden_dim or emb_dim on a dflash head"),
        ]
        if found := [text for applies, text in faults if applies]:
            raise ValueError("; ".join(found))
        return self

    @classmethod
    def for_target(
        cls,
        target: Mapping[str, Any],
        *,
        num_layers: int,
        target_layer_ids: Sequence[int],
        block_size: int,
        mask_token_id: int,
        head: Head = "dflash",
        gru_hidden_dim: int | None = None,
        emb_dim: int | None = None,
        plain_rope: bool = False,
    ) -> Self:
        """A drafter for the target whose language model has the config `target`: its widths, heads and vocabulary.

        plain_rope: where a drafter does not compute the target's rotary embedding (a part of each head, yarn, ...),
        take a plain one of the same theta, and log it. A drafter's layers are its own, so this is right where none is
        copied from the target. Raises ConfigError for such a target otherwise, and for one that lacks a size;
        ValidationError for impossible values.
        """
        heads, hidden = _of(target, "num_attention_heads"), _of(target, "hidden_size")
        return cls(
            hidden_size=hidden,
            intermediate_size=_of(target, "intermediate_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            num_key_value_heads=target.get("num_key_value_heads") or heads,
            head_dim=target.get("head_dim") or hidden // heads,
            vocab_size=_of(target, "vocab_size"),
            rms_norm_eps=_of(target, *NORM_EPS),
            rope_theta=rope_theta(target),
            rope_scaling=_rope_scaling(target, plain_rope),
            max_position_embeddings=_of(target, "max_position_embeddings"),
            block_size=block_size,
            mask_token_id=mask_token_id,
            target_layer_ids=tuple(target_layer_ids),
            num_target_layers=_of(target, "num_hidden_layers"),
            bos_token_id=target.get("bos_token_id"),
            eos_token_id=target.get("eos_token_id"),
            head=head,
            gru_hidden_dim=gru_hidden_dim,
            emb_dim=emb_dim,
        )

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any]) -> Self:
        """The shape in a drafter's config.json.

        Raises CardError unless it is a DFlash or Domino drafter without settings that `to_checkpoint` would lose;
        ValidationError for sizes that are missing or impossible.
        """
        expected_weights(config)  # checks the kind of drafter
        if lost := _uncomputed(config):
            raise CardError(
                f"{', '.join(lost)} in config.json",
                "a drafter as this project trains it; its torch model computes nothing else",
                "try `sglang-auf convert`, or train and decode it with the tools it comes from",
            )
        head = head_of(config)
        values = {
            name: config[name]
            for name in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "vocab_size",
                "rms_norm_eps",
                "rope_theta",
                "rope_scaling",
                "max_position_embeddings",
                "bos_token_id",
                "eos_token_id",
            )
            if name in config
        }
        for name in ("block_size", "mask_token_id", "num_target_layers"):
            values[name] = draft_setting(config, name)
        for name in ("gru_hidden_dim", "emb_dim"):
            values[name] = draft_setting(config, name) if head == "domino" else None
        return cls.model_validate({**values, "head": head, "target_layer_ids": tapped_layers(config)})

    def to_checkpoint(self) -> dict[str, Any]:
        """The config.json that SGLang 0.5.23 loads this drafter with."""
        dflash: dict[str, Any] = {
            "mask_token_id": self.mask_token_id,
            "target_layer_ids": list(self.target_layer_ids),
        }
        top: dict[str, Any] = {}
        if self.head == "domino":
            dflash |= {
                "projector_type": "domino",
                "pure_draft_prefix_len": 1,
                "shift_label": True,
                "gru_hidden_dim": self.gru_hidden_dim,
                "emb_dim": self.emb_dim,
            }
            top["emb_dim"] = self.emb_dim
        return {
            "architectures": [ARCHITECTURE],
            "model_type": "qwen3",
            "block_size": self.block_size,
            "dflash_config": dflash,
            **top,
            "num_target_layers": self.num_target_layers,
            "num_hidden_layers": self.num_hidden_layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling,
            "max_position_embeddings": self.max_position_embeddings,
            "layer_types": ["full_attention"] * self.num_hidden_layers,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "dtype": "bfloat16",
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
        }


def _of(target: Mapping[str, Any], *names: str) -> Any:
    """The first of these fields that the target has. Raises ConfigError where it has none."""
    for name in names:
        if target.get(name) is not None:
            return target[name]
    raise ConfigError(
        f"no {' or '.join(names)} in the target's config.json",
        "a target whose config.json has it, because the layers of its drafter take it over",
    )


def _rope_scaling(target: Mapping[str, Any], plain_rope: bool) -> dict[str, Any] | None:
    """The target's rope_scaling, None for a plain rotary embedding. Raises ConfigError as `for_target`."""
    rope = rope_of(target)
    scaling = target.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    partial = target.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0
    if partial == 1.0 and kind in ROPE_TYPES:
        return None if kind == "default" else dict(scaling)
    found = f"a target whose rotary embedding has type {kind!r} and partial_rotary_factor {partial}"
    if not plain_rope:
        raise ConfigError(
            found,
            f"one of type {', '.join(ROPE_TYPES)} over complete heads, where its layers are copied into a drafter",
            "drafter.init=random gives the drafter a plain rotary embedding of its own",
        )
    logger.warning("%s: the drafter has a plain one of the same theta, %g", found, rope_theta(target))
    return None


def _uncomputed(config: Mapping[str, Any]) -> list[str]:
    """Settings, as "key value", with which SGLang computes something else than dflash.py and domino.py do."""
    plain: dict[str, tuple[Any, ...]] = {
        "attention_bias": (False,),
        "hidden_act": ("silu",),
        "is_causal": (False,),
        "use_gemma_norm": (False,),
        "rope_parameters": (),
        "attention_value_scale": (1,),
        "input_embedding_scale": (1,),
        "is_neox_style": (True,),
        "partial_rotary_factor": (1,),
        "rope_is_neox_style": (True,),
        "output_multiplier": (1,),
        "final_logit_softcapping": (0,),
    }
    if head_of(config) == "domino":
        plain["shift_label"] = (True,)
    found = {key: draft_setting(config, key) for key in plain}
    found["layer_types"] = next((kind for kind in config.get("layer_types") or () if kind != "full_attention"), None)
    if config.get("layer_types") is None and config.get("use_sliding_window"):
        sliding = config["num_hidden_layers"] - config.get("max_window_layers", MAX_WINDOW_LAYERS)
        found["use_sliding_window"] = True if sliding > 0 else None
    return [f"{key} {value!r}" for key, value in found.items() if value is not None and value not in plain.get(key, ())]
