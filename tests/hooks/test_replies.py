"""Tau in OpenAI replies: SGLang's own server and serving code over scripted counts, read with the openai client.

What a script such as "3 0 7 cut 2" means is in scripted_server.py.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from openai import AsyncOpenAI
from openai.types import CompletionUsage
from openai.types.completion_usage import CompletionTokensDetails

from sglang_auf.acceptance import Acceptance, total_acceptance
from sglang_auf.hooks.replies import FIGURES, _Choice, send_once
from sglang_auf.hooks.spans import MORE
from tests.support.scripted_server import CALL
from tests.support.tool_calls import TEXTS, joined, tokens_of, tools
from tests.support.toy_tokenizer import toy_tokenizer

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


TOY = toy_tokenizer()


def decode(tokens: list[int]) -> str:
    return str(TOY.decode(tokens))


def sent(tokens: list[int], sizes: list[int], finished: bool) -> list[str]:
    """The texts that SGLang's detokenizer sends for tokens that come so many at a time."""
    from sglang.srt.managers.detokenizer_manager import DetokenizerManager

    detokenizer: Any = object.__new__(DetokenizerManager)
    detokenizer.__dict__ |= {"tokenizer": TOY, "vocab_size": len(TOY), "decode_status": {}, "tool_close_token_ids": ()}
    detokenizer.disable_tokenizer_batch_decode = detokenizer.is_tool_call_parser_gpt_oss = False
    original = DetokenizerManager._decode_batch_token_id_output
    original = getattr(original, "__wrapped__", original)  # without the hook that an installed plugin may have put
    texts, at = [], 0
    for step, size in enumerate(sizes, 1):
        ends = finished and step == len(sizes)
        batch = SimpleNamespace(
            rids=["a"],
            decoded_texts=[""],
            decode_ids=[tokens[at : at + size]],
            read_offsets=[0],
            finished_reasons=[{"type": "length"} if ends else None],
            no_stop_trim=[False],
            skip_special_tokens=[True],
            spaces_between_special_tokens=[True],
        )
        texts += send_once(original, detokenizer, batch)
        at += size
    return texts


def reports(tokens: list[Any], texts: list[str], sizes: list[int], increments: bool) -> list[dict[str, Any]]:
    """As the tokenizer manager gives them."""
    made, at, text = [], 0, ""
    for size, new in zip(sizes, texts, strict=True):
        begin, at = at, at + size
        text += new
        logprobs = [(-0.5, token, None) for token in tokens[begin if increments else 0 : at]]
        meta = {
            "id": "a",
            "completion_tokens": at,
            "finish_reason": {"type": "stop"} if at == len(tokens) else None,
            "output_token_logprobs": logprobs,
            "output_token_logprobs_length": at,
            "reasoning_tokens": min(at, 2),
        }
        part = (new, tokens[begin:at]) if increments else (text, tokens[:at])
        made.append({"text": part[0], "output_ids": part[1], "meta_info": meta})
    return made


def cut(draw: random.Random, length: int) -> list[int]:
    """Sizes of verify steps, which sum to length."""
    sizes = []
    while sum(sizes) < length:
        sizes.append(min(draw.randint(1, 6), length - sum(sizes)))
    return sizes


@given(
    st.text("ab é天🌊\n", min_size=1, max_size=12).map(lambda text: list(TOY.encode(text))),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_the_parts_of_reports_are_the_reports_of_single_tokens(
    tokens: list[int], draw: random.Random, increments: bool
) -> None:
    sizes, ones = cut(draw, len(tokens)), [1] * len(tokens)
    whole = reports(tokens, sent(tokens, sizes, finished=True), sizes, increments)
    single = reports(tokens, sent(tokens, ones, finished=True), ones, increments)
    choice = _Choice(decode, increments)
    parts = [part for report in whole for part in choice.parts(report)]
    assert pieces(parts, increments) == pieces(single, increments)
    ends = [part["meta_info"]["finish_reason"] for part in parts]
    assert ends == [None] * (len(parts) - 1) + [{"type": "stop"}]
    reached = {part["meta_info"]["completion_tokens"]: part for part in parts}
    assert list(reached) == list(range(1, len(tokens) + 1))
    for report in single:
        part = reached[report["meta_info"]["completion_tokens"]]
        assert increments or part["output_ids"] == report["output_ids"]
        said = ("output_token_logprobs_length", "reasoning_tokens")
        assert [part["meta_info"][name] for name in said] == [report["meta_info"][name] for name in said]
    for part in parts if increments else []:
        assert [token for _, token, _ in part["meta_info"]["output_token_logprobs"]] == part["output_ids"]
    assert [token for part in parts for token in part["output_ids"]] == tokens or not increments


def test_what_a_report_has_later_is_of_the_next_one() -> None:
    """SGLang's reports of several choices have the list of tokens itself, which grows on."""
    tokens = list(TOY.encode("abcd"))
    made = reports(tokens, ["ab", "cd"], [2, 2], increments=False)
    choice = _Choice(decode, increments=False)
    late = made[0] | {"output_ids": tokens}
    parts = [part for report in (late, made[1]) for part in choice.parts(report)]
    assert [part["text"] for part in parts] == ["a", "ab", "abc", "abcd"]
    assert [part["meta_info"]["completion_tokens"] for part in parts] == [1, 2, 3, 4]
    assert [MORE in part["meta_info"] for part in parts] == [True, False, True, False]


def pieces(parts: list[dict[str, Any]], increments: bool) -> list[str]:
    """The texts that came one after the other."""
    texts = [part["text"] for part in parts]
    new = texts if increments else [text[len(before) :] for before, text in zip(["", *texts], texts, strict=False)]
    return [text for text in new if text]


def test_words_before_a_cut_character_are_held_back_and_cut_all_the_same() -> None:
    tokens, sizes = list(TOY.encode("a bcé!")), [1, 4, 2]
    made = reports(tokens, sent(tokens, sizes, finished=True), sizes, increments=True)
    assert [report["text"] for report in made] == ["a", " ", "bcé!"]
    choice = _Choice(decode, increments=True)
    assert [part["text"] for report in made for part in choice.parts(report)] == [
        *("a", " ", "", "", ""),
        *("b", "c", "é", "!"),
    ]


@given(st.text("ab é天🌊\n", min_size=1, max_size=12), st.randoms(use_true_random=False))
@example("天éé", [4, 2, 1])
def test_a_stream_sends_its_text_once(text: str, draw: random.Random | list[int]) -> None:
    tokens = list(TOY.encode(text))
    sizes = draw if isinstance(draw, list) else cut(draw, len(tokens))
    assert "".join(sent(tokens, sizes, finished=True)) == text


def test_a_stop_that_was_trimmed_comes_in_no_part() -> None:
    choice = _Choice(decode, increments=False)
    report = {"text": "ab", "output_ids": list(TOY.encode("abcd")), "meta_info": {"id": "a", "completion_tokens": 4}}
    assert [part["text"] for part in choice.parts(report)] == ["a", "ab", "ab", "ab"]


def test_an_aborted_answer_of_which_nothing_new_came_has_one_report() -> None:
    choice, report = _Choice(decode, increments=False), {"text": "", "output_ids": [], "meta_info": {"id": "a"}}
    assert choice.parts(report) == [report]


def parsers() -> list[str]:
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    return sorted(FunctionCallParser.ToolCallParserEnum.keys() - {"response_template"})  # the tokenizer has its format


@pytest.mark.parametrize("name", parsers())
def test_a_cut_answer_has_the_tool_calls_of_one_token_a_time(name: str) -> None:
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    def read(chunks: list[str]) -> Any:
        parser = FunctionCallParser(tools(), name)
        return joined([*(parser.parse_stream_chunk(chunk) for chunk in chunks), parser.parse_stream_end()])

    draw = random.Random(name)
    for text in TEXTS:
        tokens = tokens_of(text)
        expected = read(tokens)
        for _ in range(3):
            sizes, chunks, at = cut(draw, len(tokens)), [], 0
            for size in sizes:
                chunks.append("".join(tokens[at : at + size]))
                at += size
            choice = _Choice("".join, increments=True)  # type: ignore[arg-type]
            parts = [
                part for report in reports(tokens, chunks, sizes, increments=True) for part in choice.parts(report)
            ]
            assert read([part["text"] for part in parts]) == expected


CUTS = ["0 " * (len(CALL) - 1), "3 0 7 5 6 1 7 3", "7 7 7 7 7", "1 4 2 7 7 6 2 4 5"]
"""Steps that reach the end of CALL, one token each and several."""
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
CALLED = ("Let me look.", [("look", '{"city": "Bern"}'), ("now", "{}")])


@pytest.mark.parametrize("steps", CUTS)
def test_streamed_chats_have_their_text_and_tool_calls(auf: str, steps: str) -> None:
    reply = ask(auf, f"call {steps}", chat=True, stream=True, tools=[LOOK, NOW])
    deltas = [choice["delta"] for chunk in reply.chunks for choice in chunk["choices"]]
    calls: list[tuple[str, str]] = []
    for call in (call for delta in deltas for call in delta.get("tool_calls") or []):
        if call["function"].get("name"):
            calls.append((call["function"]["name"], ""))
        name, arguments = calls[call["index"]]
        calls[call["index"]] = (name, arguments + (call["function"]["arguments"] or ""))
    assert ("".join(delta.get("content") or "" for delta in deltas).strip(), calls) == CALLED
    ends = [choice["finish_reason"] for chunk in reply.chunks for choice in chunk["choices"]]
    assert [end for end in ends if end] == ["tool_calls"]
    tokens = 1 + sum(1 + int(step) for step in steps.split())
    assert reply.usage is not None and reply.usage.completion_tokens == tokens
    assert ours(reply.details) == figures(counted(*map(int, steps.split())))


@pytest.mark.parametrize("steps", CUTS)
def test_streamed_responses_have_their_text_and_tool_calls(auf: str, steps: str) -> None:
    asked = {"model": "scripted", "input": f"call {steps}", "stream": True, "max_output_tokens": 100}
    flat = [{"type": "function", **tool["function"]} for tool in (LOOK, NOW)]
    body = httpx.post(f"{auf}/v1/responses", json={**asked, "tools": flat}, timeout=60).raise_for_status().text
    lines = [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line.startswith("data: {")]
    [end] = [line["response"] for line in lines if line["type"] == "response.completed"]
    texts = [part["text"] for item in end["output"] if item["type"] == "message" for part in item["content"]]
    calls = [(item["name"], item["arguments"]) for item in end["output"] if item["type"] == "function_call"]
    assert ("".join(texts).strip(), calls) == CALLED
