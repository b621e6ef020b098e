"""Checkpoints of a training run. Each is complete or absent; the last few and the best one are kept.

    RUN/checkpoints/step-00000400/   config.json and model.safetensors (float32): a drafter that load_drafter reads,
                                     state.json, optimiser/state.safetensors
    RUN/best                         a link to the checkpoint with the best tau

A checkpoint is written under a temporary name, brought to the disk (fsync) and renamed. All random numbers of a run
derive from its seed, the epoch and the conversation, so the step number restores them, the schedule and the position in
the data. Nothing here is a pickle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from sglang_auf.errors import TrainingError
from sglang_auf.files import (
    CONFIG,
    UNFINISHED,
    WEIGHTS,
    read_json,
    remove_unfinished,
    shown_size,
    sync,
    whole_directory,
)
from sglang_auf.settings import checked
from sglang_auf.training.text.split import Apart

Tensors = dict[str, torch.Tensor]

OPTIMISER = "optimiser/state.safetensors"
STATE = "state.json"
BEST = "best"
NEW_BEST = ".best.new"
NAME = re.compile(r"step-(\d{8})")
DRAFTER = "drafter."
"""Prefix of the drafter's weights in TrainingStep."""
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
UNDAMAGED = "an undamaged checkpoint"
DAMAGED_REMEDY = "remove this directory and run the same command again: it goes on from the checkpoint before it"


class RunState(BaseModel):
    """Where a run stands.

    step: optimiser steps done. recipe, data_sha256, target_config_hash, target_weights (feature_cache.py has how it is
    made): what the weights depend on. target_revision, chat_template_hash: as TargetFacts had them at the first start.
    ranks: number of processes. tokens: tokens trained on so far, prompts included. seconds: time spent in steps.
    evaluation: held-out figures at this step, if any. best_step, best_tau: step and tau of the best evaluation so far.
    start_tau: tau of the drafter that training began from, where that was evaluated. apart: as for split_held_out.

    A run that an earlier version began has no target_weights, nothing is known of its revision and template, and it
    keeps the rows that it trains on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    step: int = Field(ge=0)
    recipe: dict[str, Any]
    data_sha256: str
    target_config_hash: str
    target_weights: str | None = None
    target_revision: str | None = None
    chat_template_hash: str | None = None
    apart: Apart = "tokens"
    ranks: int = Field(ge=1)
    tokens: int = Field(ge=0)
    seconds: float = Field(ge=0)
    loss: float | None = None
    evaluation: dict[str, Any] | None = None
    best_step: int | None = None
    best_tau: float | None = None
    start_tau: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. best_step, best_tau, start_tau: as in RunState.

    signal: what stopped it before its last step, None where it is finished.
    """

    run: Path
    step: int
    steps: int
    best_step: int | None
    best_tau: float | None
    start_tau: float | None
    signal: int | None

    @property
    def exit_code(self) -> int:
        """0: finished. 128 + N: stopped by signal N."""
        return 128 + self.signal if self.signal else 0

    def __str__(self) -> str:
        """What the user reads."""
        if self.signal:
            return f"stopped after step {self.step} of {self.steps}; the same command goes on from there"
        best = "" if self.best_tau is None else f"; best held-out tau {self.best_tau:.3f} at step {self.best_step}"
        start = "" if self.start_tau is None else f"; {self.start_tau:.3f} before the first step"
        return f"{self.run}: {self.steps} steps{best}{start}"


class Checkpoints:
    """The checkpoints under one run directory. One process writes."""

    def __init__(self, run: Path, keep_last: int) -> None:
        self.run = run
        self.directory = run / "checkpoints"
        self.keep_last = keep_last

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending."""
        names = (NAME.fullmatch(entry.name) for entry in self.directory.glob("step-*"))
        return sorted(int(match[1]) for match in names if match)

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def require_space(self, size: int, steps: int) -> None:
        """Raises TrainingError where no space is free for the checkpoints, `size` bytes each, that are still to come.

        steps: those left; none saves more than one. What other programs write meanwhile cannot be known.
        """
        coming = max(0, min(most_at_once(self.keep_last) - len(self.steps()), steps))
        free = shutil.disk_usage(self.run).free
        if coming * size > free:
            raise TrainingError(
                f"{shown_size(free)} free at {self.run}",
                f"{shown_size(coming * size)} for {coming} checkpoints of {shown_size(size)}, still to come: a run "
                f"keeps the last {self.keep_last} (keep_last) and the best one, all of them while it writes another",
                "free space, or give an --out on a larger disk"
                + ("; --set keep_last=1 keeps fewer" if self.keep_last > 1 else ""),
            )

    def latest(self) -> Path | None:
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def clean(self) -> None:
        """Remove the checkpoints that a killed process left half-written or half-removed."""
        remove_unfinished(self.directory / "step-*")

    def write(self, config: Mapping[str, Any], weights: Tensors, optimiser: Tensors, state: RunState) -> Path:
        """Add the checkpoint of state.step, link it if it is the best, and remove those neither recent nor best.

        Raises TrainingError when it cannot be written; every earlier checkpoint then remains.
        """
        final = self.path(state.step)
        try:
            self.clean()
            with whole_directory(final) as draft:
                (draft / OPTIMISER).parent.mkdir()
                (draft / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
                (draft / STATE).write_text(state.model_dump_json(indent=2), encoding="utf-8")
                save_file(weights, draft / WEIGHTS, metadata={"format": "pt"})
                save_file(optimiser, draft / OPTIMISER)
                for file in (draft / WEIGHTS, draft / OPTIMISER):
                    file.chmod(0o644)  # safetensors writes 0600
            sync(self.run)
        except (OSError, SafetensorError) as problem:
            raise self._unwritten(state.step, weights, optimiser, problem) from problem
        if state.best_step == state.step:  # before the old best goes, so that the link never points at nothing
            self.link_best(state.step)
        self._prune(state.best_step)
        return final

    def link_best(self, step: int) -> None:
        """Point RUN/best at a checkpoint by one rename, so that the link exists at any time."""
        link = self.run / NEW_BEST
        link.unlink(missing_ok=True)
        link.symlink_to(self.path(step).relative_to(self.run))
        os.replace(link, self.run / BEST)
        sync(self.run)

    def _prune(self, best_step: int | None) -> None:
        for step in self.steps()[: -self.keep_last]:
            if step != best_step:
                path = self.path(step)
                doomed = path.with_name(f".{path.name}{UNFINISHED}removed")
                path.rename(doomed)  # removing takes time, and half a checkpoint must not have its name
                shutil.rmtree(doomed)

    def _unwritten(self, step: int, weights: Tensors, optimiser: Tensors, problem: Exception) -> TrainingError:
        size = sum(tensor.nbytes for tensor in (*weights.values(), *optimiser.values())) / 1e6
        kept = self.latest()
        return TrainingError(
            f"the checkpoint of step {step} could not be written to {self.directory} ({problem})",
            f"a writable directory with {size:.0f} MB free",
            "free space and run the same command again: "
            + (f"it goes on from {kept.name}, which is complete" if kept else "it starts from the beginning"),
        )


def most_at_once(keep_last: int) -> int:
    """Checkpoints on disk at most: the last ones, the best one, and the one that is being written."""
    return keep_last + 2


def no_better_than_start(tau: float | None, start: float | None) -> str:
    """Held-out tau of a checkpoint and of the drafter that training began from -> what to warn of; "" for nothing."""
    if tau is None or start is None or tau > start:
        return ""
    return f"held-out tau {tau:.4f}, no better than {start:.4f} of the drafter that training began from"


def read_state(checkpoint: Path) -> RunState:
    """Raises TrainingError when state.json is missing or damaged."""
    content = read_json(checkpoint / STATE, TrainingError)
    return checked(RunState, content, f"{checkpoint} is damaged: {STATE}", UNDAMAGED, DAMAGED_REMEDY, TrainingError)


def read_tensors(checkpoint: Path) -> tuple[Tensors, Tensors]:
    """(weights, optimiser state). Raises TrainingError for damaged files."""
    try:
        return load_file(checkpoint / WEIGHTS), load_file(checkpoint / OPTIMISER)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{checkpoint} is damaged ({error})", UNDAMAGED, DAMAGED_REMEDY) from error


def gather(step: nn.Module, optimisers: Sequence[torch.optim.Optimizer]) -> tuple[Tensors, Tensors]:
    """The drafter's weights and the optimisers' state by weight name ("layers.0.mlp.up_proj.weight/exp_avg").

    step: TrainingStep, as accelerate wrapped it. Every rank must call this; only rank 0 is sure to get anything.
    """
    state = get_optimizer_state_dict(step, tuple(optimisers), options=_WHOLE).get("state", {})
    named = {f"{name}/{key}": value for name, entries in state.items() for key, value in entries.items()}
    return gather_weights(step), _without_prefix(named)


def gather_weights(step: nn.Module) -> Tensors:
    """The drafter's weights alone, otherwise as `gather`."""
    return _without_prefix(get_model_state_dict(step, options=_WHOLE))


def restore(
    step: nn.Module, optimisers: Sequence[torch.optim.Optimizer], weights: Tensors, optimiser: Tensors, ranks: int
) -> None:
    """Load what `gather` returned. Every rank must call this; only rank 0's tensors count."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=ranks > 1)
    set_model_state_dict(step, {DRAFTER + name: value for name, value in weights.items()}, options=options)
    # The recipe sets the parameter groups; only the state of each weight is stored.
    fresh = get_optimizer_state_dict(step, tuple(optimisers), options=StateDictOptions(full_state_dict=True))
    for name, value in optimiser.items():
        weight, key = name.rsplit("/", 1)
        fresh["state"][DRAFTER + weight][key] = value
    set_optimizer_state_dict(step, tuple(optimisers), fresh, options=options)


def _without_prefix(tensors: Mapping[str, Any]) -> Tensors:
    return {name.removeprefix(DRAFTER): tensor.contiguous() for name, tensor in tensors.items()}
