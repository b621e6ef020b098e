"""The shipped CPU profile over real HTTP, with the official openai client."""

from __future__ import annotations

import concurrent.futures
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from benchmarks.harness.server_info import server_facts
from sglang_auf.checkpoints.weights import weights_sha256
from sglang_auf.env import CLIENT_API_KEY

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
KEY = "a-key"
MODEL = "smollm2-135m"
QUESTION = [{"role": "user", "content": "List three primary colours."}]


class Server:
    def __init__(self, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.url, self.process, self.log = url, process, log
        # SGLang closes a connection that was idle for 5 s, which is also when httpx's would stop to use it.
        http = openai.DefaultHttpxClient(limits=httpx.Limits(keepalive_expiry=2))
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=300, http_client=http)

    def get(self, path: str, key: str | None = KEY) -> Any:
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {key}"} if key else {})
        with urllib.request.urlopen(request, timeout=60) as reply:
            body = reply.read().decode()
        return json.loads(body) if body.startswith("{") else body

    def chat(self, **settings: Any) -> Any:
        return self.client.chat.completions.create(
            **({"model": MODEL, "messages": QUESTION, "max_tokens": 32, "temperature": 0} | settings)
        )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, start_server: Any) -> Iterator[Server]:
    """16 requests at a time, and a pool that holds about as many answers. Each step drafts, also on a busy machine."""
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = ["server", "--profile", MODEL, "--api-key", KEY, "--set", "tree_nodes=7"]
    for setting in ("max_running_requests=16", "max_total_tokens=4096", "context_length=2048"):
        arguments += ["--set", f"server_args.{setting}"]
    with start_server(arguments, log) as (url, process):
        yield Server(url, process, log)


def details(reply: Any) -> dict[str, Any]:
    found: dict[str, Any] = reply.model_extra["sglext"]["spec_tokens_details"]
    return found


def test_a_reply_carries_tau(server: Server) -> None:
    reply = server.chat()
    usage, spec = reply.usage, details(reply)
    assert spec["verify_steps"] > 0
    assert spec["tau"] == pytest.approx((usage.completion_tokens - 1) / spec["verify_steps"])
    assert sum(spec["accepted_histogram"]) == spec["verify_steps"]
    accepted = usage.completion_tokens_details.accepted_prediction_tokens
    rejected = usage.completion_tokens_details.rejected_prediction_tokens
    assert accepted == sum(a * count for a, count in enumerate(spec["accepted_histogram"]))
    assert accepted + rejected == spec["proposed"] > 0


def test_a_stream_carries_tau_and_the_same_text(server: Server) -> None:
    expected = server.chat().choices[0].message.content
    text, spec, usage = "", None, None
    for chunk in server.chat(stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            text += choice.delta.content or ""
        spec = (chunk.model_extra or {}).get("sglext", {}).get("spec_tokens_details", spec)
        usage = chunk.usage or usage
    assert text == expected
    assert spec is not None
    assert spec["tau"] > 0
    assert usage is not None
    assert usage.completion_tokens_details.accepted_prediction_tokens is not None


def test_completions_and_several_choices_carry_tau(server: Server) -> None:
    reply = server.client.completions.create(
        model=MODEL, prompt="The sky is", max_tokens=24, n=2, temperature=0, extra_body={"ignore_eos": True}
    )
    assert [entry["verify_steps"] > 0 for entry in details(reply)] == [True, True]
    assert reply.usage.completion_tokens_details.accepted_prediction_tokens >= 0


def test_seeded_choices_differ_from_each_other_and_repeat(server: Server) -> None:
    asked = {"n": 3, "seed": 11, "temperature": 1.0, "top_p": 0.95, "extra_body": {"min_p": 0.02, "ignore_eos": True}}
    first = [choice.message.content for choice in server.chat(**asked).choices]
    assert first == [choice.message.content for choice in server.chat(**asked).choices]
    assert len(set(first)) == 3
    alone = server.chat(**(asked | {"n": 1})).choices[0].message.content
    assert alone == first[0]


@pytest.mark.parametrize(
    ("asked", "status", "says"),
    [
        ({"model": "another"}, 404, "another"),
        ({"messages": []}, 400, "empty"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 100_000}, 400, "too large"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "context"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 1.5}, 400, "top_p"),
        ({"frequency_penalty": 2.5}, 400, "frequency_penalty"),
        ({"extra_body": {"repetition_penalty": -1}}, 400, "repetition_penalty"),
    ],
)
def test_a_bad_request_is_refused_and_nothing_else_suffers(
    asked: dict[str, Any], status: int, says: str, server: Server
) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        server.chat(**asked)
    assert refused.value.status_code == status
    assert says in refused.value.message
    assert server.chat().usage.completion_tokens > 1


def test_malformed_json_is_a_400(server: Server) -> None:
    request = urllib.request.Request(
        server.url + "/v1/chat/completions",
        data=b'{"model": "smol',
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code == 400


def test_grammar_tools_and_logprobs_are_sglangs_own(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    reply = server.chat(
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
        max_tokens=40,
    )
    assert isinstance(json.loads(reply.choices[0].message.content)["n"], int)
    with_logprobs = server.chat(logprobs=True, top_logprobs=2)
    assert len(with_logprobs.choices[0].logprobs.content) == with_logprobs.usage.completion_tokens


def test_more_requests_than_fit_are_all_answered_alike(server: Server) -> None:
    expected = server.chat(max_tokens=48).choices[0].message.content
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda _: server.chat(max_tokens=48).choices[0].message.content, range(64)))
    assert answers == [expected] * 64


def test_a_client_that_leaves_frees_its_memory_and_others_go_on(server: Server) -> None:
    stream = server.chat(stream=True, max_tokens=1500, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    assert server.chat().usage.completion_tokens > 1
    wait_until_running(server, 0)


def test_a_client_that_leaves_ends_no_request_whose_id_begins_with_its_own(server: Server) -> None:
    def begin(rid: str) -> Any:
        stream = server.chat(stream=True, max_tokens=1500, extra_body={"ignore_eos": True, "rid": rid})
        next(iter(stream))
        return stream

    stays, leaves = begin("x1"), begin("x")
    wait_until_running(server, 2)
    leaves.close()
    wait_until_running(server, 1)
    assert [choice.finish_reason for chunk in stays for choice in chunk.choices][-1] == "length"


def wait_until_running(server: Server, requests: int) -> None:
    deadline = time.monotonic() + 60
    while running(server) != requests:
        assert time.monotonic() < deadline, f"{running(server)} requests run, not {requests}"
        time.sleep(0.1)


def running(server: Server) -> int:
    return int(server.get("/v1/loads")["loads"][0]["num_running_reqs"])


def test_added_routes_and_metrics(server: Server) -> None:
    server.chat()
    acceptance = server.get("/v1/auf/acceptance")
    assert acceptance["total"]["verify_steps"] == sum(acceptance["total"]["accepted_histogram"])
    assert acceptance["total"]["tau"] > 1
    assert acceptance["window"]["requests"] <= 100
    assert server.get("/v1/auf/card")["card"]["block_size"] == 8
    metrics = server.get("/metrics")
    assert "auf_verify_steps_total" in metrics
    assert "sglang:" in metrics


def test_a_benchmark_learns_how_it_drafts(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CLIENT_API_KEY, KEY)
    facts, shipped = server_facts(server.url), ROOT / "drafters" / MODEL
    assert (facts.drafter, facts.weights) == (str(shipped), weights_sha256(shipped))
    assert (facts.tree, facts.tree_nodes, facts.overlap, facts.swaps) == (True, 7, False, 0)
    assert facts.draft_vocabulary == 8192


@pytest.mark.parametrize("path", ["/v1/auf/acceptance", "/v1/auf/card"])
def test_added_routes_want_the_key(path: str, server: Server) -> None:
    for key in (None, "wrong"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.get(path, key)
        assert refused.value.code == 401


def test_secrets_are_neither_logged_nor_shown(server: Server) -> None:
    """The flag was given on the command line, which `ps` shows; SGLang's log and routes must not."""
    info = server.get("/server_info")
    assert info["api_key"] == "***"
    assert KEY not in json.dumps(info)
    assert f"'{KEY}'" not in server.log.read_text(errors="replace")


def test_management_routes_and_long_requests_are_refused(server: Server) -> None:
    for path in ("/update_weights_from_disk", "/start_profile", "/load_lora_adapter"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.get(path)
        assert refused.value.code == 404
    with pytest.raises(openai.APIStatusError) as too_long:
        server.chat(messages=[{"role": "user", "content": "x" * 17 * 2**20}])
    assert too_long.value.status_code == 413
    with pytest.raises(urllib.error.HTTPError) as unreadable:
        server.get("/v1/models", key="k\xe9y")
    assert unreadable.value.code == 401


FATAL: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 8, "logprobs": True, "top_logprobs": 60000}),
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 4, "logprobs": 60000}),
    ("/v1/completions", {"prompt": [60000], "max_tokens": 4}),
    ("/v1/completions", {"prompt": [-1, 5], "max_tokens": 4}),
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 4, "n": 10**9}),
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 4, "logit_bias": {"1": 1e39}}),
    (
        "/generate",
        {"text": "Hi", "sampling_params": {"max_new_tokens": 4}, "return_logprob": True, "top_logprobs_num": 10**9},
    ),
    ("/generate", {"input_ids": [2**40], "sampling_params": {"max_new_tokens": 4}}),
    ("/generate", {"text": "Hi", "sampling_params": {"max_new_tokens": 4, "stop_token_ids": [2**70]}}),
    ("/generate", {"text": "Hi", "sampling_params": {"max_new_tokens": 4, "top_k": 2**40}}),
    ("/generate", {"text": "Hi", "sampling_params": {"max_new_tokens": 2**40}}),
    ("/generate", {"input_ids": [[]], "sampling_params": {"max_new_tokens": 4}}),
    ("/v1/completions", {"prompt": [""], "max_tokens": 4}),
    ("/v1/completions", {"prompt": ["Hi", ""], "max_tokens": 4}),
]


@pytest.mark.parametrize(("path", "body"), FATAL, ids=[str(number) for number in range(len(FATAL))])
def test_what_no_engine_can_compute_is_the_clients_fault_and_ends_nothing(
    server: Server, path: str, body: dict[str, Any]
) -> None:
    """Each of these ended the engine, or would have."""
    before = server.chat().choices[0].message.content
    content = json.dumps({"model": MODEL, **body} if path.startswith("/v1/") else body).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(server.url + path, content, headers), timeout=60)
    assert caught.value.code in (400, 422), caught.value.read()
    assert server.chat().choices[0].message.content == before


def test_a_port_in_use_is_refused_before_anything_loads(server: Server) -> None:
    port = server.url.rsplit(":", 1)[1]
    done = subprocess.run(
        [sys.executable, "-m", "server", "--profile", MODEL, "--port", port],
        cwd=ROOT,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert port in done.stderr.decode()


def test_sigterm_finishes_what_runs_and_leaves_no_process(server: Server) -> None:
    """Runs last, because it ends the module's server."""
    family = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.chat, max_tokens=64, extra_body={"ignore_eos": True})
        time.sleep(1)
        for process in reversed(family):  # as a service manager or a terminal does; children must not end by it
            process.send_signal(signal.SIGTERM)
        assert running.result(timeout=300).usage.completion_tokens == 64
    assert server.process.wait(timeout=120) == 0
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
