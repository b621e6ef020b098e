"""One answer of an OpenAI-compatible server, with its exact token ids where the server gives them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import openai
from openai.types import Completion
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sglang_auf.errors import ConfigError, ServerError
from sglang_auf.training.data.rows import Message

log = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"

# SGLang's request fields: exact ids in the reply, and no shaping of the distribution by generation_config.json.
EXTRAS = {
    "return_input_ids_in_sglext": True,
    "return_output_ids_in_sglext": True,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
FINISHED = ("stop", "length")


class AnswerError(Exception):
    """Why a question got no answer. server: the server was at fault, not the question."""

    def __init__(self, reason: str, server: bool) -> None:
        super().__init__(reason)
        self.server = server


@dataclass(frozen=True, slots=True)
class Answer:
    """tokens: generated ones, 0 where the server does not count. Ids are None where it gives none."""

    text: str
    reasoning: str | None
    finish_reason: str
    prompt_ids: list[int] | None
    response_ids: list[int] | None
    tokens: int


class _SglExt(BaseModel):
    model_config = ConfigDict(extra="ignore")

    input_ids: list[int] | None = None
    output_ids: list[list[int]] | None = Field(default=None, min_length=1)


class ChatServer:
    """base_url: with its path ("/v1"), which is added where there is none. Failures that may pass are tried again by
    the client, `retries` times with growing pauses."""

    def __init__(
        self,
        base_url: str,
        *,
        concurrency: int,
        temperature: float,
        max_tokens: int,
        thinking: bool | None,
        timeout_s: float,
        retries: int,
    ) -> None:
        self.base_url = base_url.rstrip("/") + ("" if urlsplit(base_url).path.strip("/") else "/v1")
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        self._client = openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=os.environ.get(KEY_VARIABLE, "EMPTY"),
            max_retries=retries,
            timeout=httpx.Timeout(timeout_s, connect=30.0, pool=None),
            http_client=openai.DefaultAsyncHttpxClient(limits=limits),
        )
        self._options: dict[str, Any] = {"temperature": temperature, "top_p": 1.0, "max_tokens": max_tokens}
        self._wanted = {} if thinking is None else {"chat_template_kwargs": {"enable_thinking": thinking}}
        self._extras: dict[str, Any] = dict(EXTRAS)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def only_model(self) -> str:
        """The model a server lists, if it is the only one. Raises ConfigError or ServerError."""
        try:
            models = [model.id async for model in await self._client.models.list()]
        except (openai.OpenAIError, httpx.HTTPError, ValueError, AttributeError) as error:
            raise self._unusable(error) from error
        if len(models) != 1:
            raise ConfigError(
                f"{self.base_url} serves {', '.join(models) or 'no model'}", "one model", "name it: --model"
            )
        return models[0]

    async def answer(self, model: str, messages: Sequence[Message], seed: int) -> Answer:
        """Raises AnswerError, or ServerError where no question would get an answer."""
        question: dict[str, Any] = {"model": model, "messages": messages, "seed": seed, **self._options}
        with self._faults():
            return _read(await self._ask(question))

    async def go_on(self, model: str, ids: Sequence[int], end: int | None, seed: int) -> Answer:
        """What the model says after `ids`, without a template, to its own end or to token `end`; raises as `answer`."""
        more = None if end is None else {"stop_token_ids": [end]}  # a field of SGLang's and vLLM's
        with self._faults():
            reply = await self._client.completions.create(
                model=model, prompt=list(ids), seed=seed, extra_body=more, **self._options
            )
        if not isinstance(reply, Completion) or not reply.choices:
            raise AnswerError("the reply is no completion", server=True)
        choice = reply.choices[0]
        if choice.finish_reason not in FINISHED:
            raise AnswerError(f"the text ended with finish_reason {choice.finish_reason!r}", server=True)
        tokens = reply.usage.completion_tokens if reply.usage else 0
        return Answer(choice.text, None, choice.finish_reason, None, None, tokens)

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

    async def _ask(self, question: dict[str, Any]) -> object:
        """A server that refuses the extra fields is asked without them, from then on."""
        extras = self._extras
        try:
            return await self._client.chat.completions.create(**question, extra_body={**extras, **self._wanted})
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            if not extras:
                raise
        reply = await self._client.chat.completions.create(**question, extra_body=self._wanted)
        if self._extras:
            self._extras = {}
            log.warning(
                "the server refuses the request fields %s: its answers come as text only, without exact token ids, and "
                "its own defaults of sampling hold",
                ", ".join(EXTRAS),
            )
        return reply

    def _unusable(self, error: Exception) -> ServerError:
        return ServerError(
            f"{type(error).__name__} from {self.base_url}: {str(error)[:300]}",
            "an OpenAI-compatible server that is up, and a model it serves",
            f"check --base-url and --model; an API key is read from {KEY_VARIABLE}",
        )


def _read(reply: object) -> Answer:
    """Raises AnswerError for a reply that is none."""
    if not isinstance(reply, ChatCompletion) or not reply.choices:
        raise AnswerError("the reply is no chat completion", server=True)
    choice = reply.choices[0]
    if choice.finish_reason not in FINISHED:
        raise AnswerError(f"the answer ended with finish_reason {choice.finish_reason!r}", server=False)
    try:
        extension = _SglExt.model_validate((reply.model_extra or {}).get("sglext") or {})
    except ValidationError as error:
        raise AnswerError(f"sglext of the reply cannot be read: {error.errors()[0]['msg']}", server=True) from error
    reasoning = (choice.message.model_extra or {}).get("reasoning_content")
    response_ids = extension.output_ids[0] if extension.output_ids else None
    return Answer(
        text=choice.message.content or "",
        reasoning=reasoning if isinstance(reasoning, str) else None,
        finish_reason=choice.finish_reason,
        prompt_ids=extension.input_ids,
        response_ids=response_ids,
        tokens=reply.usage.completion_tokens if reply.usage else len(response_ids or []),
    )
