"""Export a trained drafter: a checkpoint of a training run, written as SGLang loads it (checkpoints/writing.py)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file

from sglang_auf.checkpoints import draft_vocabulary
from sglang_auf.checkpoints.card import Adaptation, DrafterCard, MeasuredTau
from sglang_auf.checkpoints.draft_vocabulary import DraftVocabulary
from sglang_auf.checkpoints.prepare import resolve_target
from sglang_auf.checkpoints.target_facts import TargetFacts
from sglang_auf.checkpoints.target_sources import TARGET_SOURCES
from sglang_auf.checkpoints.writing import RECIPE, write_drafter
from sglang_auf.errors import CardError, TargetError
from sglang_auf.files import CONFIG, HUB_ID, WEIGHTS, find_model, listing, read_json
from sglang_auf.models.config import DrafterConfig
from sglang_auf.settings import Thinking
from sglang_auf.training.checkpointer import BEST, STATE, Checkpoints, RunState, no_better_than_start, read_state
from sglang_auf.training.recipe import Recipe, parse_recipe
from sglang_auf.training.run_directory import RUN

logger = logging.getLogger(__name__)


def export_checkpoint(
    run: Path,
    out: Path,
    *,
    target: str | None = None,
    tau: MeasuredTau | None = None,
    adapted: Adaptation | None = None,
    vocabulary: DraftVocabulary | None = None,
    force: bool = False,
) -> Path:
    """Export the best checkpoint of a training run (its latest if none was evaluated), or the checkpoint `run` itself.

    target: directory, hub id or prepared name of the target, None for what the recipe names. tau: None for that of the
    run's evaluation. Returns `out`. The rest is as for `export_drafter`, which says what is raised; besides, CardError
    for a target that it was not trained for or a run without checkpoint.
    """
    checkpoint = _checkpoint_of(run)
    state = read_state(checkpoint)
    if fault := _unfinished(run, state):
        logger.warning("%s: %s", run, fault)
    recipe = parse_recipe(state.recipe, f"of {checkpoint}")
    revision = None if target else recipe.target_revision
    place = find_model(resolve_target(target or recipe.target), ("*.json", "*.jinja"), TargetError, revision)
    facts = TargetFacts.of(place)
    if facts.config_hash != state.target_config_hash:
        raise CardError(
            f"{checkpoint}, trained for another target than {place}",
            f"the target of its recipe, {recipe.target}",
            "name that target with --target",
        )
    if state.target_weights is not None:  # otherwise an earlier version began the run, and only today's are known
        facts = replace(facts, revision=state.target_revision, chat_template_hash=state.chat_template_hash)
    if fault := no_better_than_start((state.evaluation or {}).get("tau"), state.start_tau):
        logger.warning("%s: %s", checkpoint, fault)
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
        trained_for=facts,
        objective=recipe.objective.description,
        thinking=recipe.data.thinking,
        max_length=recipe.data.max_length,
        recipe=state.recipe,
        tau=tau or _tau(state, recipe),
        adapted=adapted,
        vocabulary=vocabulary,
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
    trained_for: TargetFacts | None = None,
    objective: str | None,
    thinking: Thinking,
    max_length: int | None,
    recipe: Mapping[str, Any],
    tau: MeasuredTau | None = None,
    adapted: Adaptation | None = None,
    vocabulary: DraftVocabulary | None = None,
    provenance: Mapping[str, Any] | None = None,
    target_name: str | None = None,
    force: bool = False,
) -> Path:
    """Write the drafter with state dict `state` to the new directory `out`, checked against its target.

    trained_for: the target as training saw it, None where it is as target_dir is now; what differs is logged.
    objective: the training loss. thinking, max_length, adapted: as in DrafterCard. recipe: plain YAML values.
    vocabulary: the tokens that it may draft, None for all. provenance: what the trainer knows (hashes of the data,
    command of the run), put beside what is known of this export. target_name: the target's hub id where target_dir is
    no hub cache. force: replace an earlier export.

    Returns `out`; what may lower tau is logged. Raises CardError for weights that are not this drafter's, not finite
    or not fit for the target, ConfigError when `out` cannot be written; then `out` is as it was.
    """
    facts = trained_for or TargetFacts.of(target_dir)
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
        adapted=adapted,
    )
    texts = {RECIPE: yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)}
    if vocabulary is not None:
        texts[draft_vocabulary.FILE] = draft_vocabulary.written(vocabulary)
    origin = {"training": dict(provenance or {})}
    for warning in write_drafter(out, config.to_checkpoint(), state, card, origin, texts, str(target_dir), force):
        logger.warning("%s: %s", out, warning)
    return out


def _checkpoint_of(run: Path) -> Path:
    if (run / STATE).is_file():
        return run
    if not run.is_dir():
        raise CardError(f"no directory {run}", "the directory of a training run, or of one of its checkpoints")
    found = run / BEST if (run / BEST).is_dir() else Checkpoints(run, keep_last=1).latest()
    if found is None:
        raise CardError(
            f"no checkpoint in {run} (it holds: {listing(run)})",
            "the directory of a training run, or of one of its checkpoints",
        )
    return found.resolve()


def _unfinished(run: Path, exported: RunState) -> str:
    """What to warn of where a run has not done all its steps; "" for a finished one, and for a single checkpoint."""
    steps = read_json(run / RUN, CardError).get("steps") if (run / RUN).is_file() else None
    latest = Checkpoints(run, keep_last=1).latest()
    done = None if latest is None else read_state(latest).step
    if steps is None or done is None or done >= steps:
        return ""
    tau = (exported.evaluation or {}).get("tau")
    which = "the latest checkpoint, which was not evaluated" if tau is None else f"the one with held-out tau {tau:.4f}"
    return f"not finished, step {done} of {steps} is saved; exported is {which}, of step {exported.step}"


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
    if target in TARGET_SOURCES:
        return TARGET_SOURCES[target].hub_id
    return target if HUB_ID.fullmatch(target) and not Path(target).exists() else None
