"""A drafter from the directory it was exported to."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError
from safetensors.torch import load_file

from sglang_auf.checkpoints.weights import ALIASES, BORROWED, RECOMPUTED, check_weights
from sglang_auf.errors import CardError
from sglang_auf.files import CONFIG, read_json, weight_files
from sglang_auf.models.config import DrafterConfig
from sglang_auf.models.dflash import Drafter
from sglang_auf.settings import complaints


def load_drafter(path: Path) -> Drafter:
    """The drafter in directory `path`, in float32 and on the CPU, whatever float type its weights are stored in.

    Training continues from float32; run the drafter under autocast to compute in bfloat16, as training does. Raises
    CardError for a drafter that SGLang would compute in another way than this module does, and for any weight that is
    missing, unknown, misshapen or not finite.
    """
    content = read_json(path / CONFIG, CardError)
    check_weights(path, content)
    try:
        drafter = Drafter(DrafterConfig.from_checkpoint(content))
    except ValidationError as error:
        raise CardError(
            f"{path / CONFIG}: {complaints(error, DrafterConfig)}", "the sizes of a drafter", "export the drafter again"
        ) from error
    weights = {}
    for file in weight_files(path, CardError):
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
