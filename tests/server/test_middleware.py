"""The live page's files: what a browser may do with them, and that nothing else gets past SGLang's API key."""

from __future__ import annotations

import re

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sglang.srt.utils.auth import add_api_key_middleware

from server.guard import put_in_front
from server.live_page import DIRECTORY, LivePage

KEY = {"Authorization": "Bearer secret"}
FILES = ["/auf", *(f"/auf/{file.name}" for file in DIRECTORY.iterdir() if file.name != "index.html")]


@pytest.fixture
def client() -> TestClient:
    """An app as launched: our page first, SGLang's key check added after it."""
    app = FastAPI()

    @app.get("/v1/auf/load")
    @app.get("/auf/deeper/{rest:path}")
    @app.post("/v1/chat/completions")
    async def answer() -> dict[str, bool]:
        return {"answered": True}

    put_in_front(app, LivePage)
    add_api_key_middleware(app, api_key="secret", admin_api_key=None)
    return TestClient(app)


@pytest.mark.parametrize("path", FILES)
def test_files_need_no_key_and_may_do_nothing_but_ask_this_server(path: str, client: TestClient) -> None:
    reply = client.get(path)
    assert reply.status_code == 200
    policy = dict(part.split(" ", 1) for part in reply.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert reply.headers["Referrer-Policy"] == "no-referrer"


@pytest.mark.parametrize("path", FILES)
def test_head_is_get_without_the_body(path: str, client: TestClient) -> None:
    head, get = client.head(path), client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert dict(head.headers) == dict(get.headers)
    assert int(head.headers["Content-Length"]) == len(get.content) > 0


def test_types_are_what_a_browser_runs(client: TestClient) -> None:
    kinds = {path: client.get(path).headers["Content-Type"].split(";")[0] for path in FILES}
    assert kinds["/auf"] == "text/html"
    assert kinds["/auf/page.css"] == "text/css"
    assert kinds["/auf/main.js"] == "text/javascript"
    assert kinds["/auf/icon.svg"] == "image/svg+xml"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/auf/load",
        "/auf/deeper/main.js",
        "/auf/",
        "/auf/index.html",
        "/auf/../v1/auf/load",
        "/auf/%2e%2e/v1/auf/load",
        "/aufs",
        "/AUF",
        "//auf",
        "/auf/page.css/",
        "/auf/..%2f..%2flaunch.py",
    ],
)
def test_nothing_else_passes_without_the_key(path: str, client: TestClient) -> None:
    assert client.get(path).status_code == 401


def test_a_host_header_is_not_a_path(client: TestClient) -> None:
    for host in ("x/auf?", "x/auf#", "/auf"):
        assert client.get("/v1/auf/load", headers={"Host": host}).status_code == 401


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_the_page_is_only_read(method: str, client: TestClient) -> None:
    reply = client.request(method, "/auf")
    assert reply.status_code == 405
    assert reply.headers["Allow"] == "GET, HEAD"


def test_with_the_key_the_rest_is_as_it_was(client: TestClient) -> None:
    assert client.get("/v1/auf/load", headers=KEY).json() == {"answered": True}
    assert client.post("/v1/chat/completions", headers=KEY).json() == {"answered": True}
    assert client.get("/auf", headers=KEY).status_code == 200


def test_behind_a_proxy_that_serves_it_under_a_path() -> None:
    app = FastAPI()
    put_in_front(app, LivePage)
    assert TestClient(app, root_path="/models/small").get("/auf").status_code == 200


def test_no_inline_code_and_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/auf").text
    assert re.findall(r"<script[^>]*>", page) == ['<script type="module" src="auf/main.js">']
    assert "<style" not in page
    assert not re.search(r"\s(on\w+|style)=", page)
    for path in FILES:
        text = client.get(path).text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"(https?:)?//[\w.-]+\.\w+/", text), path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), path


def test_every_file_the_page_names_is_there(client: TestClient) -> None:
    named = set(re.findall(r'(?:src|href)="([^"]+)"', client.get("/auf").text))
    modules = {f"auf/{name}" for path in FILES for name in re.findall(r'from "\./([^"]+)"', client.get(path).text)}
    assert {f"/{name}" for name in named | modules} == set(FILES) - {"/auf"}


def test_what_is_not_http_passes() -> None:
    app = FastAPI()
    started: list[bool] = []
    app.router.on_startup.append(lambda: started.append(True))
    put_in_front(app, LivePage)
    with TestClient(app):
        assert isinstance(app.middleware_stack, LivePage)
    assert started == [True]
