"""Requests of any shape: none ends the engine, none is answered with a server error, none disturbs another client.

How many requests each test makes: AUF_FUZZ, others each time; by default the same 200. Most are good requests with one
to three fields changed to values at the borders of their ranges and far outside, because those get further than random
ones. Beside them a client asks good requests all the time, whose answers must stay the same.
"""

from __future__ import annotations

import copy
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from sglang.srt.entrypoints.api_contract import generate_contract_error
from sglang.srt.entrypoints.http_server import app
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

from server.middleware import is_for_clients
from tests.support.engines import ONE_THREAD
from tests.support.tiny_models import write_drafter, write_target
from tests.support.toy_tokenizer import toy_tokenizer

pytestmark = pytest.mark.e2e

MODEL = "tiny"
VOCABULARY = 272
CONTEXT = 160
PATIENCE_S = 120
REQUESTS = int(os.environ.get("AUF_FUZZ", "200"))
MANY = settings(
    max_examples=REQUESTS,
    derandomize="AUF_FUZZ" not in os.environ,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # a failing request is not made smaller, which would take many more
    suppress_health_check=list(HealthCheck),
)

BORDERS: list[Any] = [
    *(0, 1, 2, -1, -2, True, False, None, "", "a", "1", "\ud800", [], {}, [None], [[]], {"1": 1}, {"a": None}),
    *(VOCABULARY - 1, VOCABULARY, VOCABULARY + 1, CONTEXT - 1, CONTEXT, CONTEXT + 1, 128, 129, 1000, 1001),
    *(2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, -(2**31) - 1, -(2**63), -(2**63) - 1, 10**30),
    *(0.5, -0.5, 1.0, 2.0, 1e-30, 1e-300, 3.5e38, 1e39, 1e308, float("nan"), float("inf"), float("-inf")),
    *([0], [-1], [VOCABULARY - 1], [VOCABULARY], [2**31], [2**63], [10**30], [1.5], ["a"], [True], [1] * 2000),
    *([[1, 2]], [[VOCABULARY]], [[0.0] * 64], [[0.0] * 63], [["a"]], "x" * 5000, ["x"] * 200, ["x", 1]),
    *({"0": 100}, {"0": -101}, {str(VOCABULARY): 1}, {"-1": 1}, {"0": float("nan")}, {"0": "1"}, {"1" * 30: 1}),
    *("(", "[a", "a{99999}", "root ::= root", 'root ::= "a"', '{"type": "nothing"}', '{"type": "object"}', "{"),
]
NO_WORD = "Grammar accept_token failed"
"""SGLang's reply with status 500 to a grammar that has no word at all, which ends that request alone."""

ANYTHING = st.recursive(
    st.sampled_from(BORDERS) | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)


def fitting(names: Iterable[str], accepted: Callable[[dict[str, Any]], bool]) -> dict[str, list[Any]]:
    """Field -> those of BORDERS that pass the first check of a request, of types; they get further in."""
    values = {name: [value for value in BORDERS if accepted({name: value})] for name in names}
    return {name: found for name, found in values.items() if found}


def takes(model: Any) -> Callable[[dict[str, Any]], bool]:
    adapter = TypeAdapter(model)

    def accepted(body: dict[str, Any]) -> bool:
        try:
            adapter.validate_json(json.dumps(body))
        except Exception:  # some of the validators break on values of other types
            return False
        return True

    return accepted


def takes_native(body: dict[str, Any]) -> bool:
    return generate_contract_error(body) is None and TAKES_NATIVE(body)


TAKES_NATIVE, TAKES_CHAT, TAKES_COMPLETION = (
    takes(GenerateReqInput),
    takes(ChatCompletionRequest),
    takes(CompletionRequest),
)
NATIVE_FIELDS = fitting(GenerateReqInput.__dataclass_fields__, takes_native)
SAMPLING_FIELDS = fitting(SamplingParams.__struct_fields__, lambda given: takes_native({"sampling_params": given}))
MESSAGES = [{"role": "user", "content": "Name a river."}]
CHAT_FIELDS = fitting(
    ChatCompletionRequest.model_fields,
    lambda given: TAKES_CHAT({"model": MODEL, "messages": MESSAGES} | given),
)
COMPLETION_FIELDS = fitting(
    CompletionRequest.model_fields, lambda given: TAKES_COMPLETION({"model": MODEL, "prompt": "Hi"} | given)
)

FEW = {"max_new_tokens": 6, "temperature": 0}
NATIVE: list[dict[str, Any]] = [
    {"text": "Hi", "sampling_params": FEW},
    {"input_ids": [5, 6, 7], "sampling_params": FEW, "return_logprob": True, "top_logprobs_num": 2},
    {"text": ["Hi", "you"], "sampling_params": [FEW, {"max_new_tokens": 3, "sampling_seed": 7}]},
    {"text": "Hi", "sampling_params": {"max_new_tokens": 6, "n": 2, "temperature": 0.8}, "stream": True},
]
OPENAI: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 6}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 6, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 6, "stream": True, "n": 2, "seed": 3}),
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 6}),
    ("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 6, "logprobs": 2, "echo": True}),
    ("/v1/completions", {"prompt": ["Hi", "you"], "max_tokens": 6, "stream": True}),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, start_server: Any) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("any")
    target = write_target(directory / "target", vocabulary=VOCABULARY)
    toy_tokenizer().save_pretrained(target)
    drafter = write_drafter(directory / "drafter", 4, vocabulary=VOCABULARY)
    arguments = ["server", "--profile", "smollm2-135m"]
    for setting in (
        f"target={target}",
        f"drafter={drafter}",
        f"served_model_name={MODEL}",
        f"server_args.context_length={CONTEXT}",
        "server_args.max_total_tokens=4096",
    ):
        arguments += ["--set", setting]
    with start_server(arguments, directory / "log", **ONE_THREAD) as (address, _):
        yield address


class Neighbour:
    """A client that asks the same good requests all the time, from another thread."""

    QUESTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
        ("/generate", {"text": "Hi there", "sampling_params": {"max_new_tokens": 24, "temperature": 0}}),
        ("/generate", {"text": "Hi", "sampling_params": {"max_new_tokens": 24, "temperature": 1, "sampling_seed": 5}}),
        ("/v1/chat/completions", {"model": MODEL, "messages": MESSAGES, "max_tokens": 24, "temperature": 0}),
    )

    def __init__(self, url: str) -> None:
        self.url = url
        self.expected = [self.ask(number) for number in range(len(self.QUESTIONS))]
        self.answered, self.wrong = 0, Counter[str]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def ask(self, number: int) -> Any:
        path, body = self.QUESTIONS[number]
        reply = httpx.post(self.url + path, json=body, timeout=PATIENCE_S).json()
        return reply["output_ids"] if path == "/generate" else reply["choices"][0]["message"]["content"]

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            number = self.answered % len(self.QUESTIONS)
            try:
                if self.ask(number) != self.expected[number]:
                    self.wrong[f"another answer to question {number}"] += 1
            except (httpx.HTTPError, KeyError, ValueError) as error:
                self.wrong[repr(error)] += 1
            self.answered += 1


@pytest.fixture(scope="module")
def neighbour(url: str) -> Iterator[Neighbour]:
    with Neighbour(url) as client:
        yield client
    assert client.answered
    assert [client.ask(number) for number in range(len(client.QUESTIONS))] == client.expected


@pytest.fixture(autouse=True)
def undisturbed(neighbour: Neighbour) -> Iterator[None]:
    yield
    assert not neighbour.wrong


@st.composite
def changed(draw: st.DrawFn, good: list[Any], outer: dict[str, list[Any]], inner: dict[str, list[Any]]) -> Any:
    """One of `good` with one to three fields set, of `outer` or, inside sampling_params, of `inner`."""
    request = copy.deepcopy(draw(st.sampled_from(good)))
    body = request[1] if isinstance(request, tuple) else request
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 2, 3]))):
        inside = isinstance(body.get("sampling_params"), dict) and draw(st.booleans())
        spot, values = (body["sampling_params"], inner) if inside else (body, outer)
        name = draw(st.sampled_from(sorted(values)))
        fits = draw(st.integers(0, 5))
        spot[name] = draw(st.sampled_from(values[name]) if fits else ANYTHING)
    return request


def post(url: str, path: str, body: Any) -> None:
    """Send it, read the complete reply, and check that it is an answer or the client's fault."""
    content = json.dumps(body).encode()
    asked = f"{path} {content.decode()[:600]}"
    try:
        reply = httpx.post(
            url + path, content=content, headers={"Content-Type": "application/json"}, timeout=PATIENCE_S
        )
    except httpx.HTTPError as error:
        raise AssertionError(f"{error!r} for {asked}") from error
    check(reply.status_code, reply.content.decode(errors="replace"), asked)


def check(status: int, text: str, asked: str) -> None:
    if NO_WORD not in text:
        assert status < 500, f"{status} for {asked}: {text[:600]}"
        for line in text.splitlines():
            if line.startswith('data: {"error"'):
                assert json.loads(line[6:])["error"]["code"] < 500, f"{line[:600]} for {asked}"
    assert "site-packages" not in text, f"a path of the server for {asked}: {text[:600]}"


@MANY
@given(body=changed(NATIVE, NATIVE_FIELDS, SAMPLING_FIELDS))
def test_generate_takes_any_field(body: Any, url: str) -> None:
    post(url, "/generate", body)


@MANY
@given(asked=changed(OPENAI, COMPLETION_FIELDS | CHAT_FIELDS, {}))
def test_chat_and_completions_take_any_field(asked: tuple[str, dict[str, Any]], url: str) -> None:
    path, body = asked
    post(url, path, {"model": MODEL} | body)


LEFT_OUT = {"/generate", "/flush_cache", *(path for path, _ in OPENAI)}


def other_routes() -> dict[str, Any]:
    """Path -> operation of SGLang's routes for clients that take a body and have no test of their own above.

    Without Ollama's, which ask for 2,048 tokens by themselves and break their stream off when that is refused, and
    without /flush_cache, which waits for a moment without requests, as long as its client says.
    """
    described = app.openapi()
    paths = {
        path: {"post": methods["post"]}
        for path, methods in described["paths"].items()
        if "post" in methods and is_for_clients(path) and path not in LEFT_OUT and not path.startswith("/api/")
    }
    found = schemathesis.openapi.from_dict(described | {"paths": paths}).get_all_operations()
    return {operation.ok().path: operation.ok() for operation in found}


OTHERS = other_routes()


@pytest.mark.parametrize("path", OTHERS)
@settings(MANY, max_examples=max(REQUESTS // 20, 10))
@given(data=st.data())
def test_other_routes_take_any_body(path: str, data: st.DataObject, url: str) -> None:
    case = data.draw(OTHERS[path].as_strategy())
    reply = case.call(base_url=url, timeout=PATIENCE_S)
    check(reply.status_code, reply.text, f"{path} {str(case.body)[:600]}")
