"""Which tokens were drafted: the reports' arithmetic, and SGLang's own serving code over scripted counts."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.harness.client import ChatClient, Reply
from benchmarks.harness.config import Workload
from benchmarks.harness.sources.prompt import messages_of
from sglang_auf.acceptance import Acceptance
from sglang_auf.hooks.spans import HEADER, Spans
from tests.reference.acceptance_identities import cut_tokens

BYTES = "The sky, «blau» 天空 🌊 end".encode()


def decode(tokens: list[int]) -> str:
    """A tokenizer of bytes: 256 is the special token that ends an answer."""
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


def drafted(spans: Spans) -> list[bool | None]:
    return [flag for _, flag in spans.take(decode, finished=True)]


@given(st.lists(st.integers(0, 7), max_size=20), st.data())
def test_flags_add_up_to_what_was_accepted(accepted: list[int], data: st.DataObject) -> None:
    spans = Spans()
    spans.add([0], 0, 0)
    cut = data.draw(st.integers(0, accepted[-1])) if accepted else 0
    for step, count in enumerate(accepted, 1):
        length = count + 1 - (cut if step == len(accepted) else 0)
        spans.add([0] * length, step, sum(accepted[:step]))
    flags = drafted(spans)
    request = Acceptance.of_request([accepted.count(a) for a in range(8)], len(flags))
    if accepted:
        assert cut_tokens(request) == cut
    # A cut takes the target's own token first, then drafted ones.
    assert flags.count(True) == request.accepted - max(cut - 1, 0)
    assert flags.count(False) == 1 + request.verify_steps - min(cut, 1)


def test_drafted_tokens_come_before_the_targets_own() -> None:
    spans = Spans()
    spans.add([0], 0, 0)
    spans.add([0] * 3, 1, 2)
    spans.add([0], 2, 2)
    assert drafted(spans) == [False, True, True, False, False]


def test_a_retracted_request_is_prefilled_again() -> None:
    spans = Spans()
    spans.add([0], 0, 0)
    spans.add([0, 0], 1, 1)
    spans.add([0], 1, 1)
    assert drafted(spans) == [False, True, False, False]


def test_several_steps_in_one_report_are_not_known_unless_nothing_was_accepted() -> None:
    spans = Spans()
    spans.add([0], 0, 0)
    spans.add([0, 0], 2, 0)
    spans.add([0] * 5, 4, 3)
    spans.add([0, 0], 5, 4)
    assert drafted(spans) == [False, False, False, *[None] * 5, True, False]


@given(st.lists(st.integers(1, 5), min_size=1), st.booleans())
def test_texts_join_to_the_answer_however_it_arrives(lengths: list[int], cut_character: bool) -> None:
    answer = [*BYTES[: -len(" end") - 1], 256] if cut_character else [*BYTES, 256]
    spans, texts, at = Spans(), [], 0
    while at < len(answer):
        length = lengths[at % len(lengths)]
        spans.add(answer[at : at + length], at, at)
        at += length
        texts += [text for text, _ in spans.take(decode, finished=at >= len(answer))]
    assert len(texts) == len(answer)
    assert "".join(texts) == decode(answer)


def test_a_token_inside_a_character_has_no_text_of_its_own() -> None:
    spans = Spans()
    spans.add(list("é!".encode()), 0, 0)
    assert [text for text, _ in spans.take(decode, finished=False)] == ["", "é", "!"]
    assert spans.take(decode, finished=True) == []


@given(st.lists(st.sampled_from([*"A🌊".encode(), 0x80, 0x80]), max_size=80), st.lists(st.integers(1, 5), min_size=1))
def test_texts_join_to_an_answer_whose_characters_do_not_end(answer: list[int], lengths: list[int]) -> None:
    spans, texts, at = Spans(), [], 0
    while at < len(answer):
        length = lengths[at % len(lengths)]
        spans.add(answer[at : at + length], at, at)
        at += length
        texts += [text for text, _ in spans.take(decode, finished=at >= len(answer))]
    assert len(texts) == len(answer)
    assert "".join(texts) == decode(answer)


def test_a_token_costs_the_same_however_long_no_character_ends() -> None:
    decoded: list[int] = []

    def counted(tokens: list[int]) -> str:
        decoded.append(len(tokens))
        return decode(tokens)

    spans, texts, answer = Spans(), [], [*[0x80] * 500, *"🌊!".encode()]
    for token in answer:
        spans.add([token], 0, 0)
        texts += [text for text, _ in spans.take(counted, finished=False)]
    assert "".join(texts) == decode(answer)
    assert max(decoded) <= 20


@pytest.fixture
def auf(scripted_server: str) -> Iterator[str]:
    yield scripted_server
    httpx.post(f"{scripted_server}/algorithm", params={"name": "AUF"}).raise_for_status()


def stream(
    address: str, script: str, ask: bool = True, path: str = "chat/completions", **more: Any
) -> list[dict[str, Any]]:
    prompt = {"messages": [{"role": "user", "content": script}]} if path.startswith("chat") else {"prompt": script}
    body = {"model": "scripted", "max_tokens": 100, "stream": True, **prompt, **more}
    headers = {HEADER: "1"} if ask else {}
    reply = httpx.post(f"{address}/v1/{path}", json=body, headers=headers, timeout=60).raise_for_status()
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def flags(chunks: list[dict[str, Any]], index: int = 0) -> list[bool | None]:
    """Of every token of a choice, in order."""
    spans = [chunk["sglext"]["spans"] for chunk in chunks if "spans" in (chunk.get("sglext") or {})]
    return [flag for span in spans if span["index"] == index for _, flag in span["tokens"]]


def test_a_stream_says_which_tokens_were_drafted(auf: str) -> None:
    expected = [False, True, True, True, False, False, *[True] * 6]
    assert flags(stream(auf, "3 0 7 cut 2")) == expected


def test_each_choice_has_its_own(auf: str) -> None:
    chunks = stream(auf, "2 next 5 5 next 0 1 cut 1", n=3)
    got = [flags(chunks, index) for index in range(3)]
    assert sorted(map(str, got)) == sorted(
        map(
            str,
            [
                [False, True, True, False],
                [False, *[True] * 5, False, *[True] * 5, False],
                [False, False, True],
            ],
        )
    )


def test_chunks_of_ours_have_no_choices_and_sglangs_are_as_they_were(auf: str) -> None:
    def rest(chunks: list[dict[str, Any]]) -> list[Any]:
        others = [chunk for chunk in chunks if "spans" not in (chunk.get("sglext") or {})]
        return [(chunk["choices"], chunk.get("sglext")) for chunk in others]

    asked, unasked = stream(auf, "3 0 7"), stream(auf, "3 0 7", ask=False)
    assert rest(asked) == rest(unasked)
    ours = [chunk for chunk in asked if "spans" in (chunk.get("sglext") or {})]
    assert ours
    assert all(chunk["choices"] == [] and chunk["object"] == "chat.completion.chunk" for chunk in ours)
    assert {chunk["id"] for chunk in ours} == {asked[0]["id"]}


def test_who_does_not_ask_gets_none(auf: str) -> None:
    assert flags(stream(auf, "3 0 7", ask=False)) == []
    assert flags(stream(auf, "3 0 7", path="completions")) == []


@pytest.mark.parametrize("algorithm", [{}, {"name": "DFLASH"}])
def test_a_server_without_auf_gives_none(algorithm: dict[str, str], auf: str) -> None:
    httpx.post(f"{auf}/algorithm", params=algorithm).raise_for_status()
    assert flags(stream(auf, "3 0 7")) == []


def test_an_aborted_answer_keeps_what_it_had(auf: str) -> None:
    assert flags(stream(auf, "2 1 abort")) == [False, True, True, False, True, False]


def test_nothing_is_kept_of_a_reply_that_ended(auf: str) -> None:
    for script in ("3 0 7", "2 abort", "3 queue"):
        stream(auf, script)
    deadline = (
        time.monotonic() + 60
    )  # uvicorn keeps a connection that idles, and the context of its last request with it
    while httpx.get(f"{auf}/spans").json():
        assert time.monotonic() < deadline
        time.sleep(0.5)


async def asked_by_benchmark(url: str, script: str, raw: bool) -> Reply:
    async with ChatClient(url, "scripted", Workload(max_tokens=64), stream=True, spans=not raw) as client:
        return await client.ask(script if raw else messages_of(script))


@pytest.mark.parametrize("script", ["3 0 7", "3 0 7 cut 2", "0 5 cut 5", "0 0", "7 7 cut 7"])
def test_the_benchmark_has_the_steps_in_their_order(auf: str, script: str) -> None:
    reply = asyncio.run(asked_by_benchmark(auf, script, raw=False))
    assert reply.accepted_by_step == [int(word) for word in script.partition(" cut")[0].split()]


def test_the_benchmark_has_counts_and_tokens_of_a_text_that_is_continued(auf: str) -> None:
    reply = asyncio.run(asked_by_benchmark(auf, "3 0 7 cut 2", raw=True))
    assert reply.histogram == [1, 0, 0, 1, 0, 0, 0, 1]
    assert reply.prompt_ids == [3, 0, 7, 8, 2]
    assert reply.output_ids is not None
    assert len(reply.output_ids) == reply.completion_tokens == 1 + 4 + 1 + 8 - 2
    assert reply.finish_reason == "stop"
    assert reply.accepted_by_step is None
