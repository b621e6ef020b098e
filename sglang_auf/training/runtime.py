"""The process that trains: its Accelerator, the signals that stop it, and the memory that it gives back."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, ProjectConfiguration, gather_object
from torch.distributed.fsdp import MixedPrecisionPolicy

from sglang_auf.errors import ConfigError, DataError, TrainingError
from sglang_auf.training.recipe import Recipe

COMPILED_PRODUCTS = 128
"""On a CPU. A judgement: the layers of a micro-batch should share them, and few of other lengths should be kept."""


@contextmanager
def accelerated(recipe: Recipe, out: Path) -> Iterator[Accelerator]:
    """The Accelerator of a run in directory `out`, which ends with the run.

    After an error the process group of several ranks is left as it is. NCCL would first wait for the other ranks, which
    wait for this one until the timeout. The process must end with its error (`end_at_once`), and the launcher ends the
    others.
    """
    accelerator = make_accelerator(recipe, out)
    waits = accelerator.num_processes == 1
    try:
        yield accelerator
        waits = True
    finally:
        if waits:
            accelerator.end_training()
        else:
            for tracker in accelerator.trackers:
                tracker.finish()
        AcceleratorState._reset_state(True)  # another run in this process may have another precision


def make_accelerator(recipe: Recipe, out: Path) -> Accelerator:
    """Processes, device, precision and trackers of a run in directory `out`."""
    # Buffers are the target's frozen tables, which need not be sent to the other ranks in every step. No parameter is
    # unused: but DDP would otherwise group gradients anew after its first step, and where a gradient lies in a group
    # decides in which order three or more ranks are added. A resumed run would be rounded otherwise in its first step.
    ddp = DistributedDataParallelKwargs(
        broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=True
    )
    # The other ranks wait while the first one evaluates and saves.
    process_group = InitProcessGroupKwargs(timeout=timedelta(hours=1))
    accelerator = Accelerator(
        mixed_precision="bf16" if recipe.precision == "bf16" else "no",
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out)),
        kwargs_handlers=[ddp, process_group],
    )
    if recipe.precision == "bf16" and accelerator.distributed_type == DistributedType.FSDP:
        # accelerate would also add gradients, over micro-batches and ranks, and round the sums of the loss in bf16.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    if not accelerator.is_main_process:
        logging.getLogger("sglang_auf").setLevel(logging.ERROR)
    return accelerator


def require_same_rows(sha256: str) -> None:
    """Raises DataError on every rank where one read other rows: the others would wait for batches that it has not."""
    if len(read := set(gather_object([sha256]))) > 1:
        raise DataError(
            f"{len(read)} kinds of rows on the ranks",
            "the same rows on each",
            "give every machine the same data, and --out on a file system that they share",
        )


def check_launch(recipe: Recipe, accelerator: Accelerator) -> None:
    """Raises ConfigError where the recipe cannot be trained by the processes that were launched."""
    ranks = accelerator.num_processes
    if recipe.batch.micro_batches % ranks:
        raise ConfigError(
            f"batch.micro_batches {recipe.batch.micro_batches} on {ranks} ranks",
            "a multiple of the number of ranks",
            f"--set batch.micro_batches={math.ceil(recipe.batch.micro_batches / ranks) * ranks}, or other ranks",
        )
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    if (version := accelerator.state.fsdp_plugin.fsdp_version) != 2:
        raise ConfigError(
            f"FSDP version {version}",
            "version 2, the one that this trainer is tested with",
            "accelerate launch --fsdp_version 2",
        )
    if recipe.optimiser.name == "muon":
        raise ConfigError(
            "optimiser muon under FSDP",
            "complete matrices on every rank, as muon orthogonalises them",
            "train with DDP (a drafter is small), or --set optimiser.name=adamw --set optimiser.muon_lr=null",
        )


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list, so that the run can save and end between two steps.

    Further SIGTERMs change nothing: launchers and service managers send several, and the checkpoint is not saved yet. A
    second SIGINT, which a human sends, ends the process at once.
    """
    caught: list[int] = []

    def catch(number: int, frame: object) -> None:
        caught.append(number)
        if number == signal.SIGINT:
            signal.signal(number, before[signal.SIGINT])

    if threading.current_thread() is not threading.main_thread():  # Python sets handlers in the main thread only
        yield caught
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def limit_compiled_products() -> None:
    """Let oneDNN keep the code of COMPILED_PRODUCTS products instead of 1,024, unless the environment sets a number.

    oneDNN compiles one product for each shape, and batches have all lengths. It reads the variable at its first
    product, so this must be called before.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(COMPILED_PRODUCTS))


def give_back_free_memory() -> None:
    """Return freed memory that the C library keeps to the system, where it can do so (glibc).

    Batches of all lengths leave holes in its heap that later batches do not fit: a run on a CPU grew from 2.5 to 6 GiB
    in its first 200 steps.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Parts of what CUDA, torch's allocator on a CPU and cuBLAS say, where torch raises no error of its own for it."""


def out_of_memory(problem: Exception) -> bool:
    """Whether an allocation failed, on a device or on the host."""
    known = isinstance(problem, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(problem, RuntimeError) and any(said in str(problem) for said in NO_MEMORY))


def memory_error(problem: Exception, recipe: Recipe, checkpoint: Path | None) -> TrainingError:
    """What the user reads of it. problem: with the notes of what was being done. checkpoint: the last one, if any."""
    doing = ", in ".join(getattr(problem, "__notes__", ["the start"]))
    reason = str(problem).strip().partition("\n")[0] or type(problem).__name__
    batch = recipe.batch
    lower = "lower batch.batch_tokens, then batch.anchors_per_row"
    if checkpoint is None:
        remedy = f"{lower}; there is no checkpoint yet"
    else:
        remedy = f"the same command goes on from {checkpoint.name}; to {lower}, begin another run with another --out"
    if not batch.recompute:
        remedy = f"--set batch.recompute=true needs far less and changes no number; {remedy}"
    return TrainingError(
        f"no memory left for {doing} ({reason})",
        f"memory for micro-batches of up to {batch.batch_tokens} tokens (batch.batch_tokens) with up to "
        f"{batch.anchors_per_row} anchors a row (batch.anchors_per_row), which `sglang-auf plan` counts for a GPU",
        remedy,
    )
