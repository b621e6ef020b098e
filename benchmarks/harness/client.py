"""One request to a server, and what it adds to its reply: token ids, and counts of verify steps.

Messages go to the chat route. A text and token ids go to the route of completions, which puts them into no chat
template. SGLang has token ids in the choice of a completion, and in sglext of a chat; vLLM has them in the choice, and
a chat's prompt in the reply. SGLang counts verify steps in sglext.spec_tokens_details, vLLM in
metrics.speculative_decoding, where it was started with --per-request-spec-decode-metrics (docs.vllm.ai, "Per-Request
Acceptance Metrics"). Any other server gives neither; how many tokens there are is what the reply's usage says.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

import httpx
import openai
from openai.types import Completion, CompletionChoice
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice

from benchmarks.harness.config import Workload
from benchmarks.harness.sources.prompt import TokenIds
from sglang_auf.acceptance import Acceptance
from sglang_auf.hooks.spans import HEADER
from sglang_auf.recording.settings import RECORD_HEADER
from sglang_auf.training.generation.client import (
    EXACT_IDS,
    THOUGHTS,
    TOKEN_IDS,
    UNSHAPED,
    SglExt,
    openai_client,
    template_fields,
    token_ids,
)
from sglang_auf.training.text.messages import Message


class ReplyError(Exception):
    """A reply with status 200 that cannot be counted."""


COUNTS = {"return_spec_tokens_details": True}
CHAT_DETAILS = {**COUNTS, **EXACT_IDS}
TEXT_DETAILS = {**COUNTS, **TOKEN_IDS}
"""SGLang's request fields for the counts of drafts and the token ids in the reply."""

Engine = Literal["sglang", "vllm", "other"]

FAILURES = (openai.APIError, httpx.HTTPError, ReplyError, ValueError)
"""What a request may raise. In the middle of a stream the openai client lets httpx's errors through, and anywhere a
ValueError: of a request that is no JSON, and of a reply that is none."""


@dataclass(slots=True)
class Reply:
    """histogram[a]: verify steps that accepted exactly a drafts; empty without speculation.

    proposed: number of drafts, if the server gives it. ttft_s: time to the first token, of streams only.
    drafted: of each token, whether it was a draft (None: not known); only where spans were asked for. cached_tokens: of
    the prompt, those that the prefix cache had; None where the server does not say it.
    """

    text: str = ""
    finish_reason: str | None = None
    prompt_ids: list[int] | None = None
    output_ids: list[int] | None = None
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    completion_tokens: int = 0
    histogram: list[int] = field(default_factory=list)
    proposed: int | None = None
    ttft_s: float | None = None
    drafted: list[bool | None] = field(default_factory=list)

    @property
    def verify_steps(self) -> int:
        return sum(self.histogram)

    @property
    def accepted_by_step(self) -> list[int] | None:
        """Accepted drafts of each verify step, in order; None where the reply does not say it of every token.

        The first token is prefill's. The tokens of a step are drafts and one of the target's own, which ends it. Where
        a stop cut the last step off, what it accepted is what the histogram has beside the other steps.
        """
        if None in self.drafted or len(self.drafted) != self.completion_tokens:
            return None
        steps, drafts = [], 0
        for drafted in self.drafted[1:]:
            if drafted:
                drafts += 1
            else:
                steps.append(drafts)
                drafts = 0
        counted = Counter({accepted: count for accepted, count in enumerate(self.histogram) if count})
        if drafts:
            steps += (counted - Counter(steps)).elements()
        # They differ where the server began a request again: a token of the second prefill belongs to no step.
        return steps if Counter(steps) == counted and (not drafts or steps[-1] >= drafts) else None


def record_header(recorded: bool) -> dict[str, str]:
    """Whether a server that records may keep the answer, also one with record.opt_in.

    Only what a benchmark is to record: a drafter would learn from the prompts that measure it.
    """
    return {RECORD_HEADER: "on" if recorded else "off"}


class ChatClient:
    """Asks one server. Nothing is retried, because a failed request is a result too."""

    def __init__(
        self,
        base_url: str,
        model: str,
        workload: Workload,
        stream: bool,
        spans: bool = False,
        engine: Engine = "sglang",
    ) -> None:
        """spans: have a stream say of each token whether it was a draft; only AUF servers do, and only of chats.

        engine: what the server is, which decides with which fields it is asked for token ids and counts of drafts.
        """
        self._openai = openai_client(
            f"{base_url}/v1", connections=workload.concurrency, timeout_s=workload.timeout_s, retries=0
        )
        self._stream = stream
        self._engine = engine
        self._thinking: dict[str, Any] = template_fields(workload.thinking).get("chat_template_kwargs", {})
        self._options: dict[str, Any] = {
            "model": model,
            "temperature": workload.temperature,
            "top_p": 1.0,
            "max_tokens": workload.max_tokens,
        }
        self._headers = {HEADER: "1"} if spans else {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._openai.close()

    async def ask(
        self,
        asked: Sequence[Message] | str | TokenIds,
        seed: int | None = None,
        request: Mapping[str, Any] | None = None,
        *,
        recorded: bool = False,
        **options: Any,
    ) -> Reply:
        """The answer to messages, or the continuation of a text or of token ids. Raises one of FAILURES.

        request: more fields of a chat request (tools, chat_template_kwargs). recorded: a server may record the answer.
        options: override those of the workload.
        """
        arguments: dict[str, Any] = {**self._options, **options}
        arguments["extra_headers"] = {**self._headers, **record_header(recorded)}
        if seed is not None:
            arguments["seed"] = seed
        create: Any
        if isinstance(asked, str | TokenIds):
            create = self._openai.completions.create
            details = self._details(TEXT_DETAILS)
            prompt = asked if isinstance(asked, str) else list(asked)
            arguments |= {"prompt": prompt, "extra_body": {**UNSHAPED, **details}}
        else:
            create = self._openai.chat.completions.create
            fields = dict(request or {})
            if variables := {**fields.pop("chat_template_kwargs", {}), **self._thinking}:
                fields["chat_template_kwargs"] = variables
            details = self._details(CHAT_DETAILS)
            arguments |= {"messages": asked, "extra_body": {**UNSHAPED, **details, **fields}}
        reply = Reply()
        await (self._read_stream if self._stream else self._read_whole)(create, arguments, reply)
        if reply.finish_reason in (None, "abort"):
            raise ReplyError(f"the server ended the answer with finish_reason {reply.finish_reason!r}")
        return reply

    def _details(self, sglangs: dict[str, Any]) -> dict[str, Any]:
        return {"sglang": sglangs, "vllm": TOKEN_IDS, "other": {}}[self._engine]

    async def _read_whole(self, create: Any, arguments: dict[str, Any], reply: Reply) -> None:
        completion: Any = await create(**arguments)  # the openai client hands over whatever came with status 200
        if not isinstance(completion, ChatCompletion | Completion):
            raise ReplyError(f"the reply is no completion: {str(completion)[:100]!r}")
        if not completion.choices:
            raise ReplyError("the reply has no choice")
        _read_choice(reply, completion.choices[0])
        _count(reply, completion)
        _extend(reply, completion)
        if reply.completion_tokens == 0:
            raise ReplyError("the reply counts no completion tokens (usage)")

    async def _read_stream(self, create: Any, arguments: dict[str, Any], reply: Reply) -> None:
        started = time.perf_counter()
        stream = await create(**arguments, stream=True, stream_options={"include_usage": True})
        async for chunk in stream:
            for choice in chunk.choices:
                if _read_choice(reply, choice):
                    reply.ttft_s = reply.ttft_s or time.perf_counter() - started
            _count(reply, chunk)
            _extend(reply, chunk)
        if reply.completion_tokens == 0:
            raise ReplyError("the stream ended without counting completion tokens (usage)")


Part = ChatCompletion | ChatCompletionChunk | Completion
"""A reply, or a chunk of one; a chunk of a completion has the type of a whole one."""


def _read_choice(reply: Reply, choice: Choice | ChunkChoice | CompletionChoice) -> bool:
    """Add the text, the end and the token ids of a choice, or of a part of one.

    Whether it has tokens: text, a thought that the server took out of the text, or a call of a tool.
    """
    begun = False
    if isinstance(choice, CompletionChoice):
        text = choice.text
        reply.prompt_ids = _ids(choice, "prompt_token_ids") or reply.prompt_ids
    else:
        message = choice.delta if isinstance(choice, ChunkChoice) else choice.message
        text, more = message.content or "", message.model_extra or {}
        begun = bool(message.tool_calls) or any(more.get(name) for name in THOUGHTS)
    if (ids := _ids(choice, "token_ids")) is not None:
        reply.output_ids = (reply.output_ids or []) + ids
    reply.text += text
    reply.finish_reason = choice.finish_reason or reply.finish_reason
    return begun or bool(text)


def _ids(part: Part | Choice | ChunkChoice | CompletionChoice, name: str) -> list[int] | None:
    try:
        return token_ids(part, name)
    except ValueError as error:
        raise ReplyError(str(error)) from None


def _count(reply: Reply, part: Part) -> None:
    if part.usage is not None:
        reply.prompt_tokens = part.usage.prompt_tokens
        reply.completion_tokens = part.usage.completion_tokens
        details = part.usage.prompt_tokens_details
        if details is not None and isinstance(details.cached_tokens, int):
            reply.cached_tokens = details.cached_tokens


def _extend(reply: Reply, part: Part) -> None:
    """Add to `reply` what SGLang or vLLM adds to a reply, or to one chunk of it."""
    reply.prompt_ids = _ids(part, "prompt_token_ids") or reply.prompt_ids
    metrics = (part.model_extra or {}).get("metrics")
    if isinstance(metrics, dict) and (counts := metrics.get("speculative_decoding")) is not None:
        _count_drafts(reply, *_vllms_counts(counts))
    try:
        extension = SglExt.of(part)
    except ValueError as error:
        raise ReplyError(str(error)) from None
    if extension.input_ids is not None:
        reply.prompt_ids = extension.input_ids
    if extension.output_ids:
        reply.output_ids = extension.output_ids[0]
    if extension.spans is not None:
        try:
            reply.drafted += [drafted for _, drafted in extension.spans["tokens"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ReplyError(f"spans cannot be read: {type(error).__name__}: {error}") from None
    if extension.spec_tokens_details is not None:
        _count_drafts(reply, histogram_of(extension.spec_tokens_details), extension.spec_tokens_details.get("proposed"))


def _count_drafts(reply: Reply, histogram: list[int], proposed: int | None) -> None:
    reply.histogram, reply.proposed = histogram, proposed
    try:
        Acceptance.of_request(histogram, reply.completion_tokens, proposed)
    except (TypeError, ValueError) as error:
        raise ReplyError(f"the reply counts {proposed!r} proposed drafts: {error}") from None


def _vllms_counts(counts: Any) -> tuple[list[int], int]:
    """The histogram and the number of proposed drafts in metrics.speculative_decoding."""
    try:
        histogram = [int(n) for n in counts["acceptance_histogram"]]
        steps, proposed = int(counts["num_spec_steps"]), int(counts["num_draft_tokens"])
        histogram += [0] * (int(counts["num_spec_tokens"]) + 1 - len(histogram))
    except (KeyError, TypeError, ValueError) as error:
        raise ReplyError(f"metrics.speculative_decoding cannot be read: {type(error).__name__}: {error}") from None
    if sum(histogram) != steps:
        raise ReplyError(
            f"metrics.speculative_decoding counts {steps} verify steps and a histogram of {sum(histogram)}"
        )
    return histogram, proposed


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
