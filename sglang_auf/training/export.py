"""A trained drafter as SGLang loads it: config.json, bf16 weights, the card, the recipe and where it came from.

SGLang skips weights it does not know and leaves those it does not find as they were allocated, so everything is
checked before the directory appears under its name: names, shapes and numbers before they are written, then the files
as they lie on the disk, the card against the target included.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sglang_auf.checkpoints.card import CARD_NAME, DrafterCard, MeasuredTau, Thinking, check_drafter, load_card
from sglang_auf.checkpoints.prepare import resolve
from sglang_auf.checkpoints.target_facts import TargetFacts
from sglang_auf.checkpoints.target_sources import RECIPES
from sglang_auf.checkpoints.weights import check_weights, expected_weights
from sglang_auf.errors import CardError, ConfigError, TargetError
from sglang_auf.files import HUB_ID, find_model, listing, read_json
from sglang_auf.models.config import DrafterConfig
from sglang_auf.provenance import of_this_run, sha256_of
from sglang_auf.training.checkpointer import BEST, STATE, Checkpoints, RunState, read_state
from sglang_auf.training.recipe import Recipe, parse_recipe
from sglang_auf.training.run_directory import RUN

logger = logging.getLogger(__name__)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
RECIPE = "recipe.yaml"
PROVENANCE = "provenance.json"
WRITTEN = frozenset({CONFIG, WEIGHTS, CARD_NAME, RECIPE, PROVENANCE})


def export_checkpoint(run: Path, out: Path, *, target: str | None = None, force: bool = False) -> Path:
    """Export the best checkpoint of a training run (its latest if none was evaluated), or the checkpoint `run` itself.

    target: directory, hub id or prepared name of the target, None for what the recipe names. Returns `out`. Raises as
    `export_drafter` does, and CardError for a target that it was not trained for or a run without checkpoint.
    """
    checkpoint = _checkpoint_of(run)
    state = read_state(checkpoint)
    recipe = parse_recipe(state.recipe, f"of {checkpoint}")
    revision = None if target else recipe.target_revision
    place = find_model(resolve(target or recipe.target), ("*.json", "*.jinja"), TargetError, revision)
    if TargetFacts.of(place).config_hash != state.target_config_hash:
        raise CardError(
            f"{checkpoint}, trained for another target than {place}",
            f"the target of its recipe, {recipe.target}",
            "name that target with --target",
        )
    try:
        weights = load_file(checkpoint / WEIGHTS)
    except (OSError, SafetensorError) as problem:
        raise CardError(
            f"{checkpoint / WEIGHTS} is damaged ({problem})", "an undamaged checkpoint", "export another one"
        ) from problem
    return export_drafter(
        weights,
        DrafterConfig.from_checkpoint(read_json(checkpoint / CONFIG, CardError)),
        out,
        target_dir=place,
        objective=recipe.objective.name,
        thinking=recipe.data.thinking,
        max_length=recipe.data.max_length,
        recipe=state.recipe,
        tau=_tau(state, recipe),
        provenance=_trained(checkpoint, state),
        target_name=_hub_id(recipe.target),
        force=force,
    )


def export_drafter(
    state: Mapping[str, torch.Tensor],
    config: DrafterConfig,
    out: Path,
    *,
    target_dir: Path,
    objective: str | None,
    thinking: Thinking | None,
    max_length: int | None,
    recipe: Mapping[str, Any],
    tau: MeasuredTau | None = None,
    provenance: Mapping[str, Any] | None = None,
    target_name: str | None = None,
    force: bool = False,
) -> Path:
    """Write the drafter with state dict `state` to the new directory `out`, checked against its target.

    objective: the training loss. thinking, max_length: as in DrafterCard. recipe: plain YAML values. provenance: what
    the trainer knows (hashes of the data, command of the run), put beside what is known of this export. target_name:
    the target's hub id where target_dir is no hub cache. force: replace an earlier export.

    Returns `out`; what may lower tau is logged. Raises CardError for weights that are not this drafter's, not finite
    or not fit for the target, ConfigError when `out` cannot be written; then `out` is as it was.
    """
    facts = TargetFacts.of(target_dir)
    card = DrafterCard(
        target_name=target_name or facts.name,
        target_revision=facts.revision,
        target_config_hash=facts.config_hash,
        target_layer_ids=config.target_layer_ids,
        mask_token_id=config.mask_token_id,
        block_size=config.block_size,
        head=config.head,
        thinking=thinking,
        chat_template_hash=facts.chat_template_hash,
        max_length=max_length,
        objective=objective,
        recipe=RECIPE,
        tau=tau,
    )
    texts = {RECIPE: yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)}
    origin = {"training": dict(provenance or {})}
    for warning in write_drafter(out, config.to_checkpoint(), state, card, origin, texts, str(target_dir), force):
        logger.warning("%s: %s", out, warning)
    return out


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
    """Write and check a drafter directory, complete or not at all; returns what may lower tau, in sentences.

    config: config.json. origin: joins provenance.json. texts: further files, by name. target: directory or hub id to
    check against; None checks the drafter alone. Raises as `export_drafter` does.
    """
    _check_free(out, force)
    tensors = servable(weights, config)
    warnings = [f"{name} is all zeros: untrained" for name, tensor in tensors.items() if not tensor.any()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Beside the final place, so that the rename stays inside one file system.
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.making-", dir=out.parent) as scratch:
            made = Path(scratch) / out.name
            made.mkdir()
            save_file(tensors, made / WEIGHTS, metadata={"format": "pt"})
            _write_json(made / CONFIG, config)
            (made / CARD_NAME).write_text(card.model_dump_json(indent=2, exclude={"derived"}) + "\n", encoding="utf-8")
            for name, text in texts.items():
                (made / name).write_text(text, encoding="utf-8")
            hashes = sha256_of(sorted(made.iterdir()))
            _write_json(made / PROVENANCE, {**of_this_run(), **origin, "files": hashes})
            for file in made.iterdir():
                file.chmod(0o644)  # safetensors writes 0600, which a server under another user could not read
            warnings += _check_written(made, config, tensors, target)
            if out.exists():
                out.rename(Path(scratch) / "replaced")
            made.rename(out)
    except (OSError, SafetensorError) as problem:
        raise ConfigError(
            f"writing {out} failed: {problem}",
            f"a writable place with {sum(tensor.nbytes for tensor in tensors.values()) / 1e6:.0f} MB free",
            "free space or choose another directory, then run it again",
        ) from problem
    return warnings


def servable(weights: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
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
    _refuse(faults, f"the {len(expected)} weights that config.json speaks of, as floating-point numbers")
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


def _checkpoint_of(run: Path) -> Path:
    if (run / STATE).is_file():
        return run
    found = run / BEST if (run / BEST).is_dir() else Checkpoints(run, keep_last=1).latest()
    if found is None:
        raise CardError(
            f"no checkpoint in {run} (it holds: {listing(run)})",
            "the directory of a training run, or of one of its checkpoints",
        )
    return found.resolve()


def _tau(state: RunState, recipe: Recipe) -> MeasuredTau | None:
    """Tau of the evaluation at the step of the checkpoint, if there was one."""
    tau = (state.evaluation or {}).get("tau")
    if tau is None:
        return None
    walked = f"greedy walk over the answers of {recipe.data.held_out} conversations kept from training"
    return MeasuredTau(value=tau, kind="held-out", on=f"{walked}, at step {state.step}")


def _trained(checkpoint: Path, state: RunState) -> dict[str, Any]:
    """The state of the run at this checkpoint, and its run.json (data, versions, commands) where it exists."""
    run = checkpoint.parent.parent / RUN
    return {
        **state.model_dump(mode="json", exclude={"recipe", "format", "best_step", "best_tau"}),
        **({"run": read_json(run, CardError)} if run.is_file() else {}),
    }


def _hub_id(target: str) -> str | None:
    """The hub id of a target that a recipe names by its hub id or by its prepared name."""
    if target in RECIPES:
        return RECIPES[target].hub_id
    return target if HUB_ID.fullmatch(target) and not Path(target).exists() else None


def _refuse(faults: list[str], expected: str) -> None:
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CardError(
            f"a drafter with {'; '.join(faults[:5])}{more}", expected, "take another checkpoint, or train it again"
        )


def _check_free(out: Path, force: bool) -> None:
    """Raises ConfigError where something would be overwritten that is not ours to overwrite."""
    if not out.exists():
        return
    if not out.is_dir() or not all((out / name).is_file() for name in (CONFIG, WEIGHTS, CARD_NAME, PROVENANCE)):
        raise ConfigError(
            f"{out} exists and is no export", "a directory that does not exist", "choose another directory"
        )
    if foreign := sorted(entry.name for entry in out.iterdir() if entry.name not in WRITTEN):
        raise ConfigError(
            f"{out} holds {', '.join(foreign)} beside an export",
            "an export alone",
            "move these away, or choose another",
        )
    if not force:
        raise ConfigError(
            f"{out} holds an earlier export", "a new directory", "choose another, or replace it with --force"
        )


def _check_written(
    made: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], target: str | None
) -> list[str]:
    """Warnings. Raises CardError where the files are not what was meant, or the drafter does not fit the target."""
    stored = load_file(made / WEIGHTS)
    changed = [name for name in tensors if name not in stored or not torch.equal(stored[name], tensors[name])]
    if changed or stored.keys() != tensors.keys() or read_json(made / CONFIG, CardError) != json.loads(_json(config)):
        raise CardError(
            f"{CONFIG} or {WEIGHTS} read back from {made.parent.parent} differ from what was written "
            f"({', '.join(changed) or 'names'})",
            "a disk that keeps what is written",
            "write to another disk",
        )
    if target is not None:
        return list(check_drafter(str(made), target).warnings)
    load_card(made)
    return check_weights(made, config)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(_json(content), encoding="utf-8")


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
