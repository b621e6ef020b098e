"""One request to an SGLang server, and the speculation counts of its reply."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx
import openai
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageParam

from benchmarks.harness.config import Workload
from sglang_auf.acceptance import Acceptance
from sglang_auf.training.generation.client import EXACT_IDS, UNSHAPED, SglExt, openai_client, template_fields


class ReplyError(Exception):
    """A reply with status 200 that cannot be counted."""


FAILURES = (openai.APIError, httpx.HTTPError, ReplyError)
"""What a request may raise. In the middle of a stream the openai client lets httpx's errors through."""


@dataclass(slots=True)
class Reply:
    """histogram[a]: verify steps that accepted exactly a drafts; empty without speculation.

    proposed: number of drafts, if the server gives it. ttft_s: time to the first token, of streams only.
    """

    text: str = ""
    finish_reason: str | None = None
    prompt_ids: list[int] | None = None
    output_ids: list[int] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    histogram: list[int] = field(default_factory=list)
    proposed: int | None = None
    ttft_s: float | None = None

    @property
    def verify_steps(self) -> int:
        return sum(self.histogram)


class ChatClient:
    """Asks one server. Nothing is retried, because a failed request is a result too."""

    def __init__(self, base_url: str, model: str, workload: Workload, stream: bool) -> None:
        self._openai = openai_client(
            f"{base_url}/v1", connections=workload.concurrency, timeout_s=workload.timeout_s, retries=0
        )
        self._stream = stream
        details = {"return_spec_tokens_details": True, **EXACT_IDS}
        self._options: dict[str, Any] = {
            "model": model,
            "temperature": workload.temperature,
            "top_p": 1.0,
            "max_tokens": workload.max_tokens,
            "extra_body": {**UNSHAPED, **details, **template_fields(workload.thinking)},
        }

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._openai.close()

    async def ask(self, messages: list[ChatCompletionMessageParam], seed: int | None = None, **options: Any) -> Reply:
        """One answer. Raises one of FAILURES. options: override those of the workload."""
        arguments: dict[str, Any] = {**self._options, "messages": messages, **options}
        if seed is not None:
            arguments["seed"] = seed
        reply = await (self._ask_streamed(arguments) if self._stream else self._ask_whole(arguments))
        if reply.finish_reason in (None, "abort"):
            raise ReplyError(f"the server ended the answer with finish_reason {reply.finish_reason!r}")
        return reply

    async def _ask_whole(self, arguments: dict[str, Any]) -> Reply:
        completion: ChatCompletion = await self._openai.chat.completions.create(**arguments)
        if not completion.choices:
            raise ReplyError("the reply has no choice")
        reply = Reply(completion.choices[0].message.content or "", completion.choices[0].finish_reason)
        _count(reply, completion)
        _extend(reply, completion)
        if reply.completion_tokens == 0:
            raise ReplyError("the reply counts no completion tokens (usage)")
        return reply

    async def _ask_streamed(self, arguments: dict[str, Any]) -> Reply:
        started = time.perf_counter()
        reply = Reply()
        stream = await self._openai.chat.completions.create(
            **arguments, stream=True, stream_options={"include_usage": True}
        )
        async for chunk in stream:
            for choice in chunk.choices:
                if choice.delta.content:
                    reply.ttft_s = reply.ttft_s or time.perf_counter() - started
                    reply.text += choice.delta.content
                reply.finish_reason = choice.finish_reason or reply.finish_reason
            _count(reply, chunk)
            _extend(reply, chunk)
        if reply.completion_tokens == 0:
            raise ReplyError("the stream ended without counting completion tokens (usage)")
        return reply


def _count(reply: Reply, part: ChatCompletion | ChatCompletionChunk) -> None:
    if part.usage is not None:
        reply.prompt_tokens = part.usage.prompt_tokens
        reply.completion_tokens = part.usage.completion_tokens


def _extend(reply: Reply, part: ChatCompletion | ChatCompletionChunk) -> None:
    """Add to `reply` the SGLang extension of a reply, or of one chunk of it."""
    try:
        extension = SglExt.of(part)
    except ValueError as error:
        raise ReplyError(str(error)) from None
    if extension.input_ids is not None:
        reply.prompt_ids = extension.input_ids
    if extension.output_ids:
        reply.output_ids = extension.output_ids[0]
    if extension.spec_tokens_details is not None:
        reply.histogram = histogram_of(extension.spec_tokens_details)
        reply.proposed = extension.spec_tokens_details.get("proposed")
        try:
            Acceptance.of_request(reply.histogram, reply.completion_tokens, reply.proposed)
        except (TypeError, ValueError) as error:
            raise ReplyError(f"spec_tokens_details counts {reply.proposed!r} proposed drafts: {error}") from None


def histogram_of(details: dict[str, Any]) -> list[int]:
    """The histogram in sglext.spec_tokens_details, in the fields of this plugin or of SGLang's built-in algorithms."""
    try:
        if "accepted_histogram" in details:
            histogram, steps = [int(n) for n in details["accepted_histogram"]], int(details["verify_steps"])
        else:
            acceptance = Acceptance.from_meta_info({**details, "completion_tokens": 1})
            histogram, steps = list(acceptance.histogram), int(details["spec_verify_ct"])
    except (KeyError, TypeError, ValueError) as error:
        raise ReplyError(f"spec_tokens_details cannot be read: {type(error).__name__}: {error}") from None
    if sum(histogram) != steps:
        raise ReplyError(f"spec_tokens_details counts {steps} verify steps and a histogram of {sum(histogram)}")
    return histogram
