"""Who gets tokens while the server starts, runs and drains."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from server.middleware import Gate
from server.probe import PROBE_HEADER

TOKEN = "the probe's own"


def client(closed_because: Callable[[], str | None]) -> TestClient:
    app = FastAPI()

    @app.post("/v1/chat/completions")
    @app.post("/generate")
    @app.post("/abort_request")
    @app.get("/v1/models")
    @app.get("/health")
    async def answer() -> dict[str, bool]:
        return {"answered": True}

    app.add_middleware(Gate, closed_because=closed_because, probe_token=TOKEN)
    return TestClient(app)


def test_open_gate_lets_everybody_through() -> None:
    assert client(lambda: None).post("/v1/chat/completions").json() == {"answered": True}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate", "/v1/never-heard-of"])
def test_closed_gate_says_why_and_when_to_come_back(path: str) -> None:
    reply = client(lambda: "the server is stopping").post(path)
    assert reply.status_code == 503
    assert reply.json()["error"] == {"message": "the server is stopping", "type": "service_unavailable", "code": 503}
    assert int(reply.headers["Retry-After"]) > 0


def test_closed_gate_keeps_health_lists_and_aborts_open() -> None:
    closed = client(lambda: "the server is stopping")
    assert closed.get("/health").status_code == 200
    assert closed.get("/v1/models").status_code == 200
    assert closed.post("/abort_request").status_code == 200


@pytest.mark.parametrize(("token", "status"), [(TOKEN, 200), ("guessed", 503), ("", 503), ("é", 503)])
def test_only_the_probe_passes_a_closed_gate(token: str, status: int) -> None:
    headers = {PROBE_HEADER.encode(): token.encode("latin-1")}
    assert client(lambda: "starting").post("/generate", headers=headers).status_code == status


def test_gate_is_asked_at_every_request() -> None:
    reasons = ["starting", None, "stopping"]
    changing = client(lambda: reasons.pop(0))
    assert [changing.post("/generate").status_code for _ in range(3)] == [503, 200, 503]
