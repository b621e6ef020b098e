from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from openai.types.chat import ChatCompletionChunk

from benchmarks.harness.client import ChatClient, Reply, ReplyError, _extend, histogram_of
from benchmarks.harness.config import Workload
from benchmarks.harness.sources.prompt import TokenIds

MESSAGES = [{"role": "user", "content": "sum 1"}]


def ask(url: str, stream: bool, text: str = "sum 1", seed: int | None = None, **settings: Any) -> Reply:
    async def once() -> Reply:
        async with ChatClient(url, "toy", Workload(**settings), stream) as client:
            return await client.ask([{"role": "user", "content": text}], seed)

    return asyncio.run(once())


@pytest.mark.parametrize("fields", ["plugin", "sglang"])
def test_streamed_and_whole_replies_say_the_same(fake: Callable[..., Any], fields: str) -> None:
    server = fake(fields=fields)
    tokens = server.engine.tokens(MESSAGES, 512)
    whole, streamed = ask(server.url, stream=False), ask(server.url, stream=True)
    assert whole.output_ids == tokens
    assert whole.completion_tokens == len(tokens)
    assert whole.histogram == server.engine.histogram(tokens)
    assert whole.ttft_s is None
    assert streamed.ttft_s is not None
    streamed.ttft_s = None
    assert streamed == whole


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("cached", [None, 0, 3])
def test_what_the_prefix_cache_had_is_kept_where_it_is_said(
    fake: Callable[..., Any], stream: bool, cached: int | None
) -> None:
    assert ask(fake(cached=cached).url, stream).cached_tokens == cached


def test_a_plain_reply_has_no_steps(fake: Callable[..., Any]) -> None:
    assert ask(fake(speculative=False).url, stream=False).histogram == []


def test_conditions_do_not_depend_on_the_model_folder(fake: Callable[..., Any]) -> None:
    server = fake()
    ask(server.url, stream=False, seed=7, temperature=1.0, max_tokens=9)
    body = server.engine.requests[0]
    sent = {name: body[name] for name in ("top_p", "top_k", "min_p", "repetition_penalty", "temperature", "seed")}
    assert sent == {
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "seed": 7,
    }
    assert body["max_tokens"] == 9


@pytest.mark.parametrize(("thinking", "sent"), [("off", {"enable_thinking": False}), ("on", {"enable_thinking": True})])
def test_thinking_is_sent(fake: Callable[..., Any], thinking: str, sent: dict[str, bool]) -> None:
    server = fake()
    ask(server.url, stream=False, thinking=thinking)
    assert server.engine.requests[0]["chat_template_kwargs"] == sent


def test_thinking_can_be_left_to_the_server(fake: Callable[..., Any]) -> None:
    server = fake()
    ask(server.url, stream=False, thinking="server")
    assert "chat_template_kwargs" not in server.engine.requests[0]


@pytest.mark.parametrize("stream", [True, False])
def test_a_text_is_continued_without_a_template(fake: Callable[..., Any], stream: bool) -> None:
    server = fake()

    async def once() -> Reply:
        async with ChatClient(server.url, "toy", Workload(), stream) as client:
            return await client.ask("def f(", seed=3)

    reply = asyncio.run(once())
    (body,) = server.engine.continued
    assert (body["prompt"], body["seed"], body["top_k"]) == ("def f(", 3, -1)
    tokens = server.engine.tokens([{"role": "raw", "content": "def f("}], 512)
    assert reply.output_ids == tokens
    assert reply.prompt_ids == list(b'"def f("')
    assert reply.histogram == server.engine.histogram(tokens)
    assert reply.text == "".join(f"t{token} " for token in tokens)
    assert (reply.ttft_s is not None) == stream


def test_what_a_row_gives_the_template_goes_with_the_workloads_thinking(fake: Callable[..., Any]) -> None:
    server = fake()

    async def once() -> None:
        async with ChatClient(server.url, "toy", Workload(thinking="on"), False) as client:
            await client.ask(MESSAGES, request={"tools": [], "chat_template_kwargs": {"style": "short"}})
            await client.ask(MESSAGES)

    asyncio.run(once())
    first, second = server.engine.requests
    assert first["chat_template_kwargs"] == {"style": "short", "enable_thinking": True}
    assert first["tools"] == []
    assert second["chat_template_kwargs"] == {"enable_thinking": True}, "the row's own are not kept"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("asked", [MESSAGES, "def f(", TokenIds((1, 2))])
def test_an_answer_is_recorded_only_where_that_is_asked_for(fake: Callable[..., Any], asked: Any, stream: bool) -> None:
    server = fake()

    async def ask_twice() -> None:
        async with ChatClient(server.url, "toy", Workload(), stream, spans=True) as client:
            await client.ask(asked)
            await client.ask(asked, recorded=True)

    asyncio.run(ask_twice())
    assert server.engine.unrecorded == ["off", "on"]


@pytest.mark.parametrize("number", range(6))
def test_steps_are_read_from_spans(fake: Callable[..., Any], number: int) -> None:
    server = fake()
    messages = [{"role": "user", "content": f"sum {number}"}]

    async def once(spans: bool) -> Reply:
        async with ChatClient(server.url, "toy", Workload(), True, spans=spans) as client:
            return await client.ask(messages)

    assert asyncio.run(once(spans=False)).accepted_by_step is None
    assert asyncio.run(once(spans=True)).accepted_by_step == server.engine.steps(server.engine.tokens(messages, 512))


@pytest.mark.parametrize(
    ("drafted", "histogram", "steps"),
    [
        ("p", [0, 0, 0], []),
        ("p0", [1, 0, 0], [0]),
        ("p110100", [2, 0, 1], None),
        ("p1101000", [2, 1, 1], [2, 1, 0, 0]),
        ("p10110", [0, 1, 1], [1, 2]),
        ("p101", [0, 1, 1], [1, 2]),  # the last step accepted two; a stop left one of them
        ("p1011", [0, 1, 1], [1, 2]),
        ("p1011", [0, 2, 0], None),  # one that accepted one cannot leave two
        ("p00?", [2, 1, 0], None),
        ("p000", [2, 0, 0], None),  # a token that no step emitted: the server began again
        ("p1", [1, 0, 0], None),
    ],
)
def test_steps_that_are_not_certain_are_not_known(drafted: str, histogram: list[int], steps: list[int] | None) -> None:
    told = [{"p": False, "0": False, "1": True, "?": None}[mark] for mark in drafted]
    reply = Reply(completion_tokens=len(told), histogram=histogram, drafted=told)
    assert reply.accepted_by_step == steps
    assert Reply(completion_tokens=len(told) + 1, histogram=histogram, drafted=told).accepted_by_step is None


@pytest.mark.parametrize("spans", [{"tokens": [["a"]]}, {"tokens": 3}, {}, []])
def test_spans_that_cannot_be_read_are_refused(spans: object) -> None:
    part = ChatCompletionChunk(id="", choices=[], created=0, model="", object="chat.completion.chunk")
    part.sglext = {"spans": spans}  # type: ignore[attr-defined]
    with pytest.raises(ReplyError, match="spans"):
        _extend(Reply(), part)


def test_a_stream_that_breaks_off_is_no_answer(fake: Callable[..., Any]) -> None:
    with pytest.raises(ReplyError, match="without counting"):
        ask(fake().url, stream=True, text="CUT")


@pytest.mark.parametrize(
    ("details", "problem"),
    [
        ({"verify_steps": 3, "accepted_histogram": [1, 1]}, "3 verify steps and a histogram of 2"),
        ({"accepted_histogram": [1, 1]}, "verify_steps"),
        ({"verify_steps": 2, "accepted_histogram": "ab"}, "cannot be read"),
        ({"spec_verify_ct": 2}, "spec_correct_drafts_histogram"),
        ({}, "spec_verify_ct"),
    ],
)
def test_counts_that_do_not_add_up_are_refused(details: dict[str, Any], problem: str) -> None:
    with pytest.raises(ReplyError, match=problem):
        histogram_of(details)


@pytest.mark.parametrize("proposed", [0, 1, "many"])
def test_proposed_drafts_that_cannot_be_are_refused(proposed: object) -> None:
    """One step that accepted two of three drafts."""
    details = {"verify_steps": 1, "accepted_histogram": [0, 0, 1, 0], "proposed": proposed}
    part = ChatCompletionChunk(id="", choices=[], created=0, model="", object="chat.completion.chunk")
    part.sglext = {"spec_tokens_details": details}
    with pytest.raises(ReplyError, match="proposed"):
        _extend(Reply(), part)


def test_sglangs_short_histogram_is_padded_to_the_block() -> None:
    details = {"spec_verify_ct": 2, "spec_correct_drafts_histogram": [1, 1], "spec_num_proposed_drafts": 14}
    assert histogram_of(details) == [1, 1, 0, 0, 0, 0, 0, 0]
