"""Tau in every OpenAI reply of an AUF server, streamed or not, without a request flag.

A reply of /v1/chat/completions and /v1/completions that took verify steps gains:

    usage.completion_tokens_details   accepted_prediction_tokens: drafted tokens that verification accepted (before a
                                      stop cut any off); rejected_prediction_tokens: the other drafted tokens. Both are
                                      sums over the choices
    sglext.spec_tokens_details        tau, tau_verify, verify_steps, proposed, accepted_histogram, alpha (acceptance.py)
                                      beside SGLang's own spec_* figures; a list with one entry per choice when n > 1

In a stream, sglext has a chunk of its own near the end (`choices` is empty, as in the usage chunk), and usage has
its details where the client asked for usage (`stream_options.include_usage`).

`"return_spec_tokens_details": false` in a request keeps all of it out of that reply. The flag is SGLang's; its default
becomes true on an AUF server. Of several prompts in one completion request with n = 1, SGLang puts only the first
one's details into sglext; usage sums over all. Not covered are /v1/responses and /v1/messages, whose shapes have no
place for it, the native /generate, whose meta_info always has the counts, and SGLang's Rust front end, which does
not run this code.

The streams of Ollama's routes have no place for it either. They only get text here that SGLang would leave out.

And what SGLang reads from the text of a streamed reply, tool calls and thoughts, is read token by token here: its
parsers take one event from each piece of text, which plain decoding's pieces of one token are the right size for.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any

from sglang_auf.acceptance import Acceptance, total_acceptance
from sglang_auf.compat import Seam
from sglang_auf.hooks.registry import HANDLE_REQUEST, Hook, serves_auf
from sglang_auf.hooks.spans import MORE, TokenTexts

FLAG = "return_spec_tokens_details"
FIGURES = ("tau", "tau_verify", "verify_steps", "proposed", "accepted_histogram", "alpha")

COUNTED = ("completion_tokens", "output_token_logprobs_length")
OF_TOKENS = ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs")
"""What `meta_info` counts, and what it has of each token."""

WIDENED = ("SpecTokensDetails", "CompletionTokensDetails")
EMBEDDING = (
    "SglExt",
    "UsageInfo",
    "CompletionResponse",
    "CompletionStreamResponse",
    "ChatCompletionResponse",
    "ChatCompletionStreamResponse",
)

_OPENAI = "sglang.srt.entrypoints.openai"
_DETOKENIZER = "sglang.srt.managers.detokenizer_manager"
_CHAT = f"{_OPENAI}.serving_chat:OpenAIServingChat"
SEAMS = (
    *(Seam(f"{_OPENAI}.protocol:{name}.model_config", "hooks.replies") for name in WIDENED),
    *(Seam(f"{_OPENAI}.protocol:{name}.model_rebuild", "hooks.replies") for name in (*WIDENED, *EMBEDDING)),
    Seam(f"{_CHAT}._tool_call_parsing_active", "hooks.replies", ("self", "request")),
    Seam(f"{_OPENAI}.protocol:ChatCompletionRequest.separate_reasoning", "hooks.replies"),
    Seam(f"{_DETOKENIZER}:DecodeStatus.sent_offset", "hooks.replies"),
)

# Acceptance of the choices of the reply being made, by request id; None outside a reply that reports it. SGLang's
# usage step sees token counts only, so it gets the counts of verification from here. The dictionary is made in the task
# that handles the HTTP request, and only its content changes afterwards: a stream's generator is driven partly by that
# task and partly by a child of it, whose context is a copy that holds the same dictionary.
_choices: ContextVar[dict[str, Acceptance] | None] = ContextVar("auf_choices", default=None)


def widen_models() -> None:
    """Let SpecTokensDetails and CompletionTokensDetails carry fields of ours. Once, when the plugin registers.

    Extends `class SpecTokensDetails(BaseModel)` and `class CompletionTokensDetails(BaseModel)` of protocol.py. A
    subclass would not do: pydantic writes a field by its declared type, so `SglExt.spec_tokens_details` would drop
    what a subclass adds, and so would every reply model around it. Extra keys are written only where they are set, so
    replies without verify steps do not change. A model has the serializers of the models it embeds compiled in, hence
    the rebuilds, innermost first.
    """
    from sglang.srt.entrypoints.openai import protocol

    for name in WIDENED:
        getattr(protocol, name).model_config["extra"] = "allow"
    for name in (*WIDENED, *EMBEDDING):
        getattr(protocol, name).model_rebuild(force=True)


def _begin_reply(serving: Any, request: Any, raw_request: Any) -> None:
    """Before `OpenAIServingBase.handle_request`: turn the details on unless the request turned them off."""
    if FLAG not in type(request).model_fields or not serves_auf():
        return
    if FLAG not in request.model_fields_set:
        setattr(request, FLAG, True)
    _choices.set({})


def _extend_details(details: Any, meta_info: dict[str, Any]) -> Any:
    """After `spec_tokens_details_from_meta_info`: put tau and the other FIGURES into a choice's details.

    SGLang calls it for every chunk of a choice if the flag is on. It returns None until the choice finishes, and also
    then if the choice had no verify step.
    """
    choices = _choices.get()
    if details is None or choices is None:
        return details
    acceptance = Acceptance.from_meta_info(meta_info)
    choices[meta_info["id"]] = acceptance
    figures = acceptance.as_dict()
    return details.model_copy(update={name: figures[name] for name in FIGURES})


def _extend_usage(usage: Any, *_: Any, **__: Any) -> Any:
    """After `calculate_response_usage` and `calculate_streaming_usage`, each called once, when all choices are done."""
    choices = _choices.get()
    if not choices:
        return usage
    from sglang.srt.entrypoints.openai.protocol import CompletionTokensDetails

    acceptance = total_acceptance(choices.values())
    details = usage.completion_tokens_details or CompletionTokensDetails(reasoning_tokens=usage.reasoning_tokens)
    usage.completion_tokens_details = details.model_copy(
        update={
            "accepted_prediction_tokens": acceptance.accepted,
            "rejected_prediction_tokens": acceptance.rejected,
        }
    )
    return usage


class _WholeText:
    """A tokenizer manager whose last report brings no text: a report before it does."""

    def __init__(self, manager: Any) -> None:
        self.manager = manager

    async def generate_request(self, request: Any, http: Any) -> AsyncIterator[dict[str, Any]]:
        async for report in self.manager.generate_request(request, http):
            if report["meta_info"].get("finish_reason") is not None:
                yield {**report, "meta_info": {**report["meta_info"], "finish_reason": None}}
            yield report


def stream_whole_text(original: Any, serving: Any, request: Any, http: Any, model_name: str) -> Any:
    """Around both streams of `OllamaServing` (entrypoints/ollama/serving.py), which are coroutine functions.

    They send no text with the report that ends an answer. For plain decoding that is one token, mostly the end token;
    a verify step brings several.
    """
    front = copy.copy(serving)
    front.tokenizer_manager = _WholeText(serving.tokenizer_manager)
    return original(front, request, http, model_name)


class _TokenByToken:
    """A tokenizer manager whose reports bring one token each, as plain decoding's do."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    async def generate_request(self, request: Any, http: Any) -> AsyncIterator[dict[str, Any]]:
        flags = ("skip_special_tokens", "spaces_between_special_tokens")
        settings = {name: request.sampling_params.get(name, True) for name in flags}

        def decode(tokens: list[int]) -> str:
            return str(self._manager.tokenizer.decode(tokens, **settings))

        choices: dict[str, _Choice] = {}
        async for report in self._manager.generate_request(request, http):
            rid = report["meta_info"]["id"]
            choice = choices.setdefault(rid, _Choice(decode, self._manager.incremental_streaming_output))
            for part in choice.parts(report):
                yield part


class _Choice:
    """A choice whose reports are taken apart.

    increments: its reports have what is new (--incremental-streaming-output), and not all of the answer so far.
    """

    def __init__(self, decode: Callable[[list[int]], str], increments: bool) -> None:
        self._decode, self._increments = decode, increments
        self._texts = TokenTexts()
        self._tokens = self._length = 0
        # Where a report ends inside a character, SGLang sends the words before it and holds the rest back.
        self._ahead = 0
        """Characters that came although their token's last ones have not."""
        self._held: list[int] = []
        """The numbers of characters of tokens that have not come although the tokens have."""

    def parts(self, report: dict[str, Any]) -> list[dict[str, Any]]:
        """`report` once for each new token, with what there is up to it; only the last one may end the answer."""
        meta, text = report["meta_info"], report["text"]
        # SGLang's list grows on while a report of several choices waits to be sent.
        ids = report["output_ids"] if self._increments else report["output_ids"][: meta.get("completion_tokens")]
        old, start = (0, 0) if self._increments else (self._tokens, self._length)
        self._tokens, self._length = len(ids), len(text)
        due = [(old, length) for length in self._held]
        due += [(place, len(self._texts.add(token, self._decode))) for place, token in enumerate(ids[old:], old + 1)]
        at, ends, held = start - self._ahead, [], []
        for place, length in due:
            at += length
            ends.append((place, min(max(at, start), len(text))))
            if at > len(text) and length:
                held.append(min(length, at - len(text)))
        ends[-1:] = [(len(ids), len(text))]  # also where a stop was trimmed
        inside = self._texts.inside_character
        self._held, self._ahead = (held, max(len(text) - at, 0)) if inside else ([], 0)
        parts, first, begin = [], 0, 0
        for place, end in ends:
            part = report | {"text": text[begin:end], "output_ids": ids[first:place]}
            part["meta_info"] = self._meta_of(meta, first, place, len(ids))
            parts.append(part)
            if self._increments:
                first, begin = place, end
        return parts

    def _meta_of(self, meta: dict[str, Any], first: int, place: int, last: int) -> dict[str, Any]:
        """Of the part with a report's tokens `first` to `place`, of `last`."""
        said = dict(meta)
        if self._increments:
            said |= {name: meta[name][first:place] for name in OF_TOKENS if meta.get(name)}
        if missing := last - place:
            said |= {"finish_reason": None, MORE: True}
            said |= {name: meta[name] - missing for name in COUNTED if meta.get(name) is not None}
            if meta.get("reasoning_tokens"):
                said["reasoning_tokens"] = min(meta["reasoning_tokens"], said["completion_tokens"])
        return said


def stream_token_by_token(original: Any, serving: Any, adapted_request: Any, request: Any, raw_request: Any) -> Any:
    """Around `OpenAIServingChat._generate_chat_stream`, a coroutine function. Anthropic's messages pass there too."""
    parsed = serving._tool_call_parsing_active(request) or (serving.reasoning_parser and request.separate_reasoning)
    return original(_front(serving) if parsed and serves_auf() else serving, adapted_request, request, raw_request)


def respond_token_by_token(
    original: Any, serving: Any, request_id: str, request_prompt: Any, adapted_request: Any, *rest: Any, **more: Any
) -> Any:
    """Around `OpenAIServingResponses._generate_with_builtin_tools`, a coroutine function."""
    parsed = adapted_request.stream and (serving.tool_call_parser or serving.reasoning_parser)
    front = _front(serving) if parsed and serves_auf() else serving
    return original(front, request_id, request_prompt, adapted_request, *rest, **more)


def _front(serving: Any) -> Any:
    front = copy.copy(serving)
    front.tokenizer_manager = _TokenByToken(serving.tokenizer_manager)
    return front


def send_once(original: Any, detokenizer: Any, batch: Any) -> list[str]:
    """Around `DetokenizerManager._decode_batch_token_id_output`: no text of a stream is sent twice.

    While an answer ends inside a character, SGLang sends the words before it, and notes how much that is. It may note
    less at the next step, and then sends the rest again: with several tokens a step, Chinese before two emojis.
    """
    sent = {rid: detokenizer.decode_status[rid].sent_offset for rid in batch.rids if rid in detokenizer.decode_status}
    texts: list[str] = original(detokenizer, batch)
    for rid, offset in sent.items():
        if (status := detokenizer.decode_status.get(rid)) is not None:
            status.sent_offset = max(status.sent_offset, offset)
    return texts


_OLLAMA = "sglang.srt.entrypoints.ollama.serving:OllamaServing"
_USAGE = ("n_choices", "enable_cache_report", "image_tokens", "audio_tokens", "video_tokens")
HOOKS = (
    Hook(HANDLE_REQUEST, "BEFORE", _begin_reply, ("self", "request", "raw_request")),
    Hook(f"{_OPENAI}.utils:spec_tokens_details_from_meta_info", "AFTER", _extend_details, ("meta_info",)),
    Hook(
        f"{_OPENAI}.usage_processor:UsageProcessor.calculate_response_usage",
        "AFTER",
        _extend_usage,
        ("responses", *_USAGE),
    ),
    Hook(
        f"{_OPENAI}.usage_processor:UsageProcessor.calculate_streaming_usage",
        "AFTER",
        _extend_usage,
        ("prompt_tokens", "reasoning_tokens", "completion_tokens", "cached_tokens", *_USAGE),
    ),
    *(
        Hook(
            f"{_OLLAMA}.{name}", "AROUND", stream_whole_text, ("self", "gen_request", "raw_request", "model_name")
        ).on_ours()
        for name in ("_stream_chat_response", "_stream_generate_response")
    ),
    Hook(
        f"{_DETOKENIZER}:DetokenizerManager._decode_batch_token_id_output", "AROUND", send_once, ("self", "recv_obj")
    ).on_ours(),
    Hook(
        f"{_CHAT}._generate_chat_stream",
        "AROUND",
        stream_token_by_token,
        ("self", "adapted_request", "request", "raw_request"),
    ),
    Hook(
        f"{_OPENAI}.serving_responses:OpenAIServingResponses._generate_with_builtin_tools",
        "AROUND",
        respond_token_by_token,
        (
            *("self", "request_id", "request_prompt", "adapted_request", "sampling_params", "context"),
            *("raw_request", "priority", "kwargs"),
        ),
    ),
)
