"""What requests pass before a route: the live page, the key, the routes for clients, and the gate."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from fastapi import FastAPI, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from sglang.srt.utils.auth import add_api_key_middleware

from server.middleware import PAGE, Gate, Guard, LivePage, ReadableKey, add_all, is_for_clients, put_in_front
from server.probe import PROBE_HEADER
from sglang_auf.recording import capture
from sglang_auf.recording.settings import RecordSettings

KEY = {"Authorization": "Bearer secret"}
TOKEN = "the probe's own"
FILES = ["/auf", *(f"/auf/{file.name}" for file in PAGE.iterdir() if file.name != "index.html")]

REFUSALS = [
    ("GET", "/auf", b"\xff", 200),  # the page is open to everybody
    ("POST", "/v1/chat/completions", b"\xff", 401),  # the unreadable key
    ("POST", "/update_weights_from_disk", b"Bearer other", 401),  # SGLang's key check, before it is known what exists
    ("POST", "/update_weights_from_disk", b"Bearer secret", 404),
    ("POST", "/generate", b"Bearer secret", 503),
]


@pytest.mark.parametrize(("method", "path", "key", "status"), REFUSALS)
def test_the_first_that_refuses_answers(method: str, path: str, key: bytes, status: int) -> None:
    app = FastAPI()
    add_all(app, lambda: "the server is starting", TOKEN, management=False)
    add_api_key_middleware(app, api_key="secret", admin_api_key=None)
    assert TestClient(app).request(method, path, headers={b"Authorization": key}).status_code == status


@pytest.fixture
def client() -> TestClient:
    """The live page in front of an app, to which SGLang's key check is added after it."""
    app = FastAPI()

    @app.get("/v1/auf/load")
    @app.get("/auf/deeper/{rest:path}")
    @app.post("/v1/chat/completions")
    async def answer() -> dict[str, bool]:
        return {"answered": True}

    put_in_front(app, [LivePage])
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
    put_in_front(app, [LivePage])
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
    put_in_front(app, [LivePage])
    with TestClient(app):
        assert isinstance(app.middleware_stack, LivePage)
    assert started == [True]


def test_management_routes_do_not_exist_for_clients() -> None:
    app = FastAPI()

    @app.post("/v1/chat/completions")
    @app.post("/update_weights_from_disk")
    @app.post("/v1/auf/drafter")
    async def answer() -> bool:
        return True

    app.add_middleware(Guard)
    client = TestClient(app)
    assert client.post("/v1/chat/completions").json() is True
    for path in ("/update_weights_from_disk", "/update_weights_from_disk/", "/v1/auf/drafter", "/v1/auf/drafter/"):
        refused = client.post(path, json={"model_path": "/etc"})
        assert refused.status_code == 404
        assert "management: true" in refused.json()["error"]["message"]


@pytest.mark.parametrize("root", ["", "/api", "/v1", "/models/small"])
def test_a_path_that_the_server_is_served_under_opens_and_closes_nothing(root: str) -> None:
    """uvicorn puts it in front of every path, and routing takes it away again."""
    app = FastAPI()

    @app.post("/v1/chat/completions")
    @app.post("/update_weights_from_disk")
    async def answer() -> bool:
        return True

    open_gate, closed_gate = FastAPI(), FastAPI()
    for outer, reason in ((open_gate, None), (closed_gate, "starting")):
        outer.mount("/", app)
        outer.add_middleware(Guard)
        outer.add_middleware(Gate, closed_because=lambda reason=reason: reason, probe_token="t")
    statuses = {
        (gate is open_gate, path): TestClient(gate, root_path=root).post(root + path).status_code
        for gate in (open_gate, closed_gate)
        for path in ("/v1/chat/completions", "/update_weights_from_disk")
    }
    assert statuses == {
        (True, "/v1/chat/completions"): 200,
        (True, "/update_weights_from_disk"): 404,
        (False, "/v1/chat/completions"): 503,
        (False, "/update_weights_from_disk"): 404,
    }


def test_no_websocket_is_opened_for_clients() -> None:
    guarded, open_to_all = FastAPI(), FastAPI()
    guarded.add_middleware(Guard)

    async def realtime(socket: WebSocket) -> None:
        await socket.accept()
        await socket.close()

    for app in (guarded, open_to_all):
        app.add_api_websocket_route("/v1/realtime", realtime)
    with TestClient(open_to_all).websocket_connect("/v1/realtime"):
        pass
    with pytest.raises(WebSocketDisconnect), TestClient(guarded).websocket_connect("/v1/realtime"):
        pass


def test_every_route_of_sglang_is_one_or_the_other() -> None:
    """A route that a new SGLang adds is closed until somebody has looked at it."""
    from sglang.srt.entrypoints.http_server import app

    paths = {str(path) for route in app.routes if (path := getattr(route, "path", None))}
    closed = {path for path in paths if not is_for_clients(path)}
    assert {"/v1/chat/completions", "/generate", "/health", "/v1/models"} <= paths - closed
    for word in (
        "abort",
        "weight",
        "lora",
        "profile",
        "memory",
        "corp",
        "dump",
        "session",
        "logging",
        "hicache",
        "pause",
    ):
        assert [path for path in paths if word in path], f"no route with {word}: look at what moved"
        assert {path for path in paths if word in path} <= closed


def test_a_key_that_is_not_ascii_is_a_wrong_key_and_no_server_error() -> None:
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> bool:
        return True

    put_in_front(app, [ReadableKey])
    add_api_key_middleware(app, api_key="secret", admin_api_key=None)
    client = TestClient(app)
    statuses = [
        client.get("/v1/models", headers={b"Authorization": key}).status_code
        for key in (b"Bearer secret", b"Bearer other", b"Bearer \xe9", b"\xff")
    ]
    assert statuses == [200, 401, 401, 401]


def gated(closed_because: Callable[[], str | None]) -> TestClient:
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
    assert gated(lambda: None).post("/v1/chat/completions").json() == {"answered": True}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate", "/v1/never-heard-of"])
def test_closed_gate_says_why_and_when_to_come_back(path: str) -> None:
    reply = gated(lambda: "the server is stopping").post(path)
    assert reply.status_code == 503
    assert reply.json()["error"] == {"message": "the server is stopping", "type": "service_unavailable", "code": 503}
    assert int(reply.headers["Retry-After"]) > 0


def test_closed_gate_keeps_health_lists_and_aborts_open() -> None:
    closed = gated(lambda: "the server is stopping")
    assert closed.get("/health").status_code == 200
    assert closed.get("/v1/models").status_code == 200
    assert closed.post("/abort_request").status_code == 200


@pytest.mark.parametrize(("token", "status"), [(TOKEN, 200), ("guessed", 503), ("", 503), ("é", 503)])
def test_only_the_probe_passes_a_closed_gate(token: str, status: int) -> None:
    headers = {PROBE_HEADER.encode(): token.encode("latin-1")}
    assert gated(lambda: "starting").post("/generate", headers=headers).status_code == status


def test_gate_is_asked_at_every_request() -> None:
    reasons = ["starting", None, "stopping"]
    changing = gated(lambda: reasons.pop(0))
    assert [changing.post("/generate").status_code for _ in range(3)] == [503, 200, 503]


@pytest.mark.parametrize(
    ("opt_in", "said", "recorded"),
    [
        (False, [], True),
        (False, ["off"], False),
        (False, ["on"], True),
        (False, ["false"], False),
        (False, [""], False),
        (False, ["on", "off"], False),
        (True, [], False),
        (True, [" ON "], True),
        (True, ["yes"], False),
        (True, ["on", "on"], True),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_who_is_recorded(opt_in: bool, said: list[str], recorded: bool, stream: bool) -> None:
    """Also where SGLang's own middleware runs the route in a task of its own, and in the task of a stream."""
    app = FastAPI()

    @app.middleware("http")
    async def through(request: Any, call: Any) -> Any:
        return await call(request)

    @app.get("/v1/ask")
    async def ask() -> Response:
        async def later() -> AsyncIterator[str]:
            yield str(capture.allowed.get())

        return StreamingResponse(later()) if stream else Response(str(capture.allowed.get()))

    add_all(app, lambda: None, TOKEN, management=False, record=RecordSettings(directory="rows", opt_in=opt_in))
    headers = [("X-SGLang-AUF-Record", value) for value in said]
    assert TestClient(app).get("/v1/ask", headers=headers).text == str(recorded)
    assert capture.allowed.get() is False
