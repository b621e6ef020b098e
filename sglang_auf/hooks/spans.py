"""Which tokens of a streamed chat answer were drafted, for clients that ask.

A streamed /v1/chat/completions with the header `x-auf-spans: 1` gains chunks of ours beside SGLang's, with no choices,
as in SGLang's own sglext chunk:

    "sglext": {"spans": {"index": 0, "tokens": [["The", false], [" sky", true], [" is", false]]}}

index: the number of the choice. tokens: the answer's next tokens as [text, drafted], where drafted is true for a draft
that was accepted, false for a token that the target added, and null where it is not known. Every token of
`completion_tokens` comes exactly once, including the one that ends the answer. A token that ends the answer or stands
inside a character has an empty text. Joined, the texts are the answer, plus a stop string that SGLang trims from it.

The scheduler reports after every verify step. The tokens of one report are accepted drafts followed by one token of the
target, so the counts of each report say which is which. They are read where reports arrive in the server process,
because SGLang may join several reports into one chunk afterwards. If a report has the tokens of several steps, which
happens while the text may be the beginning of a stop string, it is not known which of them were drafted.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextvars import ContextVar
from typing import Any
from weakref import WeakValueDictionary

from sglang_auf.compat import Seam
from sglang_auf.hooks.registry import HANDLE_REQUEST, RECEIVE_BATCH, SEND_REQUEST, Hook, serves_auf

HEADER = "x-auf-spans"

SEAMS = tuple(
    Seam(f"sglang.srt.managers.io_struct:BatchStrOutput.{name}", "hooks.spans")
    for name in ("rids", "output_ids", "spec_verify_ct", "spec_num_correct_drafts")
)

MORE = "auf_more"
"""In the meta_info of a report that was taken apart (replies.py): whether another part of it follows."""

CUT_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes an incomplete character to."""

PENDING = 8
"""Most tokens whose text waits for the end of a character: one has four bytes, so more tokens hold no whole one."""


class TokenTexts:
    """The text that each token adds to an answer, as a detokenizer sends it that gets one token at a time."""

    def __init__(self) -> None:
        self._before: list[int] = []
        self._pending: list[int] = []
        self._cut = False
        """Whether the text of the tokens before was returned without its last character, whose rest is to come."""

    @property
    def inside_character(self) -> bool:
        """Whether text of the last tokens is still to come."""
        return bool(self._pending) or self._cut

    def add(self, token: int, decode: Callable[[list[int]], str], last: bool = False) -> str:
        """The text of the answer's next token, and of those before it that stood inside the same character.

        They are decoded together with earlier tokens, because spaces depend on the neighbour; but with few, whatever
        the answer is. last: no more will come.
        """
        self._pending.append(token)
        given = len(decode(self._before)) - self._cut
        text = decode(self._before + self._pending)
        cut = text.endswith(CUT_CHARACTER) and not last
        if cut and len(self._pending) <= PENDING:
            return ""
        self._before, self._pending, self._cut = self._pending, [], cut
        return text[given : len(text) - cut]


class Spans:
    """The tokens of one choice so far, and which of them were drafted."""

    def __init__(self) -> None:
        self._texts = TokenTexts()
        self._new: list[tuple[int, bool | None]] = []
        """Tokens that were not taken yet, and whether they were drafted."""
        self._verify_steps = self._accepted = 0

    def add(self, tokens: Sequence[int], verify_steps: int, accepted: int) -> None:
        """Add one report of the scheduler: its new tokens, and the choice's counts so far, including them."""
        steps, self._verify_steps = verify_steps - self._verify_steps, verify_steps
        confirmed, self._accepted = accepted - self._accepted, accepted
        drafted: list[bool | None]
        if confirmed == 0:  # prefill's token, or steps that accepted nothing
            drafted = [False] * len(tokens)
        elif steps == 1 and len(tokens) <= confirmed + 1:  # fewer where a stop cut the step off
            drafted = [place < confirmed for place in range(len(tokens))]
        else:
            drafted = [None] * len(tokens)
        self._new += zip(tokens, drafted, strict=True)

    def take(self, decode: Callable[[list[int]], str], finished: bool) -> list[tuple[str, bool | None]]:
        """(text, drafted) of the tokens added since the last call. finished: no more will come."""
        new, self._new = self._new, []
        return [
            (self._texts.add(token, decode, finished and place == len(new)), drafted)
            for place, (token, drafted) in enumerate(new, 1)
        ]


# The choices of the reply being made, by request id; None where the client did not ask. Only this variable keeps them
# alive, so that they end with the reply even if its client has left. replies.py says which tasks see it.
_reply: ContextVar[dict[str, Spans] | None] = ContextVar("auf_spans", default=None)
_running: WeakValueDictionary[str, Spans] = WeakValueDictionary()


def _begin_reply(serving: Any, request: Any, raw_request: Any) -> None:
    """Before `OpenAIServingBase.handle_request`."""
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

    if not isinstance(request, ChatCompletionRequest) or not request.stream or raw_request is None:
        return
    if raw_request.headers.get(HEADER) == "1" and serves_auf():
        _reply.set({})


def _begin_choice(manager: Any, tokenized: Any) -> None:
    """Before `TokenizerManager._send_one_request`, in the task of the request."""
    reply = _reply.get()
    if reply is not None:
        reply[tokenized.rid] = _running[tokenized.rid] = Spans()


def _receive(manager: Any, output: Any) -> None:
    """Before `TokenizerManager._handle_batch_output`, in the task that reads from the scheduler."""
    if not _running:
        return
    for i, rid in enumerate(output.rids):
        spans = _running.get(rid)
        if spans is not None:
            spans.add(output.output_ids[i], output.spec_verify_ct[i], output.spec_num_correct_drafts[i])


async def _stream(original: Any, serving: Any, **arguments: Any) -> AsyncIterator[str]:
    """Around `OpenAIServingChat._generate_stream_content`, which yields the text of one chunk of one choice."""
    async for chunk in original(serving, **arguments):
        yield chunk
    meta_info = arguments["content"]["meta_info"]
    if MORE in meta_info:
        return
    reply, finished = _reply.get() or {}, meta_info["finish_reason"] is not None
    spans = reply.pop(meta_info["id"], None) if finished else reply.get(meta_info["id"])
    if spans is None:
        return
    tokenizer = serving.tokenizer_manager.tokenizer

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    tokens = spans.take(decode, finished)
    if tokens:
        chunk = {
            "id": meta_info["id"],
            "object": "chat.completion.chunk",
            "created": arguments["created"],
            "model": arguments["request"].model,
            "choices": [],
            "sglext": {"spans": {"index": arguments["index"], "tokens": tokens}},
        }
        yield f"data: {json.dumps(chunk)}\n\n"


HOOKS = (
    Hook(HANDLE_REQUEST, "BEFORE", _begin_reply, ("self", "request", "raw_request")),
    Hook(SEND_REQUEST, "BEFORE", _begin_choice, ("self", "tokenized_obj")),
    Hook(RECEIVE_BATCH, "BEFORE", _receive, ("self", "recv_obj")),
    Hook(
        "sglang.srt.entrypoints.openai.serving_chat:OpenAIServingChat._generate_stream_content",
        "AROUND",
        _stream,
        (
            "self",
            "content",
            "index",
            "request",
            "created",
            "stream_offsets",
            "reasoning_parser_dict",
            "parser_dict",
            "has_tool_calls",
            "choice_logprobs",
            "finish_reason_type",
            "continuous_usage_stats",
            *(f"{kind}_tokens" for kind in ("prompt", "reasoning", "completion")),
        ),
    ),
)
