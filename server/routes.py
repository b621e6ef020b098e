"""The routes this project adds to SGLang's app under /v1/auf, behind the same API key as SGLang's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, HTTPException

from server.schemas import AcceptanceReply, CardReply
from sglang_auf.checkpoints import draft_vocabulary
from sglang_auf.checkpoints.card import CheckedDrafter
from sglang_auf.checkpoints.target_facts import TargetFacts
from sglang_auf.hooks import metrics


@dataclass(frozen=True, slots=True)
class Speculation:
    """drafter: as the profile names it. checked: as found to fit the target. block_size: B as served."""

    drafter: str
    checked: CheckedDrafter
    block_size: int


@dataclass(frozen=True, slots=True)
class Served:
    """What a server serves. model: its name for clients. speculation: None when it decodes plainly."""

    model: str
    target: TargetFacts
    speculation: Speculation | None


PLAIN = "this server decodes plainly (--plain): it has no drafter, so there is no {what}"
NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"description": "The server decodes plainly."}}


def auf_router(served: Served) -> APIRouter:
    router = APIRouter(prefix="/v1/auf", tags=["auf"])

    @router.get("/acceptance", responses=NOT_FOUND)
    async def acceptance() -> AcceptanceReply:
        """Tau, alpha_k and their counts since the start and over the last finished requests."""
        if served.speculation is None:
            raise HTTPException(404, PLAIN.format(what="acceptance"))
        return AcceptanceReply(
            model=served.model, block_size=served.speculation.block_size, **metrics.TOTALS.snapshot()
        )

    @router.get("/card", responses=NOT_FOUND)
    async def card() -> CardReply:
        """What the drafter was trained for, what the target is, and what of it does not match."""
        if served.speculation is None:
            raise HTTPException(404, PLAIN.format(what="drafter card"))
        checked = served.speculation.checked
        listed = checked.vocabulary if draft_vocabulary.switched_on() else None
        return CardReply(
            model=served.model,
            drafter=served.speculation.drafter,
            block_size=served.speculation.block_size,
            draft_vocabulary=None if listed is None else len(listed.tokens),
            card=checked.card,
            unknown=checked.card.unknown,
            warnings=list(checked.warnings),
            target=served.target,
        )

    return router
