"""Shapes of drafter and batch that `step` and `rival-steps` measure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.shapes import qwen3_8b
from sglang_auf.models.config import DrafterConfig

GAMMAS = {8: 4.0, 16: 7.0}
"""Block size -> decay length in slots, from arXiv 2602.06036."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A drafter and the batch of one step: `rows` rows of `length` tokens with `anchors` blocks in each."""

    name: str
    drafter: DrafterConfig
    rows: int
    length: int
    anchors: int

    @property
    def gamma(self) -> float:
        return GAMMAS[self.drafter.block_size]

    def sized(self, anchors: int, length: int) -> Shape:
        """The same drafter with one row of this size."""
        return replace(self, rows=1, anchors=anchors, length=length)


SMOLLM2_135M: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "max_position_embeddings": 8192,
}
TINY = SMOLLM2_135M | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}

SHAPES = {
    # Drafter and anchors per row of the recipe smollm2-135m-auf, with four rows.
    "smollm2-135m": Shape(
        "smollm2-135m",
        DrafterConfig.for_target(
            SMOLLM2_135M, num_layers=2, target_layer_ids=[7, 20, 28], block_size=8, mask_token_id=3
        ),
        rows=4,
        length=512,
        anchors=128,
    ),
    # Taps, block and head of the recipe qwen3-8b-dflash-auf; one layer and few anchors, so that a CPU can run it.
    "qwen3-8b": Shape(
        "qwen3-8b",
        DrafterConfig.for_target(
            qwen3_8b.TARGET,
            num_layers=1,
            target_layer_ids=qwen3_8b.DRAFTER["dflash_config"]["target_layer_ids"],
            block_size=qwen3_8b.DRAFTER["block_size"],
            mask_token_id=qwen3_8b.MASK,
        ),
        rows=1,
        length=256,
        anchors=64,
    ),
    # To try the command.
    "tiny": Shape(
        "tiny",
        DrafterConfig.for_target(TINY, num_layers=1, target_layer_ids=[1, 2], block_size=8, mask_token_id=3),
        rows=2,
        length=96,
        anchors=48,
    ),
}
