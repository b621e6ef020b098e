"""Where SGLang's HTTP process has both the tokens of a prompt and those of its answer.

The prompt is noted when a choice is sent to the scheduler, and the answer is complete in the report that finishes it:
/generate, completions and chats, streamed or not, and every choice of n > 1 pass both places. Nothing is noted
unless a recorder runs (`python -m server` with record.directory) and the request allows it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from sglang_auf.compat import Seam
from sglang_auf.hooks.registry import RECEIVE_BATCH, SEND_REQUEST, Hook

if TYPE_CHECKING:
    from sglang_auf.recording.recorder import Recorder

FINISHED = ("stop", "length")
PROMPT = "auf_prompt"
"""Attribute of SGLang's record of a running request. It goes with the record, however the request ends."""

allowed: ContextVar[bool] = ContextVar("auf_record", default=False)
"""Whether the HTTP request of this task may be recorded. Only server.middleware.Consent sets it."""

_recorder: Recorder | None = None

_MANAGER = "sglang.srt.managers.tokenizer_manager"
_TOKENIZED = "sglang.srt.managers.io_struct:TokenizedGenerateReqInput"
SEAMS = (
    Seam(f"{_MANAGER}:ReqState", "recording.capture"),
    *(
        Seam(f"{_TOKENIZED}.{name}", "recording.capture")
        for name in ("input_ids", "sampling_params", "mm_inputs", "session_id", "session_params", "lora_id", "no_logs")
    ),
    *(
        Seam(f"sglang.srt.managers.io_struct:GenerateReqInput.{name}", "recording.capture")
        for name in ("log_metrics", "no_logs")
    ),
    Seam("sglang.srt.managers.io_struct:BatchStrOutput.finished_reasons", "recording.capture"),
)


def record_with(recorder: Recorder | None) -> None:
    """Answers of this process go to `recorder` from now on; None: to nobody."""
    global _recorder
    _recorder = recorder


def _harmless(note: Callable[[Recorder, Any, Any], None]) -> Callable[[Any, Any], None]:
    """Called where there is a recorder. An error in it ends the recording and not the server."""

    def noted(manager: Any, message: Any) -> None:
        if _recorder is None:
            return
        try:
            note(_recorder, manager, message)
        except Exception:
            _recorder.fail()
            record_with(None)

    return noted


@_harmless
def _note_prompt(recorder: Recorder, manager: Any, tokenized: Any) -> None:
    """Before `TokenizerManager._send_one_request`, in the task of the request."""
    if not hasattr(tokenized, "no_logs"):  # an embedding has no answer
        return
    state = manager.rid_to_state.get(tokenized.rid)
    settings = tokenized.sampling_params
    if state is None or not state.obj.log_metrics or settings.max_new_tokens == 0:  # a health check, or a prefill
        return
    if not allowed.get() or state.obj.no_logs:  # which SGLang does not copy into what it tokenizes
        recorder.drop("refused")
    elif settings.ignore_eos or any(
        value is not None
        for value in (tokenized.mm_inputs, tokenized.session_id, tokenized.session_params, tokenized.lora_id)
    ):
        recorder.drop("unusable")
    elif random.random() >= recorder.settings.share:
        recorder.drop("share")
    else:
        setattr(state, PROMPT, tokenized.input_ids)


def _note_prompts(manager: Any, tokenized: Any) -> None:
    """Before `TokenizerManager._send_batch_request`, which takes prompts that came as token ids."""
    for one in tokenized:
        _note_prompt(manager, one)


@_harmless
def _receive(recorder: Recorder, manager: Any, output: Any) -> None:
    """Before `TokenizerManager._handle_batch_output`, in the task that reads from the scheduler."""
    for i, rid in enumerate(output.rids):
        reason = output.finished_reasons[i]
        state = manager.rid_to_state.get(rid)
        prompt = getattr(state, PROMPT, None)
        if reason is None or prompt is None:
            continue
        if reason["type"] in FINISHED:
            recorder.offer(prompt, [*state.output_ids, *output.output_ids[i]])
        else:
            recorder.drop("unfinished")


HOOKS = (
    Hook(SEND_REQUEST, "BEFORE", _note_prompt, ("self", "tokenized_obj")),
    Hook(f"{_MANAGER}:TokenizerManager._send_batch_request", "BEFORE", _note_prompts, ("self", "tokenized_objs")),
    Hook(RECEIVE_BATCH, "BEFORE", _receive, ("self", "recv_obj")),
)
