"""Clients of OpenAI-compatible servers: how to connect, and the one that asks the target for training text."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from ipaddress import ip_address
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import openai
from openai.types import Completion
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from sglang_auf.env import CLIENT_API_KEY, client_api_key
from sglang_auf.errors import ConfigError, ServerError
from sglang_auf.settings import enable_thinking
from sglang_auf.training.generation.settings import GenerationSettings
from sglang_auf.training.text.chats import Chat

logger = logging.getLogger(__name__)

EXACT_IDS = {"return_input_ids_in_sglext": True, "return_output_ids_in_sglext": True}
"""SGLang's request fields for exact token ids in the reply."""
TOKEN_IDS = {"return_token_ids": True}
"""vLLM's field for them. SGLang knows it too, and refuses it in a stream."""
THOUGHTS = ("reasoning_content", "reasoning")
"""Where a server's reasoning parser puts a thought: SGLang's field, and vLLM's since it renamed its own."""
UNSHAPED = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""SGLang's request fields that keep a model's generation_config.json from shaping the distribution."""
FINISHED = ("stop", "length", "tool_calls")


@cache
def tls() -> ssl.SSLContext:
    """One for all clients of the process: each would read the system's certificates again, even for an http:// URL."""
    return httpx.create_ssl_context()


def is_local(url: str) -> bool:
    """Whether a server is on this machine: `localhost`, 127.0.0.1 and the like. No proxy is asked for it."""
    host = urlsplit(url).hostname or ""
    try:
        address = ip_address(host)
    except ValueError:
        return host == "localhost"
    return address.is_loopback or address.is_unspecified


IDLE_S = 2.0
"""An idle connection is used again for so long. SGLang and vLLM close it after 5 s, which is httpx's default too: a
request that is sent just then fails."""


def openai_client(
    base_url: str,
    *,
    connections: int,
    timeout_s: float,
    retries: int,
    on_request: Callable[[httpx.Request], Awaitable[None]] | None = None,
) -> openai.AsyncOpenAI:
    """base_url: with its path ("/v1"). connections: open at once, at most. timeout_s: of one HTTP request.

    retries: how often a failed request is sent again if the failure may pass; the pauses grow. on_request: called for
    each HTTP request, also for retries.
    """
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=IDLE_S)
    hooks = {"request": [on_request]} if on_request else {}
    return openai.AsyncOpenAI(
        base_url=base_url,
        api_key=client_api_key(),
        max_retries=retries,
        timeout=httpx.Timeout(timeout_s, connect=min(30.0, timeout_s), pool=None),
        http_client=openai.DefaultAsyncHttpxClient(
            limits=limits, event_hooks=hooks, verify=tls(), trust_env=not is_local(base_url)
        ),
    )


def template_fields(thinking: str) -> dict[str, Any]:
    """Request fields for the template's variable enable_thinking; none where `thinking` is "server"."""
    enabled = enable_thinking(thinking)
    return {} if enabled is None else {"chat_template_kwargs": {"enable_thinking": enabled}}


class SglExt(BaseModel):
    """SGLang's extension of a reply. Only the fields that are read here."""

    model_config = ConfigDict(extra="ignore")

    input_ids: list[int] | None = None
    output_ids: list[list[int]] | None = None
    spec_tokens_details: Any = None
    spans: Any = None

    @classmethod
    def of(cls, reply: BaseModel) -> Self:
        """The extension of a reply or of a chunk; empty if there is none. Raises ValueError if it cannot be read."""
        try:
            return cls.model_validate((reply.model_extra or {}).get("sglext") or {})
        except ValidationError as error:
            raise ValueError(f"sglext of the reply cannot be read: {error.errors()[0]['msg']}") from error


_IDS: TypeAdapter[list[int] | None] = TypeAdapter(list[int] | None)


def token_ids(part: BaseModel, name: str) -> list[int] | None:
    """Token ids in a field of a reply or choice that OpenAI does not have. Raises ValueError if they are none."""
    try:
        return _IDS.validate_python((part.model_extra or {}).get(name))
    except ValidationError as error:
        raise ValueError(f"{name} of the reply cannot be read: {error.errors()[0]['msg']}") from error


class AnswerError(Exception):
    """Why a question got no answer. server: the fault is the server's, not the question's."""

    def __init__(self, reason: str, server: bool) -> None:
        super().__init__(reason)
        self.server = server


@dataclass(frozen=True, slots=True)
class Answer:
    """tokens: generated ones, 0 where the server does not count. The ids are None where the server gives none."""

    text: str
    reasoning: str | None
    tool_calls: list[dict[str, Any]] | None
    finish_reason: str
    prompt_ids: list[int] | None
    response_ids: list[int] | None
    tokens: int


class TargetClient:
    """Asks the server at settings.base_url, to which "/v1" is added where it has no path."""

    def __init__(self, settings: GenerationSettings, thinking: str = "server") -> None:
        path = "" if urlsplit(settings.base_url).path.strip("/") else "/v1"
        self.base_url = settings.base_url.rstrip("/") + path
        self._openai = openai_client(
            self.base_url,
            connections=settings.concurrency,
            timeout_s=settings.timeout_s,
            retries=settings.retries,
        )
        self._options: dict[str, Any] = {
            "temperature": settings.temperature,
            "top_p": 1.0,
            "max_tokens": settings.max_tokens,
        }
        self._template_fields = template_fields(thinking)
        self._extras: dict[str, Any] = {**EXACT_IDS, **TOKEN_IDS, **UNSHAPED}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._openai.close()

    async def only_model(self) -> str:
        """The model that the server lists, if it is the only one. Raises ConfigError or ServerError."""
        try:
            models = [model.id async for model in await self._openai.models.list()]
        except (openai.OpenAIError, httpx.HTTPError, ValueError, AttributeError) as error:
            raise self._unusable(error) from error
        if len(models) != 1:
            raise ConfigError(
                f"{self.base_url} serves {', '.join(models) or 'no model'}", "one model", "name it: --model"
            )
        return models[0]

    async def answer(self, model: str, chat: Chat, seed: int) -> Answer:
        """Raises AnswerError, or ServerError if the server would answer no question at all."""
        question: dict[str, Any] = {"model": model, "messages": chat.messages, "seed": seed, **self._options}
        if chat.tools:
            question["tools"] = chat.tools
        asked = chat.template_kwargs | self._template_fields.get("chat_template_kwargs", {})
        with self._faults():
            return _read(await self._ask(question, {"chat_template_kwargs": asked} if asked else {}))

    async def complete(self, model: str, ids: Sequence[int], end: int | None, seed: int) -> Answer:
        """How the model continues `ids`, without a template. Raises as `answer` does.

        end: a token that ends the text, beside the model's own end token.
        """
        more = None if end is None else {"stop_token_ids": [end]}  # a field of SGLang and vLLM
        with self._faults():
            reply = await self._openai.completions.create(
                model=model, prompt=list(ids), seed=seed, extra_body=more, **self._options
            )
        if not isinstance(reply, Completion) or not reply.choices:
            raise AnswerError("the reply is no completion", server=True)
        choice = reply.choices[0]
        if choice.finish_reason not in FINISHED:
            raise AnswerError(f"the text ended with finish_reason {choice.finish_reason!r}", server=True)
        tokens = reply.usage.completion_tokens if reply.usage else 0
        return Answer(choice.text, None, None, choice.finish_reason, None, None, tokens)

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise self._unusable(error) from error
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            raise AnswerError(
                f"refused with status {error.status_code}: {error.message[:300]}", server=False
            ) from error
        except (openai.OpenAIError, httpx.HTTPError, ValueError) as error:
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            raise AnswerError(f"{type(error).__name__}: {str(error)[:300]}{cause}", server=True) from error

    async def _ask(self, question: dict[str, Any], template_fields: dict[str, Any]) -> object:
        """Ask with the extra fields. Once a server has refused them, they are left out."""
        extras = self._extras
        try:
            return await self._openai.chat.completions.create(**question, extra_body={**extras, **template_fields})
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            if not extras:
                raise
        reply = await self._openai.chat.completions.create(**question, extra_body=template_fields)
        if self._extras:
            self._extras = {}
            logger.warning(
                "the server refuses the request fields %s: answers come without exact token ids, and the server's "
                "defaults of sampling apply",
                ", ".join(extras),
            )
        return reply

    def _unusable(self, error: Exception) -> ServerError:
        return ServerError(
            f"{type(error).__name__} from {self.base_url}: {str(error)[:300]}",
            "an OpenAI-compatible server that is up, and a model it serves",
            f"check --base-url and --model; an API key is read from {CLIENT_API_KEY}",
        )


def _read(reply: object) -> Answer:
    """Raises AnswerError for a reply that is no answer, ValueError for token ids that cannot be read."""
    if not isinstance(reply, ChatCompletion) or not reply.choices:
        raise AnswerError("the reply is no chat completion", server=True)
    choice = reply.choices[0]
    if choice.finish_reason not in FINISHED:
        raise AnswerError(f"the answer ended with finish_reason {choice.finish_reason!r}", server=False)
    extension = SglExt.of(reply)
    prompt_ids = extension.input_ids or token_ids(reply, "prompt_token_ids")
    response_ids = extension.output_ids[0] if extension.output_ids else token_ids(choice, "token_ids")
    calls = choice.message.tool_calls
    return Answer(
        text=choice.message.content or "",
        reasoning=_thought(choice.message),
        tool_calls=[call.model_dump(exclude_none=True) for call in calls] if calls else None,
        finish_reason=choice.finish_reason,
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        tokens=reply.usage.completion_tokens if reply.usage else len(response_ids or []),
    )


def _thought(message: BaseModel) -> str | None:
    """None where the answer has none, or an empty one. Raises AnswerError where two fields give different ones."""
    given = [(message.model_extra or {}).get(name) for name in THOUGHTS]
    thoughts = {thought for thought in given if isinstance(thought, str) and thought.strip()}
    if len(thoughts) > 1:
        raise AnswerError(f"the answer has two thoughts, in {' and '.join(THOUGHTS)}", server=True)
    return thoughts.pop() if thoughts else None
