"""The kinds of request that a soak sends. Each answer is checked against the one of plain decoding."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import openai

from benchmarks.harness.client import record_header
from benchmarks.harness.template_prompts import demo_prompts
from sglang_auf.training.generation.client import openai_client

LENGTHS = (8, 40, 160)
"""New tokens of an answer, used in turn: short answers end while long ones go on, so that batches keep changing."""

GRAMMAR = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "schema": {
            "type": "object",
            "properties": {"item": {"type": "string", "maxLength": 24}, "count": {"type": "integer", "maximum": 99}},
            "required": ["item", "count"],
            "additionalProperties": False,
        },
    },
}
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "extra_body": {"top_k": 40}}
LEFT_AFTER = 3
ABANDONED_S = 0.3
CONNECTIONS = 1000
"""More than a soak has clients, so that no request waits in the client."""


class Wrong(Exception):
    """An answer that is not what it must be."""


@dataclass(frozen=True, slots=True)
class Question:
    """max_tokens: new tokens to ask for. greedy, seeded, constrained: the texts of plain decoding for it.

    seeded is sampled with `seed`; constrained follows GRAMMAR.
    """

    prompt: str
    max_tokens: int
    seed: int
    greedy: str = ""
    seeded: str = ""
    constrained: str = ""

    @property
    def asked(self) -> dict[str, Any]:
        message = {"role": "user", "content": self.prompt}
        return {"messages": [message], "max_tokens": self.max_tokens, "temperature": 0}


def questions(count: int) -> list[Question]:
    rows = demo_prompts(count)
    prompts = [str(row["turns"][0]) for row in rows]  # type: ignore[index]
    return [Question(prompt, LENGTHS[number % 3], seed=number) for number, prompt in enumerate(prompts)]


class Sender:
    """Asks one server under the name `model`. Nothing is retried."""

    def __init__(self, base_url: str, model: str, timeout_s: float, recorded: bool = False) -> None:
        """recorded: a server that records may keep the answers."""
        # One client for all requests, as programs have it: a client for each would also open a connection for each.
        self.client = openai_client(f"{base_url}/v1", connections=CONNECTIONS, timeout_s=timeout_s, retries=0)
        self.model = model
        self.headers = record_header(recorded)

    async def chat(self, question: Question, **changes: Any) -> Any:
        asked = {"model": self.model, "extra_headers": self.headers} | question.asked | changes
        return await self.client.chat.completions.create(**asked)

    async def reference(self, question: Question) -> Question:
        """The question with the texts of this server, which must decode plainly."""
        texts = [
            (await self.chat(question, **changes)).choices[0].message.content or ""
            for changes in ({}, SAMPLED | {"seed": question.seed}, {"response_format": GRAMMAR})
        ]
        return Question(question.prompt, question.max_tokens, question.seed, *texts)


async def whole(sender: Sender, question: Question) -> None:
    reply = await sender.chat(question)
    _same(reply.choices[0].message.content, question.greedy)


async def streamed(sender: Sender, question: Question) -> None:
    text = ""
    async for chunk in await sender.chat(question, stream=True):
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    _same(text, question.greedy)


async def choices(sender: Sender, question: Question) -> None:
    reply = await sender.chat(question, n=3)
    if len(reply.choices) != 3:
        raise Wrong(f"{len(reply.choices)} choices for n = 3")
    for choice in reply.choices:
        _same(choice.message.content, question.greedy)


async def logprobs(sender: Sender, question: Question) -> None:
    reply = await sender.chat(question, logprobs=True, top_logprobs=2)
    _same(reply.choices[0].message.content, question.greedy)
    given = len(reply.choices[0].logprobs.content)
    if given != reply.usage.completion_tokens:
        raise Wrong(f"log-probabilities of {given} tokens for {reply.usage.completion_tokens}")


async def grammar(sender: Sender, question: Question) -> None:
    reply = await sender.chat(question, response_format=GRAMMAR)
    _same(reply.choices[0].message.content, question.constrained)
    if reply.choices[0].finish_reason == "stop":
        try:
            json.loads(reply.choices[0].message.content)
        except ValueError as error:
            raise Wrong(f"no JSON under a grammar ({error})") from error


async def seeded(sender: Sender, question: Question) -> None:
    reply = await sender.chat(question, **(SAMPLED | {"seed": question.seed}))
    _same(reply.choices[0].message.content, question.seeded)


async def sampled(sender: Sender, question: Question) -> None:
    reply = await sender.chat(question, temperature=1.0)
    if reply.usage.completion_tokens < 1:
        raise Wrong("an answer without a token")


async def left(sender: Sender, question: Question) -> None:
    """A client that closes its stream in the middle."""
    stream = await sender.chat(question, stream=True)
    read = 0
    async for _ in stream:
        read += 1
        if read == LEFT_AFTER:
            break
    await stream.close()


async def abandoned(sender: Sender, question: Question) -> None:
    """A client that gives up before the answer is complete."""
    try:
        await sender.chat(question, timeout=ABANDONED_S)
    except openai.APITimeoutError:
        return


BAD: tuple[dict[str, Any], ...] = (
    {"max_tokens": -1},
    {"max_tokens": 10**7},
    {"temperature": -3},
    {"top_p": 7},
    {"n": 0},
    {"messages": []},
    {"messages": [{"role": "user"}]},
    {"model": "none of this name"},
    {"frequency_penalty": 1.0},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
    {"extra_body": {"min_tokens": 3}},
    {"extra_body": {"regex": "("}},
    {"logprobs": True, "top_logprobs": 60000},
    {"logit_bias": {"1": 101}},
    {"logit_bias": {"10000000": 1}},
    {"n": 10**9},
    {"seed": 2**70},
    {"extra_body": {"top_k": 2**40}},
    {"extra_body": {"stop_token_ids": [2**70]}},
    {"extra_body": {"bootstrap_room": []}},
)
REFUSALS = (400, 404, 422)


async def bad(sender: Sender, question: Question) -> None:
    """A request that must be refused as the client's fault, with a reason. The question decides which of BAD it is."""
    changes = BAD[question.seed % len(BAD)]
    try:
        await sender.chat(question, **changes)
    except openai.APIStatusError as refusal:
        if refusal.status_code in REFUSALS and refusal.message:
            return
        raise
    raise Wrong(f"an answer to a request with {changes}")


Kind = Callable[[Sender, Question], Awaitable[None]]
KINDS: dict[Kind, int] = {
    whole: 4,
    streamed: 4,
    choices: 1,
    logprobs: 1,
    grammar: 1,
    seeded: 2,
    sampled: 2,
    left: 2,
    abandoned: 1,
    bad: 2,
}
"""Each kind and how often it is drawn."""

BROKEN = (openai.APIConnectionError, httpx.HTTPError)
"""What a request raises when the server is gone, hangs up or does not answer in time."""


def _same(text: str | None, reference: str) -> None:
    if text != reference:
        raise Wrong(f"{text!r} for {reference!r}")
