"""GET /auf: the live page. Static files, no data; the page asks the routes under /v1 with the key its reader types in.

A browser cannot send a key with the address it opens, so these files, and nothing else, are answered before SGLang
asks for one.
"""

from __future__ import annotations

from pathlib import Path

from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

DIRECTORY = Path(__file__).with_name("page")
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
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class LivePage:
    """ASGI middleware that answers GET and HEAD of /auf and of the files beside it, and passes the rest on."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.files = {f"/auf/{file.name}": file for file in DIRECTORY.iterdir()}
        self.files["/auf"] = self.files.pop("/auf/index.html")
        self.contents = {path: file.read_bytes() for path, file in self.files.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The path as routing sees it and not as the Host header completes it: this decides who needs no key.
        path = scope["path"].removeprefix(scope.get("root_path", "")) if scope["type"] == "http" else None
        if path not in self.files:
            await self.app(scope, receive, send)
        elif scope["method"] in ("GET", "HEAD"):
            await self._file(path)(scope, receive, send)
        else:
            await PlainTextResponse("GET or HEAD", 405, {"Allow": "GET, HEAD"})(scope, receive, send)

    def _file(self, path: str) -> Response:
        return Response(self.contents[path], media_type=TYPES[self.files[path].suffix], headers=HEADERS)
