"""A stop ends an answer where plain decoding would end it, though a verify step brings several tokens at once.

SGLang looks at stop strings and stop regexes once a step, over all tokens of the step, and before it looks at stop
tokens (managers/schedule_batch.py, `Req.update_finish_state`). So a stop string behind the end token wins over the end
token, and of two stop strings the one that is listed first wins, not the one that is reached first.
"""

from __future__ import annotations

from typing import Any

from sglang_auf.compat import Seam
from sglang_auf.hooks.registry import Hook

_REQUEST = "sglang.srt.managers.schedule_batch:Req"

SEAMS = (
    Seam(f"{_REQUEST}.finished", "hooks.stops", ("self",)),
    Seam(f"{_REQUEST}.output_ids_through_stop", "hooks.stops"),
    *(
        Seam(f"sglang.srt.sampling.sampling_params:SamplingParams.{name}", "hooks.stops")
        for name in ("stop_strs", "stop_regex_strs")
    ),
)


def update_finish_state(original: Any, request: Any, new_accepted_len: int = 1) -> None:
    """Around `Req.update_finish_state`: asks it after each token of the step and not after all of them.

    Tokens behind the one that finishes the request stay in `output_ids`, as SGLang leaves them there: `finished_len`
    says where the answer ends. Without stop strings and regexes SGLang's own answer is that of single tokens.
    """
    settings = request.sampling_params
    one_by_one = new_accepted_len > 1 and (settings.stop_strs or settings.stop_regex_strs)
    if not one_by_one or request.finished() or request.to_finish:  # to_finish: an abort, which takes all tokens
        original(request, new_accepted_len)
        return
    tokens, grammar = request.output_ids, request.grammar
    step = tokens[-new_accepted_len:]
    del tokens[-new_accepted_len:]
    for position, token in enumerate(step, start=1):
        tokens.append(token)
        # The grammar has read the complete step, and only its last token can have ended it.
        request.grammar = grammar if position == len(step) else None
        original(request, 1)
        if request.finished():
            if request.finished_len is None:
                request.finished_len = len(tokens)
            tokens.extend(step[position:])
            break
    request.grammar = grammar


HOOKS = (Hook(f"{_REQUEST}.update_finish_state", "AROUND", update_finish_state, ("self", "new_accepted_len")),)
