"""The probe against a real HTTP server that does or does not speculate."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from server.probe import PROBE_HEADER, Probe
from sglang_auf.errors import ServerError

Refusal = Callable[[dict[str, Any]], bool]


class Engine(ThreadingHTTPServer):
    """Answers /health with 503, as a starting server does, and /generate with `status` and `reply`.

    refuses: says of a body whether it is answered with 500.
    """

    def __init__(self, reply: Any, status: int = 200, refuses: Refusal = lambda _: False) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.reply, self.status, self.refuses = reply, status, refuses
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Engine

    def do_GET(self) -> None:
        self.send_error(503)

    def do_POST(self) -> None:
        assert self.path == "/generate"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(({name.lower(): value for name, value in self.headers.items()}, body))
        data = json.dumps(self.server.reply).encode()
        self.send_response(500 if self.server.refuses(body) else self.server.status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing on the test's stderr."""


@contextmanager
def engine(reply: Any, status: int = 200, refuses: Refusal = lambda _: False) -> Iterator[Engine]:
    with Engine(reply, status, refuses) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def answered(**meta_info: Any) -> dict[str, Any]:
    return {"text": " Paris.", "meta_info": {"completion_tokens": 64} | meta_info}


def test_verify_steps_are_counted() -> None:
    with engine(answered(spec_verify_ct=27)) as server:
        assert Probe(server.url, "token").run(needs_verify_steps=True) == 27


def test_probe_passes_the_gate_the_key_and_stays_out_of_the_totals() -> None:
    with engine(answered(spec_verify_ct=27)) as server:
        Probe(server.url, "token", api_key="secret").run(needs_verify_steps=True)
    for headers, body in server.requests:
        assert headers[PROBE_HEADER] == "token"
        assert headers["authorization"] == "Bearer secret"
        assert body["log_metrics"] is False
        assert body["sampling_params"]["ignore_eos"] is True, "an early end would leave no verify step to count"


def test_a_greedy_answer_and_a_sampled_one_are_asked() -> None:
    with engine(answered(spec_verify_ct=27)) as server:
        Probe(server.url, "token").run(needs_verify_steps=True)
    asked = [body["sampling_params"] for _, body in server.requests]
    assert [given["temperature"] for given in asked] == [0, 1]
    assert asked[1]["max_new_tokens"] > 1, "the first token is drawn by other code than those of verify steps"


def test_a_server_that_cannot_sample_is_found_out() -> None:
    with (
        engine(answered(spec_verify_ct=27), refuses=lambda body: body["sampling_params"]["temperature"] > 0) as server,
        pytest.raises(ServerError, match="500"),
    ):
        Probe(server.url, "token").run(needs_verify_steps=True)


@pytest.mark.parametrize("meta_info", [{}, {"spec_verify_ct": 0}, {"spec_verify_ct": None}])
def test_plain_decoding_is_found_out(meta_info: dict[str, Any]) -> None:
    with engine(answered(**meta_info)) as server, pytest.raises(ServerError, match="without one verify step"):
        Probe(server.url, "token").run(needs_verify_steps=True)


def test_plain_server_needs_no_verify_step() -> None:
    with engine(answered()) as server:
        assert Probe(server.url, "token").run(needs_verify_steps=False) == 0


def test_refusal_is_quoted() -> None:
    with (
        engine({"error": "out of pages"}, status=500) as server,
        pytest.raises(ServerError, match=r"500.*out of pages"),
    ):
        Probe(server.url, "token").run(needs_verify_steps=False)


@pytest.mark.parametrize("reply", [["not", "an", "object"], {"text": "no counts"}, "words"])
def test_answer_that_is_none(reply: Any) -> None:
    with engine(reply) as server, pytest.raises(ServerError, match="no answer"):
        Probe(server.url, "token").run(needs_verify_steps=True)


def test_port_that_never_opens() -> None:
    with engine(answered()) as server:
        url = server.url
    with pytest.raises(ServerError, match="no answer at"):
        Probe(url, "token", answer_s=0.3).run(needs_verify_steps=True)


def test_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with engine(answered(spec_verify_ct=1)) as server:
        assert Probe(server.url, "token", answer_s=1).run(needs_verify_steps=True) == 1
