"""Write a target of Qwen3-8B's widths and a DFlash drafter for it, both of random weights.

What such models answer means nothing. How they are served does: every product has the size that it has in the real
model, and so has every step. The largest tensor and a copy of it are in memory at a time.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field
from safetensors import SafetensorError

from benchmarks.harness.config import CommandConfig
from benchmarks.harness.results import Measured, Report
from benchmarks.shapes.qwen3_8b import TARGET, Widths, configs
from benchmarks.shapes.tokenizer import number_tokenizer
from sglang_auf.checkpoints.weights import Shape, expected_weights
from sglang_auf.errors import ConfigError
from sglang_auf.files import CONFIG, INDEX, whole_directory

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

TARGET_DIR, DRAFTER_DIR = "target", "drafter"
LOGIT_STD = 5.0
"""Of the target's logits: the largest of 151,936 is then near 24, as those of real models are."""
SPARE = 64 << 20
"""Bytes that are to stay free beside the weights: configuration, tokenizer, what else writes to this disk."""


class WriteShapeConfig(CommandConfig):
    """Write a target of Qwen3-8B's widths and a drafter of block 16 for it, with random weights."""

    out: Path = Field(description="directory that does not exist yet; it gets target/ and drafter/")
    layers: int = Field(6, ge=1, description=f"layers of the target; {TARGET['num_hidden_layers']} is the full size")
    widths: Widths = Field("full", description="half: all but the vocabulary; toy: to try the commands in seconds")
    seed: int = Field(0, ge=0, description="the same seed gives the same weights")


class WrittenShape(Measured, Report):
    """shape.json. parameters and bytes: of the target and of the drafter. seconds: of writing both."""

    STEM: ClassVar[str] = "shape"

    config: WriteShapeConfig
    parameters: dict[str, int]
    bytes: dict[str, int]
    seconds: float

    def text(self) -> str:
        sizes = [f"{name}: {count / 1e6:,.1f} million weights" for name, count in self.parameters.items()]
        return "\n".join([*sizes, f"{sum(self.bytes.values()) / 1e9:.2f} GB in {self.seconds:.0f} s"])


def write_shape(config: WriteShapeConfig) -> WrittenShape:
    """Write both models, completely or not at all.

    Raises ConfigError where `out` exists, where the disk has no room, or where the layers are too few for the drafter.
    """
    target, drafter = configs(config.layers, config.widths)
    weights = {TARGET_DIR: target_weights(target), DRAFTER_DIR: expected_weights(drafter)}
    parameters = {name: sum(map(math.prod, shapes.values())) for name, shapes in weights.items()}
    sizes = {name: 2 * count for name, count in parameters.items()}  # bf16
    _check_place(config.out, sum(sizes.values()))
    began = time.perf_counter()
    try:
        with whole_directory(config.out) as made:
            _write_model(made / TARGET_DIR, target, weights[TARGET_DIR], config.seed)
            number_tokenizer(target).save_pretrained(made / TARGET_DIR)
            _write_json(made / TARGET_DIR / "generation_config.json", {"eos_token_id": target["eos_token_id"]})
            _write_model(made / DRAFTER_DIR, drafter, weights[DRAFTER_DIR], config.seed + 1)
    except (OSError, SafetensorError) as problem:
        raise ConfigError(
            f"writing {config.out} failed: {problem}",
            f"a writable place with {sum(sizes.values()) / 1e9:.2f} GB free",
            "free space or choose another directory, then run it again",
        ) from problem
    return WrittenShape(config=config, parameters=parameters, bytes=sizes, seconds=time.perf_counter() - began)


def target_weights(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Names and shapes ([out, in]) of the weights of a Qwen3 target with an untied head."""
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    layer: dict[str, Shape] = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "self_attn.q_norm": (head_dim,),
        "self_attn.k_norm": (head_dim,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        **{
            f"model.layers.{number}.{name}.weight": shape
            for number in range(config["num_hidden_layers"])
            for name, shape in layer.items()
        },
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
    }


def random_weight(name: str, shape: Shape, seed: int) -> torch.Tensor:
    """A weight in bf16 that depends on its name, its shape and the seed alone.

    Norms are 1. Products keep the size of what they multiply, but for the head, see LOGIT_STD.
    """
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    std = {"model.embed_tokens.weight": 1.0, "lm_head.weight": LOGIT_STD / shape[1] ** 0.5}.get(name, shape[1] ** -0.5)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, std, generator=generator)


def _write_model(directory: Path, config: Mapping[str, Any], weights: Mapping[str, Shape], seed: int) -> None:
    """config.json, the weights in files of one layer or one large tensor each, and their index."""
    from safetensors.torch import save_file

    directory.mkdir()
    _write_json(directory / CONFIG, config)
    files: dict[str, list[str]] = {}
    for name in weights:
        prefix, _, rest = name.partition("layers.")
        files.setdefault(f"{prefix}layers.{rest.partition('.')[0]}" if rest else name, []).append(name)
    index: dict[str, str] = {}
    for number, names in enumerate(files.values(), start=1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        logger.info("writing %s/%s", directory.name, file)
        made = {name: random_weight(name, weights[name], seed) for name in names}
        save_file(made, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)  # safetensors writes 0600
        index |= dict.fromkeys(names, file)
    total = 2 * sum(map(math.prod, weights.values()))
    _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def _check_place(out: Path, size: int) -> None:
    """Raises ConfigError where something has that name already, or where `size` bytes do not fit."""
    if out.exists():
        raise ConfigError(f"{out} exists", "a directory that does not exist", "choose another, or remove it")
    place = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < size + SPARE:
        raise ConfigError(
            f"{free / 1e9:.2f} GB free in {place}",
            f"{(size + SPARE) / 1e9:.2f} GB for the weights",
            "free space, choose another place, or write fewer --layers",
        )


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
