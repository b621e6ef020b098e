"""The end of one request ends no other one, no later one with its grammar, and no engine.

Ids: a client may choose the id of its request (`rid`), and when it leaves or has had its time, SGLang's scheduler
aborts every request whose id begins with that id (managers/scheduler.py, `abort_request`): with the id "a", a sixteenth
of all others. No part of SGLang needs that: it aborts by complete ids, those of choices and of batches too.

Room: every verify step takes slots for two blocks ahead (speculative/dflash_info_v2.py), also the last one of an answer
that reaches the end of the context or of the KV pool. SGLang counts on less (mem_cache/allocation_sizing.py). With
blocks of more than 8 such a step writes past its request's row of the slot table, into the next request's on a GPU.

Grammars: a request whose grammar was not compiled in time ends. SGLang also remembers that grammar as invalid
(constrained/grammar_manager.py), and refuses every later request with it, because the machine was busy once.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

from sglang_auf.compat import Seam, check_seams
from sglang_auf.hooks.registry import Hook, serves_auf

_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"
_SIZING = "sglang.srt.mem_cache.allocation_sizing"
_GRAMMARS = "sglang.srt.constrained.base_grammar_backend"

SEAMS = (
    Seam(f"{_SIZING}:get_alloc_page_size", "hooks.aborts", ()),
    Seam(f"{_SIZING}:get_alloc_reserve_per_decode", "hooks.aborts", ()),
    Seam(f"{_GRAMMARS}:InvalidGrammarObject", "hooks.aborts", ("error_message",)),
)
SCHEDULER_SEAMS = (
    Seam(f"{_SCHEDULER}.abort_request", "hooks.aborts", ("self", "recv_req")),
    Seam(f"{_SCHEDULER}.collect_inflight_reqs", "hooks.aborts", ("self",)),
    Seam(f"{_SCHEDULER}.init_grammar_manager", "hooks.aborts", ("self",)),  # where grammar_manager is made
    Seam(f"{_SCHEDULER}.init_running_status", "hooks.aborts", ("self",)),  # where waiting_queue is made
    Seam(f"{_SCHEDULER}.init_chunked_prefill", "hooks.aborts", ("self",)),  # where chunked_req is made
)
"""Checked when a scheduler begins: nobody else imports its module."""

TIMED_OUT = "Grammar preprocessing timed out"
"""All that SGLang says of a grammar that was not compiled in time. Of one that is wrong it has the compiler's words."""


LATE, MOST_TIMES_LATE = "auf_late", 3
"""Attribute of SGLang's grammar backend: how often each grammar was late. A grammar that was so often is refused."""


def name_by_complete_ids(_: None, updater: Any) -> None:
    """After `SchedulerWeightUpdaterManager.__post_init__`, which a scheduler makes before it hands out `abort_request`.

    Raises CompatError. The method of this one scheduler is replaced, because a hook on it would import its module
    in every process.
    """
    check_seams(SCHEDULER_SEAMS)
    scheduler = updater.scheduler
    scheduler.abort_request = functools.partial(abort_one, scheduler.abort_request, scheduler)


def abort_one(original: Any, scheduler: Any, recv_req: Any) -> None:
    """Around `Scheduler.abort_request`, of a scheduler: it finds the request with that very id alone.

    Of those that wait it sees no other: a client that leaves with thousands of prompts leaves an abort for each, and
    SGLang looks longer at each id than this does. Of the others, those with longer ids have none meanwhile. Left as
    SGLang has them are the queues of servers that only prefill or only decode, which AUF refuses to be.
    """
    if recv_req.abort_all:
        original(recv_req)
        return
    asked, waiting = recv_req.rid, scheduler.waiting_queue
    found = [one for one in waiting if one.rid == asked]
    others = [scheduler.chunked_req, *scheduler.grammar_manager.grammar_queue, *scheduler.collect_inflight_reqs()]
    longer = [(one, one.rid) for one in others if one is not None and one.rid != asked and one.rid.startswith(asked)]
    scheduler.waiting_queue = left = list(found)
    try:
        for other, _ in longer:
            other.rid = ""
        original(recv_req)
    finally:
        for other, rid in longer:
            other.rid = rid
        scheduler.waiting_queue = waiting
        for one in found:
            if one not in left:
                waiting.remove(one)


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


def remember_unless_late(original: Any, backend: Any, key: tuple[str, str], value: Any) -> None:
    """Around `BaseGrammarBackend.set_cache`: a time-out is not kept, so the next request has it compiled again.

    But not for ever: a compilation cannot be stopped, and takes a thread from the grammars of other clients. Ranks
    agree on time-outs before this, so all of them forget the same grammars.
    """
    from sglang.srt.constrained.base_grammar_backend import InvalidGrammarObject

    if isinstance(value, InvalidGrammarObject) and value.error_message == TIMED_OUT:
        late = vars(backend).setdefault(LATE, Counter())
        late[key] += 1
        if late[key] < MOST_TIMES_LATE or key in backend.cache:  # compiled for another request
            return
    original(backend, key, value)


def _room_of_a_step() -> int:
    """Slots that a verify step may take behind the tokens that a request has."""
    from sglang.srt.mem_cache.allocation_sizing import get_alloc_page_size, get_alloc_reserve_per_decode

    return int(get_alloc_reserve_per_decode() + get_alloc_page_size() - 1)


HOOKS = (
    Hook(
        "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.__post_init__",
        "AFTER",
        name_by_complete_ids,
        ("self",),
    ).on_ours(),
    Hook(f"{_SIZING}:get_req_to_token_extra_context_len", "AFTER", room_behind_a_context, ()),
    Hook(
        "sglang.srt.mem_cache.allocator.base:BaseTokenToKVPoolAllocator.max_new_tokens_for_memory",
        "AROUND",
        end_with_the_pool,
        ("self", "input_tokens", "max_new_tokens", "token_capacity", "sliding_window_size", "chunk_size"),
    ),
    Hook(
        f"{_GRAMMARS}:BaseGrammarBackend.set_cache", "AROUND", remember_unless_late, ("self", "key", "value")
    ).on_ours(),
)
