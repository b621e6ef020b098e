"""A drafter from the directory it was exported to."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError
from safetensors.torch import load_file

from sglang_auf.checkpoints.weights import ALIASES, BORROWED, INDEX, RECOMPUTED, check_weights
from sglang_auf.errors import CardError
from sglang_auf.files import read_json
from sglang_auf.models.config import DrafterConfig
from sglang_auf.models.dflash import Drafter


def load_drafter(path: Path) -> Drafter:
    """The drafter in directory `path`, in float32 and on the CPU, whatever float type its weights are stored in.

    float32 is what training continues from; run it under autocast to compute in bfloat16, as in training. Raises
    CardError for a drafter that SGLang would serve otherwise than this module computes, and for any weight that is
    missing, unknown, misshapen or not finite.
    """
    content = read_json(path / "config.json", CardError)
    check_weights(path, content)
    try:
        drafter = Drafter(DrafterConfig.from_checkpoint(content))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise CardError(
            f"{path / 'config.json'}: {problems}", "the sizes of a drafter", "export the drafter again"
        ) from error
    weights = {}
    for file in _files(path):
        for stored, tensor in load_file(file).items():
            name = stored.removeprefix("model.")
            name = ALIASES.get(name, name)
            if name not in BORROWED and not name.endswith(RECOMPUTED):
                weights[name] = tensor.float()
    if broken := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise CardError(
            f"{path}: numbers that are not finite in {', '.join(broken[:3])}",
            "finite weights",
            "take another checkpoint of this training run",
        )
    drafter.load_state_dict(weights)
    return drafter


def _files(path: Path) -> list[Path]:
    """The files that check_weights has looked into."""
    if (path / INDEX).is_file():
        return sorted({path / name for name in read_json(path / INDEX, CardError)["weight_map"].values()})
    return sorted(path.glob("*.safetensors"))
