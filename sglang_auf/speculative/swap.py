"""Another drafter in the place of the running one, between two steps of the scheduler. No request is lost.

The message is a request to update weights from disk, for the drafter alone: it travels as SGLang's own does
(managers/io_struct.py, `UpdateWeightFromDiskReqInput`), the scheduler answers it between two steps, and a communicator
brings the answer back.

In the drafter's cache are keys and values that the old drafter computed. So the running requests go back to the queue
and are prefilled again, with what they have answered so far, and no cached prefix is used again. Both are SGLang's own
doing: a request is retracted whenever the pool is full. The target decides every token before and after, so no answer
depends on any of this. The old drafter stays in memory until it is known which of the two is to stay.
"""

from __future__ import annotations

import copy
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.managers.io_struct import (
    BaseReq,
    ContinueGenerationReqInput,
    PauseGenerationReqInput,
    UpdateWeightFromDiskReqInput,
    hook_custom_types,
)
from sglang.srt.runtime_context import get_parallel
from sglang.utils import TypeBasedDispatcher

from sglang_auf.errors import CardError, ConfigError
from sglang_auf.hooks.registry import Hook
from sglang_auf.speculative import seams

if TYPE_CHECKING:
    from sglang_auf.speculative.worker import Drafter

logger = logging.getLogger(__name__)

Action = Literal["swap", "take back", "keep"]


class DrafterReqInput(UpdateWeightFromDiskReqInput, kw_only=True):  # type: ignore[misc, call-arg]
    """To a scheduler: "swap" in the drafter in model_path, "take back" the former one, or "keep" the new one."""

    action: Action


class DrafterReqOutput(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """From a scheduler. message: why not. seconds: how long it took no step. requeued: requests prefilled again."""

    success: bool
    message: str = ""
    seconds: float = 0.0
    requeued: int = 0


def register() -> None:
    """Make the messages known to SGLang, in every process that sends or receives them. The plugin installs HOOKS."""
    hook_custom_types(DrafterReqInput, DrafterReqOutput)


# --- in the server's process ---


def add_communicator(_: None, manager: Any) -> None:
    """After `TokenizerControlMixin.init_communicators`."""
    manager.auf_drafter_communicator = FanOutCommunicator(manager._dispatch_to_scheduler, get_parallel().num_dp_ranks)
    manager._result_dispatcher += TypeBasedDispatcher(
        [(DrafterReqOutput, manager.auf_drafter_communicator.handle_recv)]
    )


async def ask(manager: Any, action: Action, path: str = "") -> DrafterReqOutput:
    """Have the scheduler of SGLang's tokenizer manager do it. Raises CardError when it did not: nothing has changed."""
    manager.auto_create_handle_loop()
    replies = await manager.auf_drafter_communicator(DrafterReqInput(action=action, model_path=path))
    for reply in replies:
        if not reply.success:
            raise CardError(f"the engine did not {action} the drafter: {reply.message}", "a drafter that it can load")
    found: DrafterReqOutput = replies[0]
    return found


# --- in the scheduler's process ---


def update_weights_from_disk(original: Any, updater: Any, recv_req: UpdateWeightFromDiskReqInput) -> Any:
    """Around `SchedulerWeightUpdaterManager.update_weights_from_disk`, which is called between two steps."""
    if not isinstance(recv_req, DrafterReqInput):
        return original(updater, recv_req)
    began = time.perf_counter()
    try:
        requeued = _act(recv_req.action, recv_req.model_path, updater.scheduler, updater.draft_worker)
    except Exception as error:  # whatever a checkpoint may break: the running drafter goes on
        logger.exception("the drafter stays as it was")
        return DrafterReqOutput(success=False, message=f"{type(error).__name__}: {error}")
    return DrafterReqOutput(success=True, seconds=time.perf_counter() - began, requeued=requeued)


def _act(action: Action, path: str, scheduler: Any, worker: Any) -> int:
    """Returns how many requests are prefilled again."""
    if str(worker.device) != "cpu":
        raise ConfigError(
            f"a swap on {worker.device}",
            "the CPU platform: captured CUDA graphs and SGLang's stacked K/V projection hold the old drafter's weights",
            "start a server with the new drafter, and stop this one",
        )
    if action == "keep":
        if worker.former is not None:
            release(worker.former)
        worker.former = None
        return 0
    running, former = worker.drafter, worker.former
    if action == "take back":
        if former is None:
            raise ConfigError("no former drafter", "one that is kept in memory until the verdict")
        new, kept = former, None
    else:
        new, kept = load(worker, path), former or running
    requeued = requeue(scheduler)
    worker.drafter, worker.former = new, kept
    if running is not kept:
        release(running)
    return requeued


def release(drafter: Drafter) -> None:
    """Let its memory be freed once nobody refers to it: forwards that the CPU platform replaced refer to their module.

    SGLang freezes the garbage collector after the start, which then never looks at such a circle.
    """
    for module in drafter.model.modules():
        vars(module).pop("forward", None)


def load(worker: Any, path: str) -> Drafter:
    """The drafter in a directory, of the running one's shape, loaded as SGLang loads a drafter at the start."""
    import torch
    from sglang.srt.layers.moe.utils import draft_model_build_scope
    from sglang.srt.speculative.spec_utils import draft_pp_context, draft_tp_context

    from sglang_auf.speculative.worker import Drafter

    runner = worker.draft_model_runner
    model, config = runner.model, runner.model_config
    runner.model_config = copy.copy(config)
    runner.model_config.model_path = path
    try:
        # The event loop runs in inference mode, whose tensors nothing outside of it may write to.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            draft_model_build_scope(),
            draft_pp_context(),
            draft_tp_context(worker.draft_parallel_layout),
        ):
            runner.load_model()
            return Drafter(runner.model, worker.head_of(Path(path)))
    finally:
        runner.model, runner.model_config = model, config


def requeue(scheduler: Any) -> int:
    """Send the running requests back, ahead of those that wait, and forget every prefix. Returns how many they are."""
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    queue, cache = scheduler.waiting_queue, scheduler.tree_cache
    waiting, limit, paused = len(queue), scheduler.max_queued_requests, scheduler._engine_paused
    scheduler.max_queued_requests = None  # who has been admitted is not turned away
    try:
        scheduler.pause_generation(PauseGenerationReqInput(mode="retract"))
        queue[:] = queue[waiting:] + queue[:waiting]
        cache.evict(EvictParams(num_tokens=cache.evictable_size()))
    finally:
        scheduler.max_queued_requests = limit
        if not paused:
            scheduler.continue_generation(ContinueGenerationReqInput(torch_empty_cache=False))
    return len(queue) - waiting


HOOKS = (
    Hook.on(seams.INIT_COMMUNICATORS, "AFTER", add_communicator),
    Hook.on(seams.UPDATE_FROM_DISK, "AROUND", update_weights_from_disk),
)
