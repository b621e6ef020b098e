"""How a recipe is given to Hugging Face accelerate."""

from __future__ import annotations

import logging
import math
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, ProjectConfiguration

from sglang_auf.errors import ConfigError
from sglang_auf.training.recipe import Recipe


def make_accelerator(recipe: Recipe, out: Path) -> Accelerator:
    """Processes, device, precision and trackers of a run in directory `out`."""
    # Buffers are the target's frozen tables: nothing to send around in every step.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    # The other ranks wait while the first one evaluates and saves.
    process_group = InitProcessGroupKwargs(timeout=timedelta(hours=1))
    accelerator = Accelerator(
        mixed_precision="bf16" if recipe.precision == "bf16" else "no",
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out)),
        kwargs_handlers=[ddp, process_group],
    )
    if not accelerator.is_main_process:
        logging.getLogger("sglang_auf").setLevel(logging.ERROR)
    return accelerator


def check_launch(recipe: Recipe, accelerator: Accelerator) -> None:
    """Raises ConfigError where the recipe cannot be trained by the processes that were launched."""
    ranks = accelerator.num_processes
    if recipe.batch.micro_batches % ranks:
        raise ConfigError(
            f"batch.micro_batches {recipe.batch.micro_batches} on {ranks} ranks",
            "a multiple of the number of ranks",
            f"--set batch.micro_batches={math.ceil(recipe.batch.micro_batches / ranks) * ranks}, or other ranks",
        )
    if accelerator.distributed_type == DistributedType.FSDP and recipe.optimiser.name == "muon":
        raise ConfigError(
            "optimiser muon under FSDP",
            "whole matrices on every rank, which muon orthogonalises",
            "train with DDP (a drafter is small), or --set optimiser.name=adamw --set optimiser.muon_lr=null",
        )
