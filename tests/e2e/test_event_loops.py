"""A speculating server answers as plain decoding does, and counts what it drafted, in both of SGLang's event loops.

On a GPU AUF runs under SGLang's overlap schedule, where a step begins before the results of the step before are known:
requests that have ended are in one more step, and clients leave while their step runs. On a CPU it runs without. Both
are asked the same here, and all fields of the replies that do not count time or speculation must be plain decoding's.

Stops are drawn from the answers themselves, several a request, so that more than one often falls into one verify step.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest

from benchmarks.harness.template_prompts import demo_prompts
from sglang_auf.acceptance import Acceptance
from sglang_auf.hooks.spans import HEADER
from tests.support.engines import ONE_THREAD
from tests.support.streams import events, said, truth

pytestmark = pytest.mark.e2e

MODEL = "smollm2-135m"
LISTS = 320
IN_FLIGHT = 8
LISTS_IN_FLIGHT = 24
NODES = "tree_nodes=3"
"""As many at any load: this many requests on a busy machine may leave no node worth its time."""
LOOPS = {
    "normal": ("server_args.disable_overlap_schedule=true", NODES),
    "overlap": ("server_args.disable_overlap_schedule=false", NODES),
    "chains": ("server_args.disable_overlap_schedule=false", "tree=false"),
}
"""The settings for each event loop of SGLang; the last one is what a GPU has."""
PENALTIES = (
    {"frequency_penalty": 0.4},
    {"presence_penalty": 0.9},
    {"frequency_penalty": 0.4, "presence_penalty": 0.9},
    {"repetition_penalty": 1.2},
)
"""The order of a factor and a summand is that of a set of classes in SGLang's plain decoding, another at each start
(sampling_batch_info.py)."""
EVERY = {"normal": 1, "overlap": 4, "chains": 4}
"""Which lists are asked: all, or one of so many."""
PATIENCE_S = 300
SERVER = ["server", "--profile", MODEL, "--set", "server_args.max_total_tokens=8192"]
SAME = ("finish_reason", "prompt_tokens", "completion_tokens")
GRAMMAR = json.dumps({"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1, "maxItems": 3})


@dataclass
class Plain:
    """What plain decoding answers."""

    bodies: list[dict[str, Any]]
    generated: list[list[dict[str, Any]]]
    chats: dict[bool, list[Any]]
    stays: list[dict[str, Any]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, start_server: Any) -> Plain:
    log = tmp_path_factory.mktemp("plain") / "log"
    # Under the overlap schedule SGLang's plain decoding counts a token for penalties one step late, and in place of the
    # first one the prompt's last (schedule_batch.py, cumulate_penalty_output_tokens).
    server = [*SERVER, "--plain", "--set", LOOPS["normal"][0]]
    with start_server(server, log, **ONE_THREAD) as (url, _), ThreadPoolExecutor(LISTS_IN_FLIGHT) as pool:

        def ask(bodies: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
            return list(pool.map(lambda body: generate(url, body), bodies))

        draw = random.Random(18)
        prompts = ["Say hello.", *(row["turns"][0] for row in demo_prompts(15))]  # type: ignore[index]
        free = {"temperature": 0, "max_new_tokens": 32}
        answers = ask([{"text": question(prompt), "sampling_params": free} for prompt in prompts])
        drawn = [draw.randrange(len(prompts)) for _ in range(LISTS)]
        bodies = [body_of(draw, prompts[number], answers[number][0]) for number in drawn]
        return Plain(
            bodies, ask(bodies), {stream: chats(url, stream) for stream in (False, True)}, generate(url, STAYS)
        )


@pytest.fixture(scope="module", params=LOOPS)
def loop(request: pytest.FixtureRequest, plain: Plain) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def url(loop: str, tmp_path_factory: pytest.TempPathFactory, start_server: Any) -> Iterator[str]:
    """A server that speculates in that event loop. Plain decoding's has ended: two of them need not fit in memory."""
    log = tmp_path_factory.mktemp(loop) / "log"
    settings = [part for setting in LOOPS[loop] for part in ("--set", setting)]
    # As on a machine without a compiler, which nothing may need.
    without = {"CXX": "/nonexistent/g++", "CC": "/nonexistent/gcc", "TORCHINDUCTOR_CACHE_DIR": str(log.parent / "none")}
    with start_server([*SERVER, *settings], log, **ONE_THREAD, **without) as (address, _):
        yield address


def test_the_event_loop_is_the_one_asked_for(url: str, loop: str) -> None:
    info = httpx.get(f"{url}/server_info", timeout=PATIENCE_S).json()
    assert info["disable_overlap_schedule"] is (loop == "normal")


def generate(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices of one /generate request, each with its text, ids and the fields of SAME; streams put together."""
    with httpx.stream("POST", f"{url}/generate", json=body, timeout=2 * PATIENCE_S) as reply:
        lines = list(reply.iter_lines())
        assert reply.status_code == 200, lines
    if not body.get("stream"):
        replies = json.loads("".join(lines))
        return [kept(choice) for choice in (replies if isinstance(replies, list) else [replies])]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    return [kept(chunk) for chunk in chunks if chunk["meta_info"]["finish_reason"]]


def kept(reply: dict[str, Any]) -> dict[str, Any]:
    meta = {name: value for name, value in reply["meta_info"].items() if name in SAME}
    rows = reply["meta_info"].get("output_token_logprobs") or []
    chosen = {"logprobs_of": [token for _, token, _ in rows], "logprobs": [value for value, _, _ in rows]}
    return {"text": reply["text"], "ids": reply.get("output_ids"), **meta, **chosen}


def agree(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> bool:
    """Equal in all fields; of equal logits torch's log_softmax may round differently beside other rows."""
    near = [choice | {"logprobs": pytest.approx(choice["logprobs"], abs=1e-5)} for choice in theirs]
    return ours == near


def question(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


STAYS = {
    "text": question("Name three rivers."),
    "sampling_params": {"temperature": 0, "max_new_tokens": 64, "ignore_eos": True},
}


def stops_of(draw: random.Random, answer: str) -> dict[str, Any]:
    """One to three stop strings or regexes, pieces of the answer in any order."""
    pieces = []
    for _ in range(draw.randint(1, 3)):
        start = draw.randrange(len(answer))
        pieces.append(answer[start : start + draw.randint(1, 6)])
    pieces += ["\n"] * (draw.random() < 0.3)
    draw.shuffle(pieces)
    if draw.random() < 0.3:
        return {"stop_regex": [re.escape(piece) + draw.choice(["", "?", "$", ".?"]) for piece in pieces]}
    return {"stop": pieces}


def body_of(draw: random.Random, prompt: str, answer: dict[str, Any]) -> dict[str, Any]:
    sampling: dict[str, Any] = {
        "temperature": 0,
        "max_new_tokens": draw.randint(4, 32),
        **stops_of(draw, answer["text"]),
    }
    if draw.random() < 0.2:
        sampling["stop_token_ids"] = [draw.choice(answer["ids"])]
    for switch in ("no_stop_trim", "ignore_eos"):
        if draw.random() < 0.2:
            sampling[switch] = True
    if draw.random() < 0.2:
        sampling["skip_special_tokens"] = False
    if draw.random() < 0.25:
        sampling |= draw.choice(PENALTIES)
        sampling["min_new_tokens"] = draw.randint(0, sampling["max_new_tokens"])
    kind = draw.random()
    if kind < 0.15:
        sampling |= {"temperature": 0.8, "sampling_seed": draw.randrange(1000)}
    elif kind < 0.25:
        sampling["json_schema"] = GRAMMAR
        sampling.pop("min_new_tokens", None)  # a grammar that has ended allows no other token than the end
        sampling.pop("ignore_eos", None)  # plain decoding then notices the grammar's end a token late (docs/status.md)
    elif kind < 0.35:
        sampling["n"] = 2
    # What was sent before a regex had matched is not taken back, and each step sends what it has (docs/status.md).
    stream = draw.random() < 0.3 and not {"n", "stop_regex"} & sampling.keys()
    return {
        "text": question(prompt),
        "sampling_params": sampling,
        "stream": stream,
        "return_logprob": draw.random() < 0.3,
    }


def test_generated_stops_end_answers_as_plain_decoding_does(url: str, loop: str, plain: Plain) -> None:
    some = slice(None, None, EVERY[loop])
    bodies, expected = plain.bodies[some], plain.generated[some]
    with ThreadPoolExecutor(LISTS_IN_FLIGHT) as pool:
        replies = list(pool.map(lambda body: generate(url, body), bodies))
    ends = Counter(choice["finish_reason"]["type"] for choices in expected for choice in choices)
    compared = list(zip(bodies, replies, expected, strict=True))
    different = [(body, ours, theirs) for body, ours, theirs in compared if not agree(ours, theirs)]
    assert not different, f"{len(different)} of {len(bodies)}, for example {different[:2]}"
    assert ends["stop"] > len(bodies) / 2 and ends["length"], f"the stops that were drawn are of use: {ends}"


def test_requests_that_ask_for_no_drafts_get_none_and_count_for_nothing(url: str, plain: Plain) -> None:
    """Each beside others that draft; every third one of them is asked without, and every ninth with the drafts of
    nobody else in its steps."""
    bodies = [body for body in plain.bodies if "n" not in body["sampling_params"] and not body["stream"]][:27]
    expected = [plain.generated[plain.bodies.index(body)] for body in bodies]
    without = {"custom_params": {"speculative": False}}
    asked = [
        body | {"sampling_params": body["sampling_params"] | (without if number % 3 == 0 else {})}
        for number, body in enumerate(bodies)
    ]
    before = totals(url)
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        replies = list(pool.map(lambda body: post(url, body), asked))
    replies += [post(url, body) for body in asked[::9]]
    assert all(agree([kept(ours)], theirs) for ours, theirs in zip(replies, [*expected, *expected[::9]], strict=True))
    figures = [Acceptance.from_meta_info(reply["meta_info"]) for reply in replies]
    others = [figure for number, figure in enumerate(figures[: len(bodies)]) if number % 3]
    without_drafts = [figure for number, figure in enumerate(figures) if not number % 3 or number >= len(bodies)]
    assert {figure.tau for figure in without_drafts} <= {None, 1.0}
    counted = totals(url) - before
    assert counted["requests"] == sum(figure.requests for figure in others)
    assert counted["verify_steps"] == sum(figure.verify_steps for figure in others)
    assert sum(figure.accepted for figure in others) > 0


def test_a_chat_without_drafts(url: str, plain: Plain) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)
    settings = {"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 40}
    said = [
        client.chat.completions.create(**settings, temperature=0, extra_body={"custom_params": custom})
        for custom in ({"speculative": False}, {"speculative": True})
    ]
    taus = [reply.model_extra["sglext"]["spec_tokens_details"]["tau"] for reply in said]
    assert said[0].choices == said[1].choices
    assert taus[0] == 1 < taus[1]
    with pytest.raises(openai.BadRequestError, match="give true"):
        client.chat.completions.create(**settings, extra_body={"custom_params": {"speculative": "no"}})


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    reply = httpx.post(f"{url}/generate", json=body, timeout=PATIENCE_S)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_chats_with_stops_are_the_same_for_the_openai_client(url: str, stream: bool, plain: Plain) -> None:
    """The end token comes before the newline that the drafter likes to draft behind it."""
    assert chats(url, stream) == plain.chats[stream]


def chats(url: str, stream: bool) -> list[Any]:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)
    settings = {"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 64}
    asked: list[dict[str, Any]] = [
        {"stop": ["\n"]},
        {"stop": ["!", "o"]},
        {"stop": ["o", "!"], "n": 2},
        {"stop": ["you"]},
    ]
    return [chat(client, stream, temperature=0, **settings, **more) for more in asked]


def chat(client: openai.OpenAI, stream: bool, **settings: Any) -> Any:
    if not stream:
        reply = client.chat.completions.create(**settings)
        assert reply.usage is not None
        return [
            (choice.message.content, choice.finish_reason, (choice.model_extra or {}).get("matched_stop"))
            for choice in reply.choices
        ], reply.usage.completion_tokens
    texts: dict[int, str] = {}
    ends: dict[int, Any] = {}
    tokens = None
    for chunk in client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason:
                ends[choice.index] = (choice.finish_reason, (choice.model_extra or {}).get("matched_stop"))
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    return texts, ends, tokens


def test_spans_and_totals_count_every_token_once(url: str) -> None:
    """Long and short limits, an end token, and sampled answers, all at once; no span may be unknown without stops."""
    asked = [
        {"messages": [{"role": "user", "content": prompt}], "max_tokens": limit, "temperature": temperature, "seed": 7}
        for prompt in ("Say hello.", "Name three rivers.")
        for limit, temperature in ((2, 0), (7, 0), (40, 0), (40, 1.2))
    ]
    before = totals(url)
    with ThreadPoolExecutor(len(asked)) as pool:
        replies = list(pool.map(lambda settings: streamed(url, settings), asked))
    after = totals(url)
    counted: Counter[str] = Counter()
    for chunks in replies:
        drafted, tokens, text = truth(chunks)
        flags = [flag for _, flag in said(chunks)]
        assert (flags.count(True), flags.count(False), len(flags)) == (drafted, tokens - drafted, tokens)
        assert "".join(piece for piece, _ in said(chunks)) == text
        [details] = [found for chunk in chunks if (found := (chunk.get("sglext") or {}).get("spec_tokens_details"))]
        counted += Counter(verify_steps=details["verify_steps"], emitted=tokens - 1, requests=1)
        for accepted, number in enumerate(details["accepted_histogram"]):
            counted[f"accepted {accepted}"] += number
    assert after - before == +counted
    assert counted["verify_steps"] > counted["accepted 0"]


def streamed(url: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a streamed chat answer with its spans."""
    body = {"model": MODEL, "stream": True, "stream_options": {"include_usage": True}, **settings}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, headers={HEADER: "1"}, timeout=PATIENCE_S)
    assert reply.status_code == 200, reply.text
    return events(reply.text)


def totals(url: str) -> Counter[str]:
    total = httpx.get(f"{url}/v1/auf/acceptance", timeout=PATIENCE_S).json()["total"]
    steps = {f"accepted {accepted}": number for accepted, number in enumerate(total["accepted_histogram"])}
    return Counter({name: total[name] for name in ("verify_steps", "emitted", "requests")} | steps)


def test_clients_that_leave_disturb_nobody_and_leave_nothing_behind(url: str, plain: Plain) -> None:
    """They leave after their first, second, ... chunk, so in the middle of steps that others share."""
    long = {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True}
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        staying = [pool.submit(generate, url, STAYS) for _ in range(2)]
        for chunks in range(IN_FLIGHT - 2):
            pool.submit(leave, url, {"text": question(f"Say {chunks}."), "sampling_params": long}, chunks)
    assert [future.result() for future in staying] == [plain.stays] * 2
    deadline = time.monotonic() + PATIENCE_S
    while any(load["num_running_reqs"] or load["num_waiting_reqs"] for load in loads(url)):
        assert time.monotonic() < deadline, "a request of a client that left still runs"
        time.sleep(0.2)
    assert generate(url, STAYS) == plain.stays
    assert httpx.post(f"{url}/flush_cache", timeout=PATIENCE_S).status_code == 200
    assert [load["num_used_tokens"] for load in loads(url)] == [0], "memory of requests that ended is not free"


def leave(url: str, body: dict[str, Any], chunks: int) -> None:
    with httpx.stream("POST", f"{url}/generate", json=body | {"stream": True}, timeout=PATIENCE_S) as reply:
        for _, _ in zip(range(chunks + 1), reply.iter_lines(), strict=False):
            pass


def loads(url: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx.get(f"{url}/v1/loads", timeout=PATIENCE_S).json()["loads"]
    return found
