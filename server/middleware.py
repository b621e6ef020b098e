"""Who may ask for tokens: nobody before the probe passed, nobody new once the server drains.

SGLang answers from the moment its port is open, and goes on admitting requests after SIGTERM, so that clients in a
closed loop would keep a stopping server alive for ever.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server.probe import PROBE_HEADER

GENERATING = ("/v1/", "/generate", "/api/", "/invocations", "/vertex_generate")


class Gate:
    """ASGI middleware that answers 503 to requests for tokens while `closed_because` gives a reason.

    probe_token: the request whose PROBE_HEADER carries it passes anyway. Everything else (health, metrics, GET routes,
    aborts) always passes.
    """

    def __init__(self, app: ASGIApp, closed_because: Callable[[], str | None], probe_token: str) -> None:
        self.app = app
        self.closed_because = closed_because
        self.probe_token = probe_token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reason = self._refusal(scope)
        if reason is None:
            await self.app(scope, receive, send)
            return
        error = {"message": reason, "type": "service_unavailable", "code": 503}
        await JSONResponse({"error": error}, status_code=503, headers={"Retry-After": "5"})(scope, receive, send)

    def _refusal(self, scope: Scope) -> str | None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT"):
            return None
        if not scope["path"].startswith(GENERATING):
            return None
        reason = self.closed_because()
        given = Headers(scope=scope).get(PROBE_HEADER, "")
        passes = reason is None or secrets.compare_digest(given.encode(), self.probe_token.encode())
        return None if passes else reason
