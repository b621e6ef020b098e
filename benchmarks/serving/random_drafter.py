"""A drafter with random weights. Whatever it proposes, the answer must be that of plain decoding."""

from __future__ import annotations

import shutil
from pathlib import Path

from sglang_auf.checkpoints.weights import expected_weights
from sglang_auf.errors import CardError
from sglang_auf.files import CONFIG, WEIGHTS, read_json

SEED = 0
STD = 0.02


def write_random_drafter(shape_of: Path, out: Path) -> Path:
    """Write a checkpoint with the config of the drafter in `shape_of` and bf16 weights drawn from N(0, 0.02).

    Norms are 1. The seed is fixed, so the weights are always the same. No card is written, because its claims (tau,
    objective) would be those of another drafter. Returns the absolute directory. Raises CardError for a drafter that
    cannot be read.
    """
    import torch
    from safetensors.torch import save_file

    config = read_json(shape_of / CONFIG, CardError)
    generator = torch.Generator().manual_seed(SEED)
    weights = {
        name: (torch.ones(shape) if name.endswith("norm.weight") else torch.randn(shape, generator=generator) * STD)
        for name, shape in expected_weights(config).items()
    }
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(shape_of / CONFIG, out / CONFIG)
    bf16 = {name: weight.bfloat16() for name, weight in weights.items()}
    save_file(bf16, out / WEIGHTS, metadata={"format": "pt"})
    return out.resolve()
