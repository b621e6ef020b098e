"""Which of SGLang's routes a client may reach: not those that manage the engine.

These change weights, load files, write profiles to directories that a request names, pause the engine. They share the
API key with the clients of a server, a weight that changes voids every promise about answers, and no path from a
request shall reach the file system. A profile with `management: true` opens them, as reinforcement learning needs.
"""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

CLIENTS = frozenset(
    {
        *("/generate", "/encode", "/classify", "/tokenize", "/detokenize", "/abort_request"),
        *("/parse_function_call", "/separate_reasoning", "/invocations", "/vertex_generate", "/ping"),
        *("/model_info", "/get_model_info", "/server_info", "/get_server_info", "/flush_cache"),
        *("", "/docs", "/openapi.json", "/auf"),
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
        error = {"message": reason, "type": "not_found", "code": 404}
        await JSONResponse({"error": error}, status_code=404)(scope, receive, send)


def is_for_clients(path: str) -> bool:
    return path.rstrip("/") in CLIENTS or path.startswith(CLIENTS_UNDER)
