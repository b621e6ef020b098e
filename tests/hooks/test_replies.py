"""Tau in OpenAI replies: SGLang's own server and serving code over scripted counts, read with the openai client.

What a script such as "3 0 7 cut 2" means is in scripted_server.py.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI
from openai.types import CompletionUsage
from openai.types.completion_usage import CompletionTokensDetails

from sglang_auf.acceptance import Acceptance, total_acceptance
from sglang_auf.hooks.replies import FIGURES

BLOCK = 8
SHAPES = [(chat, stream) for chat in (True, False) for stream in (True, False)]
shapes = pytest.mark.parametrize(("chat", "stream"), SHAPES, ids=lambda value: str(value))


@dataclass
class Reply:
    """What the client saw: usage, sglext's details and every chunk (one, if not streamed) as a plain dictionary."""

    usage: CompletionUsage | None
    details: Any
    chunks: list[dict[str, Any]]

    @property
    def completion(self) -> CompletionTokensDetails:
        """usage.completion_tokens_details, which must be there."""
        assert self.usage is not None
        assert self.usage.completion_tokens_details is not None
        return self.usage.completion_tokens_details


async def request(client: AsyncOpenAI, script: str, chat: bool, stream: bool, usage: bool = True, **more: Any) -> Reply:
    arguments: dict[str, Any] = {"model": "scripted", "max_tokens": 100, **more}
    if stream:
        arguments |= {"stream": True, "stream_options": {"include_usage": usage}}
    if chat:
        reply = await client.chat.completions.create(messages=[{"role": "user", "content": script}], **arguments)
    else:
        reply = await client.completions.create(prompt=script, **arguments)
    chunks = [chunk async for chunk in reply] if stream else [reply]
    with_usage = [chunk.usage for chunk in chunks if chunk.usage is not None]
    with_details = [
        chunk.model_extra["sglext"]["spec_tokens_details"] for chunk in chunks if "sglext" in (chunk.model_extra or {})
    ]
    assert len(with_usage) <= 1
    assert len(with_details) <= 1
    return Reply(
        with_usage[0] if with_usage else None,
        with_details[0] if with_details else None,
        [chunk.model_dump() for chunk in chunks],
    )


def ask(address: str, script: str, chat: bool, stream: bool, **more: Any) -> Reply:
    async def once() -> Reply:
        async with AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            return await request(client, script, chat, stream, **more)

    return asyncio.run(once())


def counted(*accepted: int, cut: int = 0) -> Acceptance:
    histogram = [accepted.count(a) for a in range(BLOCK)]
    return Acceptance.of_request(histogram, 1 + sum(accepted) + len(accepted) - cut)


def figures(acceptance: Acceptance) -> dict[str, Any]:
    return {name: acceptance.as_dict()[name] for name in FIGURES}


def ours(details: dict[str, Any]) -> dict[str, Any]:
    return {name: details[name] for name in FIGURES}


def carries_nothing(reply: Reply) -> bool:
    text = str(reply.chunks)
    return not any(word in text for word in ("sglext", "tau", "spec_")) and (
        reply.usage is None or reply.usage.completion_tokens_details is None
    )


@pytest.fixture
def auf(scripted_server: str) -> Iterator[str]:
    """The server as an AUF server, which it is again after a test that made it another."""
    yield scripted_server
    httpx.post(f"{scripted_server}/algorithm", params={"name": "AUF"}).raise_for_status()


@shapes
def test_a_reply_carries_tau_without_a_flag(auf: str, chat: bool, stream: bool) -> None:
    reply = ask(auf, "3 0 7 cut 2", chat, stream)
    assert ours(reply.details) == figures(counted(3, 0, 7, cut=2))
    assert reply.details["tau"] == 11 / 3
    assert reply.details["spec_correct_drafts_histogram"] == [1, 0, 0, 1, 0, 0, 0, 1]
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 12
    assert reply.completion.accepted_prediction_tokens == 10
    assert reply.completion.rejected_prediction_tokens == 11


@shapes
def test_the_histogram_has_the_block_size_however_short_sglang_keeps_it(auf: str, chat: bool, stream: bool) -> None:
    reply = ask(auf, "1 0", chat, stream)
    assert reply.details["spec_correct_drafts_histogram"] == [1, 1]
    assert reply.details["accepted_histogram"] == [1, 1, 0, 0, 0, 0, 0, 0]
    assert reply.details["alpha"] == [0.5, 0.0, None, None, None, None, None]


@shapes
def test_several_choices_give_a_list_and_summed_usage(auf: str, chat: bool, stream: bool) -> None:
    reply = ask(auf, "2 next 5 5 next 0 1 cut 1", chat, stream, n=3)
    choices = [counted(2), counted(5, 5), counted(0, 1, cut=1)]
    assert [ours(details) for details in reply.details] == [figures(choice) for choice in choices]
    assert reply.completion.accepted_prediction_tokens == total_acceptance(choices).accepted == 13
    assert reply.completion.rejected_prediction_tokens == total_acceptance(choices).rejected


@shapes
def test_a_choice_without_a_verify_step_is_left_out_of_the_list(auf: str, chat: bool, stream: bool) -> None:
    reply = ask(auf, "cut 0 next 4", chat, stream, n=2)
    assert [ours(details) for details in reply.details] == [figures(counted(4))]


def test_several_prompts_share_one_usage(auf: str) -> None:
    async def once() -> Any:
        async with AsyncOpenAI(base_url=f"{auf}/v1", api_key="none", max_retries=0) as client:
            return await client.completions.create(model="scripted", prompt=["3 1", "2 2 2"], max_tokens=100)

    reply = asyncio.run(once())
    assert reply.usage.completion_tokens_details.accepted_prediction_tokens == 10
    assert reply.usage.completion_tokens_details.rejected_prediction_tokens == 5 * (BLOCK - 1) - 10


@shapes
def test_reasoning_tokens_stay(auf: str, chat: bool, stream: bool) -> None:
    reply = ask(auf, "think 2 4", chat, stream)
    assert reply.completion.reasoning_tokens == 2
    assert reply.completion.accepted_prediction_tokens == 4


@shapes
def test_an_aborted_answer_says_what_it_had(auf: str, chat: bool, stream: bool) -> None:
    assert ours(ask(auf, "5 6 abort", chat, stream).details) == figures(counted(5, 6))


@shapes
def test_a_reply_without_a_verify_step_carries_nothing(auf: str, chat: bool, stream: bool) -> None:
    assert carries_nothing(ask(auf, "cut 0", chat, stream))
    assert carries_nothing(ask(auf, "3 queue", chat, stream))


@shapes
def test_a_request_can_turn_it_off(auf: str, chat: bool, stream: bool) -> None:
    assert carries_nothing(ask(auf, "3 0 7", chat, stream, extra_body={"return_spec_tokens_details": False}))


@shapes
def test_asking_for_it_changes_nothing(auf: str, chat: bool, stream: bool) -> None:
    asked = ask(auf, "3 0 7", chat, stream, extra_body={"return_spec_tokens_details": True})
    unasked = ask(auf, "3 0 7", chat, stream)
    assert (asked.details, asked.usage) == (unasked.details, unasked.usage)


@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_without_usage_still_has_its_details_in_a_chunk_without_choices(auf: str, chat: bool) -> None:
    reply = ask(auf, "3 0 7", chat, stream=True, usage=False)
    assert reply.usage is None
    assert ours(reply.details) == figures(counted(3, 0, 7))
    assert [chunk["choices"] for chunk in reply.chunks if "sglext" in chunk] == [[]]


@shapes
def test_a_plain_server_carries_nothing(auf: str, chat: bool, stream: bool) -> None:
    httpx.post(f"{auf}/algorithm").raise_for_status()
    assert carries_nothing(ask(auf, "3 0 7", chat, stream))
    assert carries_nothing(ask(auf, "3 0 7", chat, stream, extra_body={"return_spec_tokens_details": True}))


@shapes
def test_another_algorithm_keeps_sglangs_replies(auf: str, chat: bool, stream: bool) -> None:
    httpx.post(f"{auf}/algorithm", params={"name": "DFLASH"}).raise_for_status()
    assert carries_nothing(ask(auf, "3 0 7", chat, stream))
    asked = ask(auf, "3 0 7", chat, stream, extra_body={"return_spec_tokens_details": True})
    assert asked.details["spec_verify_ct"] == 3
    assert not set(FIGURES) & set(asked.details)
    assert asked.usage is not None
    assert asked.usage.completion_tokens_details is None


def test_replies_made_at_once_do_not_mix(auf: str) -> None:
    scripts = [tuple((i * j) % BLOCK for j in range(1, 2 + i % 5)) for i in range(48)]

    async def all_at_once() -> list[Reply]:
        async with AsyncOpenAI(base_url=f"{auf}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(
                *(
                    request(client, " ".join(map(str, script)), *SHAPES[i % len(SHAPES)])
                    for i, script in enumerate(scripts)
                )
            )

    for script, reply in zip(scripts, asyncio.run(all_at_once()), strict=True):
        assert ours(reply.details) == figures(counted(*script))
        assert reply.completion.accepted_prediction_tokens == sum(script)


def test_importing_needs_neither_sglang_nor_prometheus() -> None:
    check = (
        "import sys, sglang_auf.hooks.replies, sglang_auf.hooks.metrics;"
        "sys.exit(bool({'sglang', 'torch', 'prometheus_client'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize(("route", "field"), [("/api/chat", "message"), ("/api/generate", "response")])
def test_ollamas_streams_bring_all_of_the_text(auf: str, route: str, field: str) -> None:
    """The last verify step of this answer brings 8 tokens together with its end."""
    script = "3 0 7"
    asked = {"model": "scripted", "messages": [{"role": "user", "content": script}], "prompt": script}
    asked["options"] = {"num_predict": 100}
    whole = httpx.post(auf + route, json={**asked, "stream": False}).raise_for_status().json()
    lines = httpx.post(auf + route, json={**asked, "stream": True}).raise_for_status().text.splitlines()
    chunks = [json.loads(line) for line in lines]
    texts = [chunk[field]["content"] if field == "message" else chunk[field] for chunk in (whole, *chunks)]
    assert texts[0] == "".join(texts[1:]) == "a " * (1 + 4 + 1 + 8)
    assert [chunk["done"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
