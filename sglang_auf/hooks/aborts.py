"""The end of one request ends no other one, and no engine.

Ids: a client may choose the id of its request (`rid`), and when it leaves, SGLang's scheduler aborts every request
whose id begins with that id (managers/scheduler.py, `abort_request`): with the id "a", a sixteenth of all others.

Room: every verify step takes slots for two blocks ahead (speculative/dflash_info_v2.py), also the last one of an answer
that reaches the end of the context or of the KV pool. SGLang counts on less (mem_cache/allocation_sizing.py). With
blocks of more than 8 such a step writes past its request's row of the slot table, into the next request's on a GPU.
"""

from __future__ import annotations

import logging
from typing import Any

from sglang_auf.compat import Seam
from sglang_auf.hooks.registry import Hook, serves_auf

logger = logging.getLogger(__name__)

_MANAGER = "sglang.srt.managers.tokenizer_manager:TokenizerManager"

_SIZING = "sglang.srt.mem_cache.allocation_sizing"

SEAMS = (
    Seam(f"{_MANAGER}.init_running_status", "hooks.aborts", ("self",)),  # where rid_to_state is made
    *(
        Seam(f"{_SIZING}:{name}", "hooks.aborts", ())
        for name in ("get_alloc_page_size", "get_alloc_reserve_per_decode")
    ),
)


def abort_one(original: Any, manager: Any, rid: str = "", abort_all: bool = False) -> None:
    """Around `TokenizerManager.abort_request`. A request that cannot be aborted alone runs to its end."""
    if not abort_all and any(other != rid and other.startswith(rid) for other in manager.rid_to_state):
        logger.warning("request %r is not aborted: ids of other requests begin with its id", rid)
        return
    original(manager, rid, abort_all)


def room_behind_a_context(columns: int) -> int:
    """After `get_req_to_token_extra_context_len`: columns of the slot table behind those of a whole context."""
    return max(columns, _room_of_a_step()) if serves_auf() else columns


def end_with_the_pool(
    original: Any, allocator: Any, input_tokens: int, max_new_tokens: int, *, token_capacity: int, **more: Any
) -> int | None:
    """Around `BaseTokenToKVPoolAllocator.max_new_tokens_for_memory`, which says how many tokens the pool has room for.

    An answer ends (`length`) where the pool has no room for a step. Otherwise a request that is alone in a pool of
    hardly more than one context fails behind thousands of tokens. One token needs no step.
    """
    most: int | None = original(allocator, input_tokens, max_new_tokens, token_capacity=token_capacity, **more)
    if most is None or not serves_auf():
        return most
    return min(most, max(token_capacity - input_tokens - _room_of_a_step(), 1))


def _room_of_a_step() -> int:
    """Slots that a verify step may take behind the tokens that a request has."""
    from sglang.srt.mem_cache.allocation_sizing import get_alloc_page_size, get_alloc_reserve_per_decode

    return int(get_alloc_reserve_per_decode() + get_alloc_page_size() - 1)


HOOKS = (
    Hook(f"{_MANAGER}.abort_request", "AROUND", abort_one, ("self", "rid", "abort_all")).on_ours(),
    Hook(f"{_SIZING}:get_req_to_token_extra_context_len", "AFTER", room_behind_a_context, ()),
    Hook(
        "sglang.srt.mem_cache.allocator.base:BaseTokenToKVPoolAllocator.max_new_tokens_for_memory",
        "AROUND",
        end_with_the_pool,
        ("self", "input_tokens", "max_new_tokens", "token_capacity", "sliding_window_size", "chunk_size"),
    ),
)
