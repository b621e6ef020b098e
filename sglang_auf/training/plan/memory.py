"""The memory of one rank on a CUDA device, counted from a recipe and the target's config.json.

The sizes are those of the largest micro-batch that the recipe allows. `kept_by_layers` counts what the backward pass of
the drafter needs, as the tests find it in a real step. What lives for a short time is counted for the two moments that
need most: while the target computes features, and when the backward pass begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sglang_auf.errors import ConfigError
from sglang_auf.models.config import DrafterConfig
from sglang_auf.models.dflash import Drafter
from sglang_auf.training.data.features import embedding_rows
from sglang_auf.training.data.loader import ONLINE
from sglang_auf.training.evaluation.held_out import KEPT_BYTES
from sglang_auf.training.losses.step import DEFAULT_CHUNK
from sglang_auf.training.optimiser import checkpoint_bytes, state_numbers
from sglang_auf.training.recipe import Recipe

FLOAT = 4
OUTSIDE = 2 * 10**9
"""Bytes of a device that no tensor of ours takes: CUDA's context, workspaces of libraries, NCCL's buffers. A guess."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The largest micro-batch: the one of most blocks, and of these the one of most tokens.

    rows R, length S, blocks R * N. item: bytes of a number in the target's precision.
    """

    rows: int
    length: int
    blocks: int
    width: int
    item: int

    @classmethod
    def of(cls, recipe: Recipe) -> Sizes:
        batch, item = recipe.batch, 2 if recipe.precision == "bf16" else FLOAT

        def full(length: int) -> Sizes:
            """A block starts at any token but the last."""
            rows = min(batch.batch_tokens // length, batch.batch_rows or batch.batch_tokens)
            return cls(rows, length, rows * min(batch.anchors_per_row, length - 1), recipe.drafter.block_size, item)

        # Many short rows hold more blocks than few long ones.
        lengths = range(max(2, recipe.min_answer_tokens), recipe.data.max_length + 1)
        return max(map(full, lengths), key=lambda sizes: (sizes.blocks, sizes.context))

    @property
    def tokens(self) -> int:
        """Of the blocks."""
        return self.blocks * self.width

    @property
    def context(self) -> int:
        """Tokens of the conversations."""
        return self.rows * self.length


@dataclass(frozen=True, slots=True)
class Plan:
    """bytes by what takes them: always, while the target computes features, when the backward pass begins.

    checkpoint: bytes of one on the disk.
    """

    always: dict[str, int]
    features: dict[str, int]
    backward: dict[str, int]
    checkpoint: int

    @property
    def peak(self) -> int:
        """Bytes of our tensors at most."""
        return sum(self.always.values()) + max(sum(self.features.values()), sum(self.backward.values()))


def plan(recipe: Recipe, config: DrafterConfig, target: Path, *, ranks: int = 1, sharded: bool = False) -> Plan:
    """config: the drafter's. target: a directory with a config.json. sharded: FSDP over `ranks`, otherwise DDP.

    Raises ConfigError where `ranks` do not divide the recipe's micro-batches.
    """
    if recipe.batch.micro_batches % ranks:
        raise ConfigError(
            f"batch.micro_batches {recipe.batch.micro_batches} on {ranks} ranks", "a multiple of the number of ranks"
        )
    sizes = Sizes.of(recipe)
    layers, tables = target_numbers(target, recipe)
    with torch.device("meta"):
        drafter = Drafter(config)
    weights = sum(parameter.numel() for parameter in drafter.parameters())
    state = state_numbers(drafter, recipe.optimiser)
    parts = ranks if sharded else 1
    added_whole = recipe.batch.micro_batches > ranks  # FSDP shards a gradient after the last micro-batch of a rank
    token = len(config.target_layer_ids) * config.hidden_size * sizes.item
    features, held_out = sizes.context * token, recipe.data.held_out * recipe.data.max_length * token
    # Domino's step goes twice over its micro-batches (accumulation.py). A cache reads one ahead.
    held = recipe.batch.micro_batches // ranks if config.head == "domino" else 1
    online = recipe.features == ONLINE
    always = {
        "target: embedding and head": tables * sizes.item,
        "target: layers up to the last tap": layers * sizes.item if online else 0,
        "drafter: weights, float32": weights * FLOAT // parts,
        "drafter: gradients, float32": weights * FLOAT // (1 if added_whole else parts),
        f"drafter: state of {recipe.optimiser.name}, float32": state * FLOAT // parts,
        "features of held-out rows, at most": min(held_out, KEPT_BYTES),
    }
    return Plan(
        {name: size for name, size in always.items() if size},
        {
            "features": features * held,
            "features: taps before they are put together, or the next batch": features * 2 if online else features,
        },
        {
            "features": features * (held if online else held + 1),
            **({"drafter: weights in bf16, for its products": weights * sizes.item} if sizes.item < FLOAT else {}),
            **_activations(config, sizes, recompute=recipe.batch.recompute),
            "head: logits of a chunk and their softmax": _head(config, sizes),
            "head: states, and gradients of the rows with loss": 5 * sizes.tokens * config.hidden_size * sizes.item,
        },
        checkpoint_bytes(drafter, recipe.optimiser),
    )


def kept_by_layers(config: DrafterConfig, sizes: Sizes) -> int:
    """Bytes that the backward pass of one drafter layer needs, besides weights, its context and its input.

    Norms keep their input in float32 and a number for each row. Products, rotary positions and SiLU keep their inputs
    in the target's precision.
    """
    hidden, inner, item = config.hidden_size, config.intermediate_size, sizes.item
    query_heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    queries, keys = query_heads * config.head_dim, key_heads * config.head_dim
    positions = config.head_dim * item  # cosines and sines
    token = (
        2 * (FLOAT + item) * hidden  # two norms: input, output
        + (FLOAT + item) * queries  # q: input of its norm, rotated
        + FLOAT * keys  # k: input of its norm
        + item * queries + FLOAT * query_heads  # attention: output, sum of each row
        + 4 * item * inner  # gate, up, SiLU of gate, their product
        + 2 * positions
        + FLOAT * (2 + query_heads + key_heads)  # norms: a number for each row
    )  # fmt: skip
    context = FLOAT * keys + positions + FLOAT * key_heads
    both = 2 * item * keys  # k and v of context and blocks, side by side
    return sizes.tokens * (token + both) + sizes.context * (context + both)


def _activations(config: DrafterConfig, sizes: Sizes, *, recompute: bool) -> dict[str, int]:
    hidden, layer = config.hidden_size, kept_by_layers(config, sizes)
    # The two outer norms, of which the first one's output is an input of all layers.
    around = sizes.context * (hidden * (FLOAT + sizes.item) + FLOAT) + sizes.tokens * (hidden + 1) * FLOAT
    # The gradients of a layer's MLP live together with its activations, and those of a norm in float32.
    passing = sizes.tokens * (4 * config.intermediate_size * sizes.item + 2 * hidden * FLOAT)
    if recompute:
        inputs = config.num_hidden_layers * sizes.tokens * hidden * sizes.item
        return {
            "drafter: inputs of its layers": inputs + around,
            "drafter: activations of one layer": layer,
            "drafter: gradients inside a layer": passing,
        }
    return {
        f"drafter: activations of {config.num_hidden_layers} layers": config.num_hidden_layers * layer + around,
        "drafter: gradients inside a layer": passing,
    }


def _head(config: DrafterConfig, sizes: Sizes) -> int:
    """Logits and softmax in float32 and one of them in the target's precision; Domino's chunk goes through autograd."""
    copies = 2 * FLOAT + sizes.item if config.head == "dflash" else 3 * FLOAT + 4 * sizes.item
    rows = min(DEFAULT_CHUNK, sizes.blocks * (sizes.width - 1))
    return rows * config.vocab_size * copies


def target_numbers(target: Path, recipe: Recipe) -> tuple[int, int]:
    """How many numbers are in the layers that features need, and in embedding and head. No weights are read.

    An embedding that scales its rows is held twice: as the target's weight and scaled, for the drafter.
    """
    config: Any = AutoConfig.from_pretrained(target).get_text_config()
    if recipe.objective.labels == "text":
        config.num_hidden_layers = recipe.drafter.taps[-1] + 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        embedding = model.get_input_embeddings()
        held = (embedding.weight, embedding_rows(embedding), model.get_output_embeddings().weight)
    tables = {id(table): table for table in held}
    layers = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in tables)
    return layers, sum(table.numel() for table in tables.values())
