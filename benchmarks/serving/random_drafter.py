"""A drafter of given shape that has learned nothing: whatever it proposes, the answer must be plain decoding's."""

from __future__ import annotations

import shutil
from pathlib import Path

from sglang_auf.checkpoints.weights import expected_weights
from sglang_auf.errors import CardError
from sglang_auf.files import read_json

SEED = 0
STD = 0.02


def write_random_drafter(shape_of: Path, out: Path) -> Path:
    """Write a checkpoint with the config of the drafter in `shape_of` and bf16 weights drawn from N(0, 0.02).

    Norms are 1. The same seed, so the same weights, every time. No card is written: its claims (tau, objective) would
    be another drafter's. Returns the absolute directory; CardError for a drafter that cannot be read.
    """
    import torch
    from safetensors.torch import save_file

    config = read_json(shape_of / "config.json", CardError)
    generator = torch.Generator().manual_seed(SEED)
    weights = {
        name: (torch.ones(shape) if name.endswith("norm.weight") else torch.randn(shape, generator=generator) * STD)
        for name, shape in expected_weights(config).items()
    }
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(shape_of / "config.json", out / "config.json")
    bf16 = {name: weight.bfloat16() for name, weight in weights.items()}
    save_file(bf16, out / "model.safetensors", metadata={"format": "pt"})
    return out.resolve()
