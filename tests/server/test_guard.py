"""Which routes clients reach."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.testclient import TestClient

from server.guard import Guard, ReadableKey, is_for_clients, put_in_front


def test_management_routes_do_not_exist_for_clients() -> None:
    app = FastAPI()

    @app.post("/v1/chat/completions")
    @app.post("/update_weights_from_disk")
    async def answer() -> bool:
        return True

    app.add_middleware(Guard)
    client = TestClient(app)
    assert client.post("/v1/chat/completions").json() is True
    for path in ("/update_weights_from_disk", "/update_weights_from_disk/"):
        refused = client.post(path, json={"model_path": "/etc"})
        assert refused.status_code == 404
        assert "management: true" in refused.json()["error"]["message"]


def test_every_route_of_sglang_is_one_or_the_other() -> None:
    """A route that a new SGLang adds is closed until somebody has looked at it."""
    from sglang.srt.entrypoints.http_server import app

    paths = {str(path) for route in app.routes if (path := getattr(route, "path", None))}
    closed = {path for path in paths if not is_for_clients(path)}
    assert {"/v1/chat/completions", "/generate", "/health", "/v1/models", "/abort_request"} <= paths - closed
    for word in ("weight", "lora", "profile", "memory", "corp", "dump", "session", "logging", "hicache", "pause"):
        assert [path for path in paths if word in path], f"no route with {word}: look at what moved"
        assert {path for path in paths if word in path} <= closed


def test_a_key_that_is_not_ascii_is_a_wrong_key_and_no_server_error() -> None:
    from sglang.srt.utils.auth import add_api_key_middleware

    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> bool:
        return True

    put_in_front(app, ReadableKey)
    add_api_key_middleware(app, api_key="secret", admin_api_key=None)
    client = TestClient(app)
    statuses = [
        client.get("/v1/models", headers={b"Authorization": key}).status_code
        for key in (b"Bearer secret", b"Bearer other", b"Bearer \xe9", b"\xff")
    ]
    assert statuses == [200, 401, 401, 401]
