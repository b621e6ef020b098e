"""A stop ends an answer where plain decoding would end it, though a verify step brings several tokens at once.

SGLang looks at stop strings and stop regexes once a step, over all tokens of the step, and before it looks at stop
tokens (managers/schedule_batch.py, `Req.update_finish_state`). So a stop string behind the end token wins over the end
token, and of two stop strings the one that is listed first wins, not the one that is reached first. And in places it
counts or keeps what a step brought as a whole: reasoning tokens, turns of sessions, answers of no token.

A stop regex is a program of a client: Python's `re` may search for days with `(a+)+b`, on the thread that serves all
clients. So a search is interrupted when it has had its time, and its request ends alone (HTTP 400).
"""

from __future__ import annotations

import copy
import signal
import threading
import time
from http import HTTPStatus
from typing import Any

from sglang_auf.compat import Seam
from sglang_auf.hooks.registry import Hook, serves_auf

_REQUEST = "sglang.srt.managers.schedule_batch:Req"
_STREAMING = "sglang.srt.session.streaming_session"

SEARCH_S = 0.25
"""Seconds that the stop regexes of a request may take after one token. A pattern can also take memory while it searches
(`(?:a?){4000000000}`), some 0.4 GB in this time."""

SEARCH_S_PER_TOKEN = 0.002
"""Seconds that they may take for each token of the answer, beside SEARCH_S once. Usual ones take microseconds."""

SEAMS = (
    Seam(f"{_REQUEST}.tail_str", "hooks.stops", ("self", "new_accepted_len")),
    Seam(
        "sglang.srt.managers.schedule_batch:FINISH_ABORT.__init__",
        "hooks.stops",
        ("self", "message", "status_code", "err_type"),
    ),
    Seam(f"{_REQUEST}.finished", "hooks.stops", ("self",)),
    Seam(f"{_REQUEST}.output_ids_through_stop", "hooks.stops"),
    Seam("sglang.srt.managers.schedule_batch:ReqKvInfo.kv_committed_len", "hooks.stops"),
    Seam(f"{_STREAMING}:StreamingSession.borrowed_slot", "hooks.stops", ("self", "req")),
    *(
        Seam(f"sglang.srt.sampling.sampling_params:SamplingParams.{name}", "hooks.stops")
        for name in ("stop_strs", "stop_regex_strs")
    ),
)


def update_finish_state(original: Any, request: Any, new_accepted_len: int = 1) -> None:
    """Around `Req.update_finish_state`: where an answer ends, and how much of it is reasoning.

    Other algorithms than AUF are left as SGLang has them.
    """
    settings = request.sampling_params
    one_by_one = new_accepted_len > 1 and (settings.stop_strs or settings.stop_regex_strs)
    # to_finish: an abort, which takes all tokens
    if not one_by_one or request.finished() or request.to_finish or not serves_auf():
        original(request, new_accepted_len)
    else:
        _ask_after_each_token(original, request, new_accepted_len)
    if request.finished():  # a session remembers its requests
        request.auf_penalties = None
    if request.finished_len is not None and serves_auf():
        # Reasoning begins with the answer, and SGLang has counted it up to the end of the step.
        request.reasoning_tokens = min(request.reasoning_tokens, request.finished_len)


def _ask_after_each_token(original: Any, request: Any, new_accepted_len: int) -> None:
    """Ask SGLang after each token of the step whether it ends the answer, and not after all of them.

    Tokens behind the one that finishes the request stay in `output_ids`, as SGLang leaves them there: `finished_len`
    says where the answer ends. Without stop strings and regexes SGLang ends the answer at the right token by itself.
    """
    tokens, grammar = request.output_ids, request.grammar
    step = tokens[-new_accepted_len:]
    del tokens[-new_accepted_len:]
    asked = 0
    try:
        while asked < len(step) and not request.finished():
            tokens.append(step[asked])
            asked += 1
            # The grammar has read the complete step, and only its last token can have ended it.
            request.grammar = grammar if asked == len(step) else None
            original(request, 1)
        if request.finished() and request.finished_len is None:
            request.finished_len = len(tokens)
    finally:
        tokens.extend(step[asked:])
        request.grammar = grammar


class SearchTookTooLong(Exception):
    """Raised in the middle of a search, which `re` lets a signal's handler do."""


class _Search:
    """A search of `seconds` at most, of this thread's own time: what other threads and processes take does not count.

    Only a process's main thread can be interrupted; SGLang's scheduler runs there.
    """

    running: _Search | None = None

    def __init__(self, seconds: float) -> None:
        self._seconds, self._began = seconds, time.thread_time()

    def __enter__(self) -> None:
        signal.signal(signal.SIGPROF, _interrupt)
        if self.wait():
            raise SearchTookTooLong
        _Search.running = self

    def __exit__(self, *_: object) -> None:
        _Search.running = None  # from here on the handler raises nothing
        signal.setitimer(signal.ITIMER_PROF, 0)

    @property
    def taken(self) -> float:
        return time.thread_time() - self._began

    def wait(self) -> bool:
        """Ask for a signal when the time may be over, and say whether it is."""
        left = self._seconds - self.taken
        if left > 0:
            signal.setitimer(signal.ITIMER_PROF, max(left, 0.001))  # 0 would ask for none
        return left <= 0


def _interrupt(*_: Any) -> None:
    # The timer counts all threads of the process, so it may come early.
    if _Search.running is not None and _Search.running.wait():
        _Search.running = None
        raise SearchTookTooLong


def limit_search(original: Any, request: Any, new_accepted_len: int = 1) -> bool:
    """Around `Req._check_str_based_finish`: stop regexes that take too long end their request, and no engine."""
    if not request.sampling_params.stop_regex_strs:
        return bool(original(request, new_accepted_len))
    if threading.current_thread() is not threading.main_thread():
        return _end(request, "cannot be searched for here, because this server could not interrupt it")
    spent = getattr(request, "auf_search_s", 0.0)
    seconds = min(SEARCH_S, SEARCH_S + SEARCH_S_PER_TOKEN * len(request.output_ids) - spent)
    text = request.tail_str(new_accepted_len)  # not a part of the search, and longer with every token
    request.tail_str = lambda _: text
    search = _Search(seconds)
    try:
        with search:
            return bool(original(request, new_accepted_len))
    except (SearchTookTooLong, MemoryError):
        return _end(request, "takes too long to search for; take out repeats within repeats, or use stop")
    finally:
        del request.tail_str
        request.auf_search_s = spent + search.taken


def _end(request: Any, reason: str) -> bool:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    patterns = request.sampling_params.stop_regex_strs
    request.finished_len = None
    request.finished_reason = FINISH_ABORT(
        f"stop_regex {patterns} {reason}.", HTTPStatus.BAD_REQUEST, "BadRequestError"
    )
    return True


def continue_session(original: Any, last_request: Any, request: Any, session_params: Any) -> Any:
    """Around `Session._concat_token_arrays`: the next turn of a session goes on where the answer ended.

    SGLang takes all `output_ids`, which without blocks end with the answer.
    """
    answered = copy.copy(last_request)
    answered.output_ids = last_request.output_ids_through_stop
    return original(answered, request, session_params)


def keep_computed_keys(original: Any, streaming: Any, request: Any) -> bool:
    """Around `StreamingSession.try_cache_finished_req`: the next turn computes the key of the answer's last token.

    The last token of a verify step is not in any forward yet, but has a slot: SGLang gives slots for two blocks ahead,
    and takes a token with a slot for one with a key. Without blocks no token has a slot that early. The slot is looked
    for before: a turn that was retracted and then ends has no session afterwards.
    """
    slot = streaming.borrowed_slot(request)
    kept: bool = original(streaming, request)
    if kept and slot is not None and serves_auf():
        computed = len(request.origin_input_ids) + max(len(request.output_ids) - 1, 0)
        slot.kv.kv_committed_len = min(slot.kv.kv_committed_len, computed)
    return kept


def leave_unsampled(
    _: Any, processor: Any, i: int, req: Any, pt: int, next_token_ids: Any, num_input_logprobs: int, output: Any
) -> None:
    """After `SchedulerLogprobResultProcessor.add_logprob_return_values`, which adds those of the first token.

    A request with max_new_tokens 0 has no token. SGLang samples one all the same where it speculates.
    """
    if req.sampling_params.max_new_tokens == 0 and serves_auf():
        req.logprob.output_token_logprobs_val.clear()
        req.logprob.output_token_logprobs_idx.clear()


HOOKS = (
    Hook(f"{_REQUEST}.update_finish_state", "AROUND", update_finish_state, ("self", "new_accepted_len")),
    Hook(f"{_REQUEST}._check_str_based_finish", "AROUND", limit_search, ("self", "new_accepted_len")).on_ours(),
    Hook(
        "sglang.srt.session.session_controller:Session._concat_token_arrays",
        "AROUND",
        continue_session,
        ("last_req", "req", "session_params"),
    ).on_ours(),
    Hook(
        "sglang.srt.managers.scheduler_components.logprob_result_processor:"
        "SchedulerLogprobResultProcessor.add_logprob_return_values",
        "AFTER",
        leave_unsampled,
        ("self", "i", "req", "pt", "next_token_ids", "num_input_logprobs", "output"),
    ),
    Hook(f"{_STREAMING}:StreamingSession.try_cache_finished_req", "AROUND", keep_computed_keys, ("self", "req")),
)
