"""Which of SGLang's routes a client may reach: not those that manage the engine.

Those change weights, load files, write profiles to directories that a request names, pause the engine. They share the
API key with the clients of a server, a weight that changes voids every promise about answers, and no path from a
request shall reach the file system. A profile with `management: true` opens them, as reinforcement learning needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

CLIENTS = frozenset(
    {
        *("/generate", "/encode", "/classify", "/tokenize", "/detokenize", "/abort_request"),
        *("/parse_function_call", "/separate_reasoning", "/invocations", "/vertex_generate", "/ping"),
        *("/model_info", "/get_model_info", "/server_info", "/get_server_info", "/flush_cache"),
        *("", "/docs", "/openapi.json", "/auf"),
        "/freeze_gc",  # SGLang asks its own server for this when it has started; it takes nothing from a request
    }
)
CLIENTS_UNDER = ("/v1/", "/api/", "/health", "/ready", "/metrics", "/auf/")


class Guard:
    """ASGI middleware that answers 404 to everything else. Not to be added where `management` is true."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_for_clients(scope["path"]):
            await self.app(scope, receive, send)
            return
        reason = f"no route for clients: {scope['path']} (management: true in the profile opens all of SGLang's)"
        await _refusal(404, "not_found", reason)(scope, receive, send)


class ReadableKey:
    """ASGI middleware that answers 401 to a key with other characters than ASCII's, on which SGLang's check breaks."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or Headers(scope=scope).get("authorization", "").isascii():
            await self.app(scope, receive, send)
            return
        await _refusal(401, "unauthorized", "an API key with other characters than ASCII's")(scope, receive, send)


def put_in_front(app: Any, middleware: Callable[[ASGIApp], ASGIApp]) -> None:
    """Make this the outermost middleware of a Starlette app, whatever is still added to it before it starts.

    `add_middleware` would not do: what is added last is outermost, and SGLang adds its API-key check at launch.
    """
    build = app.build_middleware_stack
    app.build_middleware_stack = lambda: middleware(build())


def is_for_clients(path: str) -> bool:
    return path.rstrip("/") in CLIENTS or path.startswith(CLIENTS_UNDER)


def _refusal(status: int, kind: str, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status_code=status)
