"""What a request passes before it reaches a route, SGLang's or ours: all middleware, and its order in `add_all`."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette._utils import get_route_path  # what routing itself asks: another rule would leave a way around it
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.probe import PROBE_HEADER
from sglang_auf.recording import capture
from sglang_auf.recording.settings import RECORD_HEADER, RecordSettings

MAX_BODY = 16 * 2**20
"""Bytes of a request: some hundred times the longest prompt. Headers are bounded by the HTTP parser (h11: 64 KiB)."""


def add_all(
    app: Any,
    closed_because: Callable[[], str | None],
    probe_token: str,
    management: bool,
    record: RecordSettings | None = None,
) -> None:
    """Add the middleware to SGLang's app, which must not have started. The lists have the outermost first.

    record: how answers are recorded, None where they are not.
    """
    before_sglangs: list[Callable[[ASGIApp], ASGIApp]] = [
        LivePage,  # before the API-key check, because a browser cannot send a key with the address it opens
        ReadableKey,  # before the API-key check, which breaks on the keys that this one refuses
    ]
    app.max_body_size = MAX_BODY  # Starlette puts its limit here, so that no middleware below reads a longer body
    # SGLang adds its API-key check here when it launches.
    after_sglangs = [
        *([] if management else [Middleware(Guard)]),  # before Gate, since a closed route will not open later
        Middleware(Gate, closed_because=closed_because, probe_token=probe_token),
        *([Middleware(Consent, opt_in=record.opt_in)] if record else []),  # no other reads what it notes
    ]
    put_in_front(app, before_sglangs)
    for middleware in reversed(after_sglangs):  # the last one added is the outermost
        app.add_middleware(middleware.cls, *middleware.args, **middleware.kwargs)


def put_in_front(app: Any, middleware: Sequence[Callable[[ASGIApp], ASGIApp]]) -> None:
    """Make these (outermost first) the outermost middleware of a Starlette app, whatever is added to it afterwards.

    `add_middleware` would not do: what is added last is outermost, and SGLang adds its API-key check at launch.
    """
    build = app.build_middleware_stack

    def with_these_in_front() -> ASGIApp:
        stack: ASGIApp = build()
        for one in reversed(middleware):
            stack = one(stack)
        return stack

    app.build_middleware_stack = with_these_in_front


PAGE = Path(__file__).with_name("page")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class LivePage:
    """ASGI middleware that answers GET and HEAD of /auf and of the files beside it, and passes the rest on.

    The files hold no data: the page asks the routes under /v1 with the key that its reader types in.
    """

    # Starlette's StaticFiles would not do. It redirects /auf to /auf/, serves more spellings of a path than one
    # (/auf/index.html, /auf//main.js), answers 404 and 405 for paths that belong to SGLang, and takes a file's type
    # from tables of the machine, where a wrong one (with nosniff) breaks the page.

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.files = {
            f"/auf/{file.name}": Response(file.read_bytes(), headers=PAGE_HEADERS, media_type=TYPES[file.suffix])
            for file in PAGE.iterdir()
        }
        self.files["/auf"] = self.files.pop("/auf/index.html")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The path as routing sees it and not as the Host header completes it: this decides who needs no key.
        path = get_route_path(scope) if scope["type"] == "http" else None
        if path not in self.files:
            await self.app(scope, receive, send)
        elif scope["method"] in ("GET", "HEAD"):
            await self.files[path](scope, receive, send)
        else:
            await PlainTextResponse("GET or HEAD", 405, {"Allow": "GET, HEAD"})(scope, receive, send)


class ReadableKey:
    """ASGI middleware that answers 401 to a key with other characters than ASCII's, on which SGLang's check breaks."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or Headers(scope=scope).get("authorization", "").isascii():
            await self.app(scope, receive, send)
            return
        await _refusal(401, "unauthorized", "an API key with other characters than ASCII's")(scope, receive, send)


CLIENTS = frozenset(
    {
        *("/generate", "/encode", "/classify", "/tokenize", "/detokenize"),
        *("/parse_function_call", "/separate_reasoning", "/invocations", "/vertex_generate", "/ping"),
        *("/model_info", "/get_model_info", "/server_info", "/get_server_info", "/flush_cache"),
        *("", "/docs", "/openapi.json", "/auf"),
        "/freeze_gc",  # SGLang asks its own server for this when it has started; it takes nothing from a request
    }
)
CLIENTS_UNDER = ("/v1/", "/api/", "/health", "/ready", "/metrics", "/auf/")
MANAGEMENT = frozenset({"/v1/auf/drafter"})
"""Routes of ours that are not for clients, though others under the same prefix are."""


class Guard:
    """ASGI middleware that answers 404 to every route that is not for clients, and opens no WebSocket.

    Those are MANAGEMENT and SGLang's routes that manage the engine: they change weights, load files, write profiles to
    directories that a request names, pause the engine, and abort requests of any client. They take the same API key as
    clients have; but changed weights void every promise about answers, no path from a request may reach the file
    system, and a client may end its own requests only, which it does by closing its connection. A profile with
    `management: true` opens them, as reinforcement learning needs.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # SGLang's one, for speech, asks for no key and passes no gate
            await send({"type": "websocket.close", "code": 1008, "reason": "no route for clients"})
            return
        if scope["type"] != "http" or is_for_clients(get_route_path(scope)):
            await self.app(scope, receive, send)
            return
        reason = f"no route for clients: {scope['path']} (management: true in the profile opens all of them)"
        await _refusal(404, "not_found", reason)(scope, receive, send)


def is_for_clients(path: str) -> bool:
    if path.rstrip("/") in MANAGEMENT:
        return False
    return path.rstrip("/") in CLIENTS or path.startswith(CLIENTS_UNDER)


GENERATING = ("/v1/", "/generate", "/api/", "/invocations", "/vertex_generate")


class Gate:
    """ASGI middleware that answers 503 to requests for tokens while `closed_because` gives a reason.

    SGLang answers as soon as its port is open, and admits requests after SIGTERM, so that clients in a closed loop
    would keep a stopping server alive for ever.

    closed_because: why no tokens are given out right now, or None. probe_token: the request whose PROBE_HEADER carries
    it passes a closed gate. Everything else (health, metrics, GET routes, aborts) always passes.
    """

    def __init__(self, app: ASGIApp, closed_because: Callable[[], str | None], probe_token: str) -> None:
        self.app = app
        self.closed_because = closed_because
        self.probe_token = probe_token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reason = self._reason_to_refuse(scope)
        if reason is None:
            await self.app(scope, receive, send)
            return
        await _refusal(503, "service_unavailable", reason, {"Retry-After": "5"})(scope, receive, send)

    def _reason_to_refuse(self, scope: Scope) -> str | None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT"):
            return None
        if not get_route_path(scope).startswith(GENERATING):
            return None
        reason = self.closed_because()
        given = Headers(scope=scope).get(PROBE_HEADER, "")
        passes = reason is None or secrets.compare_digest(given.encode(), self.probe_token.encode())
        return None if passes else reason


class Consent:
    """ASGI middleware that notes whether the answers to a request may be recorded.

    RECORD_HEADER says `on` or `off`. Any other value counts as `off`, and so does one `off` among several values. A
    request without it is recorded unless opt_in.
    """

    def __init__(self, app: ASGIApp, opt_in: bool) -> None:
        self.app = app
        self.opt_in = opt_in

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            said = {value.strip().lower() for value in Headers(scope=scope).getlist(RECORD_HEADER)}
            capture.allowed.set(said == {"on"} or (not said and not self.opt_in))
        await self.app(scope, receive, send)


def _refusal(status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status, headers)
