"""The shape of a drafter, and its config.json.

This is the one definition of the format that this project trains and exports: DFlash (arXiv 2602.06036) and Domino
(arXiv 2605.29707) drafters as SGLang 0.5.23 reads them (models/dflash.py, speculative/dflash_utils.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sglang_auf.checkpoints.drafter_settings import ARCHITECTURE, draft_setting, head_of
from sglang_auf.checkpoints.weights import expected_weights, tapped_layers
from sglang_auf.errors import CardError, ConfigError

Head = Literal["dflash", "domino"]


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
    ) -> Self:
        """A drafter for the target with config.json `target`: its widths, heads, vocabulary and rotary positions.

        Raises ConfigError for a target whose rotary embedding covers only a part of each head, which neither the
        trainer nor SGLang's DFlash layers compute; ValidationError for impossible values.
        """
        rope = target.get("rope_parameters") or {}
        partial = target.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
        if partial != 1.0:
            raise ConfigError(
                f"a target with partial_rotary_factor {partial}",
                "a target whose rotary embedding covers complete heads",
            )
        heads = target["num_attention_heads"]
        scaling = target.get("rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else None)
        return cls(
            hidden_size=target["hidden_size"],
            intermediate_size=target["intermediate_size"],
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            num_key_value_heads=target.get("num_key_value_heads") or heads,
            head_dim=target.get("head_dim") or target["hidden_size"] // heads,
            vocab_size=target["vocab_size"],
            rms_norm_eps=target["rms_norm_eps"],
            rope_theta=target.get("rope_theta") or rope.get("rope_theta", 10000.0),
            rope_scaling=scaling,
            max_position_embeddings=target["max_position_embeddings"],
            block_size=block_size,
            mask_token_id=mask_token_id,
            target_layer_ids=tuple(target_layer_ids),
            num_target_layers=target["num_hidden_layers"],
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


def _uncomputed(config: Mapping[str, Any]) -> list[str]:
    """Settings, as "key value", with which SGLang computes something else than dflash.py and domino.py do."""
    plain: dict[str, tuple[Any, ...]] = {
        "attention_bias": (False,),
        "hidden_act": ("silu",),
        "is_causal": (False,),
        "use_gemma_norm": (False,),
        "rope_parameters": (),
        "attention_value_scale": (1,),
        "output_multiplier": (1,),
        "final_logit_softcapping": (0,),
    }
    if head_of(config) == "domino":
        plain["shift_label"] = (True,)
    found = {key: draft_setting(config, key) for key in plain}
    found["layer_types"] = next((kind for kind in config.get("layer_types") or () if kind != "full_attention"), None)
    return [f"{key} {value!r}" for key, value in found.items() if value is not None and value not in plain.get(key, ())]
