"""Write a drafter as SGLang loads it: config.json, bf16 weights, the card, and where it comes from.

SGLang skips weights it does not know and leaves those it does not find uninitialised, so everything is checked before
the directory appears under its name: names, shapes and numbers before they are written, then the files as they
were read back, the card against the target included.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sglang_auf.checkpoints.card import CARD_NAME, DrafterCard, check_drafter, load_card
from sglang_auf.checkpoints.weights import check_weights, expected_weights
from sglang_auf.errors import CardError, ConfigError
from sglang_auf.files import CONFIG, PROVENANCE, WEIGHTS, whole_directory
from sglang_auf.provenance import of_this_run, sha256_of

RECIPE = "recipe.yaml"
WRITTEN = frozenset({CONFIG, WEIGHTS, CARD_NAME, RECIPE, PROVENANCE})
"""What a drafter's directory may hold. One that holds what is not written again is never replaced."""


def write_drafter(
    out: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    card: DrafterCard,
    origin: Mapping[str, Any],
    texts: Mapping[str, str],
    target: str | None,
    force: bool = False,
) -> list[str]:
    """Write and check a drafter directory, completely or not at all; returns what may lower tau, in sentences.

    config: config.json. origin: is added to provenance.json. texts: further files, name -> content. target: directory
    or hub id to check against, None to check the drafter alone. force: replace an earlier drafter of ours.

    Raises CardError for weights that are not this drafter's, not finite or not fit for the target, ConfigError when
    `out` cannot be written; then `out` is unchanged.
    """
    _check_free(out, WRITTEN | texts.keys(), force)
    tensors = servable_weights(weights, config)
    warnings = [f"{name} is all zeros: untrained" for name, tensor in tensors.items() if not tensor.any()]
    try:
        with whole_directory(out) as made:
            save_file(tensors, made / WEIGHTS, metadata={"format": "pt"})
            _write_json(made / CONFIG, config)
            left_out = {"derived", *([] if card.adapted else ["adapted"])}  # earlier versions know no `adapted`
            (made / CARD_NAME).write_text(card.model_dump_json(indent=2, exclude=left_out) + "\n", encoding="utf-8")
            for name, text in texts.items():
                (made / name).write_text(text, encoding="utf-8")
            hashes = sha256_of(sorted(made.iterdir()))
            _write_json(made / PROVENANCE, {**of_this_run(), **origin, "files": hashes})
            for file in made.iterdir():
                file.chmod(0o644)  # safetensors writes 0600, which a server under another user could not read
            warnings += _check_written(made, config, tensors, target)
    except (OSError, SafetensorError) as problem:
        raise ConfigError(
            f"writing {out} failed: {problem}",
            f"a writable place with {sum(tensor.nbytes for tensor in tensors.values()) / 1e6:.0f} MB free",
            "free space or choose another directory, then run it again",
        ) from problem
    return warnings


def servable_weights(weights: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Copies of the weights in bf16 on the CPU. Raises CardError unless they are what SGLang reads for config.json."""
    expected = expected_weights(config)
    faults = [f"no {name}" for name in expected if name not in weights]
    faults += [f"{name}, which SGLang does not read" for name in weights if name not in expected]
    faults += [
        f"{name} of shape {list(weights[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    faults += [f"{name} of type {tensor.dtype}" for name, tensor in weights.items() if not tensor.is_floating_point()]
    _refuse(faults, f"the {len(expected)} weights that config.json asks for, as floating-point numbers")
    tensors = {name: weights[name].detach().to("cpu", torch.bfloat16, copy=True).contiguous() for name in expected}
    broken = {name: int((~tensor.isfinite()).sum()) for name, tensor in tensors.items()}
    _refuse(
        [
            f"{name} with {count} of {tensors[name].numel()} not finite in bfloat16"
            for name, count in broken.items()
            if count
        ],
        "finite numbers: every draft of such a drafter is noise",
    )
    return tensors


def _refuse(faults: list[str], expected: str) -> None:
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CardError(
            f"a drafter with {'; '.join(faults[:5])}{more}", expected, "take another checkpoint, or train it again"
        )


def _check_free(out: Path, written: AbstractSet[str], force: bool) -> None:
    """Raises ConfigError where something would be overwritten that is not ours, or that is and `force` is not set.

    written: names of the files that a drafter's directory may hold.
    """
    if not out.exists():
        return
    if not out.is_dir() or not all((out / name).is_file() for name in (CONFIG, WEIGHTS, CARD_NAME, PROVENANCE)):
        raise ConfigError(f"{out} exists and is no export", "a directory that does not exist")
    if foreign := sorted(entry.name for entry in out.iterdir() if entry.name not in written):
        raise ConfigError(
            f"{out} holds {', '.join(foreign)} beside an export",
            "an export alone",
            "move these away, or choose another directory",
        )
    if not force:
        raise ConfigError(
            f"{out} holds an earlier export", "a new directory", "choose another, or replace it with --force"
        )


def _check_written(
    made: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], target: str | None
) -> list[str]:
    """Warnings on the files in `made`.

    Raises CardError where they are not what was meant, or where SGLang could not serve them, or not with the target.
    """
    stored = load_file(made / WEIGHTS)
    changed = [name for name in tensors if name not in stored or not torch.equal(stored[name], tensors[name])]
    if changed or stored.keys() != tensors.keys():
        raise CardError(
            f"{WEIGHTS} read back from {made.parent} differs from what was written ({', '.join(changed) or 'names'})",
            "a disk that keeps what is written",
            "write to another disk",
        )
    if target is not None:
        return list(check_drafter(str(made), target).warnings)
    load_card(made)
    return check_weights(made, config)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
