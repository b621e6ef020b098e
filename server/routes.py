"""The routes this project adds to SGLang's app under /v1/auf, behind the same API key as SGLang's own.

What operators are warned of by the same figures stands in /metrics too, under the names of `hooks.metrics.READ`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, HTTPException

from server.drafters import LOOKS, BusyError, Drafters, Measured
from server.preflight import ServedModel
from server.schemas import (
    AcceptanceReply,
    CardReply,
    LoadReply,
    MeasuredReply,
    Recording,
    RecordingReply,
    SwapReply,
    SwapRequest,
)
from sglang_auf.env import DRAFT_VOCABULARY, tree_nodes
from sglang_auf.errors import AufError
from sglang_auf.hooks import metrics
from sglang_auf.hooks.metrics import Figure
from sglang_auf.recording.recorder import Recorder

PLAIN = "this server decodes plainly (--plain): it has no drafter, so there is no {what}"
NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"description": "The server decodes plainly."}}
NO_SWAP: dict[int | str, dict[str, Any]] = {
    400: {"description": "No drafter that can take the running one's place. That one goes on."},
    404: {"description": "The server decodes plainly, or its profile does not say management: true."},
    409: {"description": "Another swap runs."},
}


def auf_router(
    served: ServedModel, closed_because: Callable[[], str | None], recorder: Recorder | None = None
) -> APIRouter:
    """closed_because: why no tokens are given out right now, or None. recorder: None where nothing is recorded."""
    from sglang.srt.utils.auth import AuthLevel, auth_level

    router = APIRouter(prefix="/v1/auf", tags=["auf"])
    started = time.time()
    drafters = None if served.speculation is None else Drafters(served.speculation)
    add_readers(served.model, drafters, recorder)

    @router.get("/acceptance", responses=NOT_FOUND)
    async def acceptance() -> AcceptanceReply:
        """Tau, alpha_k and their counts since the start and over the last finished requests."""
        if drafters is None:
            raise HTTPException(404, PLAIN.format(what="acceptance"))
        return AcceptanceReply(
            model=served.model,
            block_size=drafters.running.block_size,
            swap=swap_of(drafters),
            **metrics.TOTALS.snapshot(),
        )

    @router.get("/card", responses=NOT_FOUND)
    async def card() -> CardReply:
        """What the drafter was trained for, what the target is, and what of it does not match."""
        if drafters is None:
            raise HTTPException(404, PLAIN.format(what="drafter card"))
        from sglang_auf.speculative.algorithm import verifies_trees

        weights = await drafters.weights()  # before anything else is read: a swap may come while it waits
        checked = drafters.running.checked
        tree = verifies_trees(drafters.running.device, drafters.running.is_mrope)
        listed = checked.vocabulary if DRAFT_VOCABULARY.is_on() else None
        return CardReply(
            model=served.model,
            drafter=drafters.running.drafter,
            block_size=drafters.running.block_size,
            tree=tree,
            tree_nodes=tree_nodes() if tree else None,
            draft_vocabulary=None if listed is None else len(listed.tokens),
            weights=weights,
            card=checked.card,
            unknown=checked.card.unknown,
            warnings=list(checked.warnings),
            target=served.target,
            swap=swap_of(drafters),
        )

    @router.post("/drafter", responses=NO_SWAP)
    @auth_level(AuthLevel.ADMIN_OPTIONAL)  # type: ignore[untyped-decorator]
    async def drafter(wanted: SwapRequest) -> SwapReply:
        """Put another drafter in the place of the running one, and go back to that one by itself if tau falls."""
        if drafters is None:
            raise HTTPException(404, PLAIN.format(what="drafter to swap"))
        try:
            await drafters.replace(wanted.path)
        except BusyError as error:
            raise HTTPException(409, str(error)) from error
        except AufError as error:
            raise HTTPException(400, str(error)) from error
        return swap_of(drafters)

    @router.get("/load")
    async def load() -> LoadReply:
        """Running and waiting requests, and tokens made so far. A server without a drafter has this route too."""
        waiting, snapshots = await _waiting()
        return LoadReply(
            model=served.model,
            started=started,
            closed_because=closed_because(),
            running=sum(snapshot.num_running_reqs for snapshot in snapshots),
            queued=sum(snapshot.num_waiting_reqs for snapshot in snapshots),
            silence=_silence(waiting, snapshots),
            generated_tokens=metrics.TOTALS.generated,
        )

    @router.get("/recording")
    async def recording() -> RecordingReply:
        """What this server keeps of its answers for training: token ids, where, how many and how long."""
        kept = None if recorder is None else Recording(**recorder.snapshot())
        return RecordingReply(model=served.model, recording=kept)

    return router


def add_readers(model: str, drafters: Drafters | None, recorder: Recorder | None) -> None:
    """Have /metrics say for how long the engine is silent, which drafter runs, and what became of answers to record.

    Each is asked by itself, so that one that fails takes no other along.
    """

    named = {"model_name": model}

    async def silence() -> list[Figure]:
        return [Figure("auf_silence_seconds", _silence(*await _waiting()), named)]

    metrics.READERS.append(silence)
    if drafters is not None:

        async def drafter() -> list[Figure]:
            weights = drafters.weights_so_far()
            if weights is None:  # a scrape does not wait for gigabytes from a disk, nor do the other series
                return []
            told = {"generation": str(drafters.swap.generation), "weights": weights}
            return [Figure("auf_drafter_info", 1, named | told)]

        metrics.READERS.append(drafter)
    if recorder is not None:

        async def recording() -> list[Figure]:
            kept = recorder.snapshot()
            return [
                Figure("auf_recording_error", kept["error"] is not None, named),
                Figure("auf_recorded_total", kept["recorded"], named),
                *(
                    Figure("auf_record_dropped_total", count, named | {"reason": reason})
                    for reason, count in kept["dropped"].items()
                ),
            ]

        metrics.READERS.append(recording)


async def _waiting() -> tuple[Iterable[Any], Iterable[Any]]:
    """SGLang's records of the requests that are not answered, and the last load that each scheduler said."""
    from sglang.srt.entrypoints.http_server import get_global_state

    manager = get_global_state().tokenizer_manager
    snapshots = await manager.get_loads(include=["core"])
    return manager.rid_to_state.values(), snapshots


def _silence(requests: Iterable[Any], snapshots: Iterable[Any]) -> float:
    """Seconds without a step while a request waits, as LoadReply has them. A scheduler says its load after each step.

    requests, snapshots: of `_waiting`.
    """
    now = time.perf_counter()
    waited = max((now - float(request.time_stats.created_time) for request in requests), default=0.0)
    said = max((float(snapshot.timestamp) for snapshot in snapshots), default=0.0)
    return max(0.0, min(waited, time.time() - said))


def swap_of(drafters: Drafters) -> SwapReply:
    swap = drafters.swap
    return SwapReply(
        generation=swap.generation,
        path=str(drafters.running.checked.path),
        state=swap.state,
        other=None if swap.other is None else str(swap.other),
        before=_measured(swap.before),
        after=_measured(swap.after),
        watched=drafters.watched,
        watches=LOOKS[-1],
    )


def _measured(tau: Measured | None) -> MeasuredReply | None:
    return None if tau is None else MeasuredReply(**asdict(tau))
