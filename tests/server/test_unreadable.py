"""Refusals of requests that cannot be read keep SGLang's form and say nothing of this machine."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.testclient import TestClient
from sglang.srt.entrypoints.http_server import validation_exception_handler
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

from server.unreadable import add_replies

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.add_exception_handler(RequestValidationError, validation_exception_handler)  # type: ignore[arg-type]
    add_replies(app)

    @app.post("/v1/chat/completions")
    @app.post("/v1/responses")
    @app.post("/v1/messages")
    def chat(request: ChatCompletionRequest) -> dict[str, Any]:
        if request.user:
            raise {"server": TypeError, "client": ValueError}[request.user]("why")
        return {}

    return TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_a_field_of_another_type_is_named_without_a_path(client: TestClient, path: str) -> None:
    reply = client.post(path, json={"messages": "x"})
    assert reply.status_code == 400
    assert "messages" in reply.text
    assert ".py" not in reply.text
    assert "site-packages" not in reply.text


def test_a_validator_that_breaks_is_the_clients_fault(client: TestClient) -> None:
    reply = client.post("/v1/chat/completions", json={"messages": MESSAGES, "response_format": 3})
    assert reply.status_code == 400
    assert "AttributeError" in reply.json()["message"]
    assert reply.json()["code"] == 400


def test_a_fault_of_the_server_stays_one(client: TestClient) -> None:
    assert client.post("/v1/chat/completions", json={"messages": MESSAGES, "user": "server"}).status_code == 500


def test_a_value_that_a_route_refuses_is_the_clients_fault(client: TestClient) -> None:
    reply = client.post("/v1/chat/completions", json={"messages": MESSAGES, "user": "client"})
    assert reply.status_code == 400
    assert "ValueError: why" in reply.json()["message"]


def test_a_good_request_passes(client: TestClient) -> None:
    assert client.post("/v1/chat/completions", json={"messages": MESSAGES}).status_code == 200
