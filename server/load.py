"""What the server is doing right now, for the live page and for anybody without Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable

from fastapi import APIRouter

from server.schemas import LoadReply
from sglang_auf.hooks import metrics


def load_router(model: str, closed_because: Callable[[], str | None]) -> APIRouter:
    """GET /v1/auf/load. closed_because: why no tokens are given out right now, or None (gate.py)."""
    router = APIRouter(prefix="/v1/auf", tags=["auf"])
    started = time.time()

    @router.get("/load")
    async def load() -> LoadReply:
        """Requests in hand and tokens made so far; a server without a drafter has it too."""
        from sglang.srt.entrypoints.http_server import get_global_state

        snapshots = await get_global_state().tokenizer_manager.get_loads(include=["core"])
        return LoadReply(
            model=model,
            started=started,
            closed_because=closed_because(),
            running=sum(snapshot.num_running_reqs for snapshot in snapshots),
            queued=sum(snapshot.num_waiting_reqs for snapshot in snapshots),
            generated_tokens=metrics.TOTALS.generated,
        )

    return router
