"""The added routes, with totals fed by hand and a stand-in for SGLang's manager, behind SGLang's own key check."""

from __future__ import annotations

import asyncio
import itertools
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sglang.srt.entrypoints import http_server
from sglang.srt.utils.auth import add_api_key_middleware

from server import routes
from server.drafters import BusyError, Drafters
from server.preflight import ServedModel, Speculation
from server.routes import auf_router
from sglang_auf.acceptance import Acceptance
from sglang_auf.checkpoints.card import CheckedDrafter, DrafterCard
from sglang_auf.checkpoints.draft_vocabulary import DraftVocabulary
from sglang_auf.checkpoints.target_facts import TargetFacts
from sglang_auf.checkpoints.weights import weights_sha256
from sglang_auf.env import DRAFT_VOCABULARY, TREE, TREE_NODES
from sglang_auf.errors import CardError
from sglang_auf.hooks import metrics
from sglang_auf.hooks.metrics import READ, Figure
from sglang_auf.recording.recorder import DROPPED, Recorder
from sglang_auf.recording.ring import row_files
from sglang_auf.recording.settings import RecordSettings
from tests.support.tiny_models import write_drafter, write_target

TARGET = TargetFacts(
    name="owner/target",
    hub_id="owner/target",
    revision="abc",
    model_type="llama",
    hidden_size=576,
    num_layers=30,
    vocab_size=49152,
    config_hash="c0",
    chat_template_hash=None,
    max_position_embeddings=8192,
    dtype="bfloat16",
)
CARD = DrafterCard(
    target_name="owner/target",
    target_config_hash="c0",
    target_layer_ids=(1, 14, 27),
    mask_token_id=3,
    block_size=16,
    head="dflash",
    objective="auf",
)
CHECKED = CheckedDrafter(CARD, ("tau may fall",), Path("/models/drafter"))
SPECULATING = ServedModel("small", TARGET, Speculation("owner/drafter", CHECKED, 4, lambda _: CHECKED, "cpu"))
PLAIN = ServedModel("small", TARGET, None)


@pytest.fixture(autouse=True)
def own_totals(monkeypatch: pytest.MonkeyPatch) -> metrics.AcceptanceTotals:
    """Fresh totals with a window of one request."""
    fresh = metrics.AcceptanceTotals(window=1)
    monkeypatch.setattr(metrics, "TOTALS", fresh)
    return fresh


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def readers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the routes under test add to /metrics, and nothing of others."""
    fresh: list[Any] = []
    monkeypatch.setattr(metrics, "READERS", fresh)
    return fresh


def client(served: ServedModel) -> TestClient:
    app = FastAPI()
    app.include_router(auf_router(served, lambda: None))
    return TestClient(app)


def test_acceptance_before_the_first_request_is_null_not_zero() -> None:
    reply = client(SPECULATING).get("/v1/auf/acceptance").json()
    assert (reply["model"], reply["block_size"]) == ("small", 4)
    assert reply["total"]["tau"] is None
    assert reply["total"]["verify_steps"] == 0
    assert reply["window"]["size"] == 1


def test_acceptance_is_what_was_counted(own_totals: metrics.AcceptanceTotals) -> None:
    reading = client(SPECULATING)
    own_totals.add(Acceptance.of_request([1, 2, 0, 1], completion_tokens=10))
    own_totals.add(Acceptance.of_request([4, 0, 0, 0], completion_tokens=5))
    reply = reading.get("/v1/auf/acceptance").json()
    total, window = reply["total"], reply["window"]
    assert total["accepted_histogram"] == [5, 2, 0, 1]
    assert (total["requests"], total["verify_steps"], total["emitted"], total["accepted"]) == (2, 8, 13, 5)
    assert total["tau"] == pytest.approx(13 / 8)
    assert total["tau_macro"] == pytest.approx((9 / 4 + 1) / 2)
    assert total["tau_verify"] == pytest.approx(1 + 5 / 8)
    assert total["alpha"] == [pytest.approx(3 / 8), pytest.approx(1 / 3), 1.0]
    assert (window["requests"], window["tau"]) == (1, 1.0), "the window holds the last request only"


def test_card_says_what_is_served_and_what_does_not_match() -> None:
    reply = client(SPECULATING).get("/v1/auf/card").json()
    assert (reply["drafter"], reply["block_size"], reply["card"]["block_size"]) == ("owner/drafter", 4, 16)
    assert reply["card"]["target_layer_ids"] == [1, 14, 27]
    assert reply["draft_vocabulary"] is None
    assert reply["weights"] is None, "there is no such directory"
    assert reply["warnings"] == ["tau may fall"]
    assert "thinking" in reply["unknown"]
    assert "objective" not in reply["unknown"]
    assert (reply["target"]["name"], reply["target"]["revision"]) == ("owner/target", "abc")


@pytest.mark.parametrize(("switch", "tokens"), [("1", 3), ("0", None)])
def test_card_says_how_many_tokens_are_drafted(
    switch: str, tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DRAFT_VOCABULARY.name, switch)
    checked = replace(CHECKED, vocabulary=DraftVocabulary(tokens=(0, 5, 9)))
    served = ServedModel("small", TARGET, Speculation("owner/drafter", checked, 4, lambda _: checked, "cpu"))
    assert client(served).get("/v1/auf/card").json()["draft_vocabulary"] == tokens


@pytest.mark.parametrize(
    ("device", "tree", "nodes", "said"),
    [
        ("cpu", "1", None, (True, None)),
        ("cpu", "1", "7", (True, 7)),
        ("cpu", "0", "7", (False, None)),
        ("cuda", "1", "7", (False, None)),
    ],
)
def test_card_says_whether_trees_are_verified(
    device: str, tree: str, nodes: str | None, said: tuple[bool, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TREE.name, tree)
    monkeypatch.delenv(TREE_NODES, raising=False)
    if nodes is not None:
        monkeypatch.setenv(TREE_NODES, nodes)
    speculation = Speculation("owner/drafter", CHECKED, 4, lambda _: CHECKED, device)
    reply = client(ServedModel("small", TARGET, speculation)).get("/v1/auf/card").json()
    assert (reply["tree"], reply["tree_nodes"]) == said
    chains = ServedModel("small", TARGET, replace(speculation, is_mrope=True))
    assert client(chains).get("/v1/auf/card").json()["tree"] is False


@pytest.mark.parametrize("route", ["acceptance", "card"])
def test_plain_server_says_that_it_is_plain(route: str) -> None:
    reply = client(PLAIN).get(f"/v1/auf/{route}")
    assert reply.status_code == 404
    assert "--plain" in reply.json()["detail"]


@pytest.mark.parametrize("route", ["acceptance", "card", "recording"])
@pytest.mark.parametrize(("key", "status"), [("secret", 200), ("guessed", 401), (None, 401)])
def test_api_key_of_sglang_protects_them(route: str, key: str | None, status: int) -> None:
    app = FastAPI()
    app.include_router(auf_router(SPECULATING, lambda: None))
    add_api_key_middleware(app, api_key="secret", admin_api_key=None)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    assert TestClient(app).get(f"/v1/auf/{route}", headers=headers).status_code == status


def test_routes_are_documented() -> None:
    app = FastAPI()
    app.include_router(auf_router(SPECULATING, lambda: None))
    paths = app.openapi()["paths"]
    assert {path: {of: set(one["responses"]) for of, one in methods.items()} for path, methods in paths.items()} == {
        "/v1/auf/acceptance": {"get": {"200", "404"}},
        "/v1/auf/card": {"get": {"200", "404"}},
        "/v1/auf/drafter": {"post": {"200", "400", "404", "409", "422"}},
        "/v1/auf/load": {"get": {"200"}},
        "/v1/auf/recording": {"get": {"200"}},
    }


def test_a_server_that_records_nothing_says_so() -> None:
    assert client(PLAIN).get("/v1/auf/recording").json() == {"model": "small", "recording": None}


def test_what_is_recorded_is_said(tmp_path: Path) -> None:
    settings = RecordSettings(directory=str(tmp_path / "rows"), share=0.5, opt_in=True, max_bytes=2**16, max_age=7)
    recorder = Recorder.opened(settings, write_target(tmp_path / "target"))
    recorder.offer([1], [2])
    recorder.offer([1], [2, 3])
    recorder.start()
    recorder.stop()
    app = FastAPI()
    app.include_router(auf_router(PLAIN, lambda: None, recorder))
    kept = TestClient(app).get("/v1/auf/recording").json()["recording"]
    assert kept["bytes"] == sum(file.stat().st_size for file in row_files(tmp_path / "rows")) > 0
    assert kept["oldest"].endswith("+00:00")
    assert kept["dropped"].pop("short") == 1
    assert set(kept["dropped"].values()) == {0}
    kept = {name: value for name, value in kept.items() if name not in ("bytes", "oldest", "dropped")}
    assert kept == {
        "directory": str(tmp_path / "rows"),
        "share": 0.5,
        "opt_in": True,
        "max_bytes": 2**16,
        "max_age": 7.0,
        "rows": 1,
        "unread": 0,
        "recorded": 1,
        "waiting_tokens": 0,
        "error": None,
    }


STARTED = {
    "generation": 0,
    "path": "/models/drafter",
    "state": "started",
    "other": None,
    "before": None,
    "after": None,
    "watched": 0,
    "watches": 100,
}


@pytest.mark.parametrize("route", ["acceptance", "card"])
def test_both_say_which_drafter_runs_and_how_it_came_to(route: str) -> None:
    assert client(SPECULATING).get(f"/v1/auf/{route}").json()["swap"] == STARTED


@pytest.mark.parametrize(
    ("error", "status"), [(None, 200), (CardError("no card", "one"), 400), (BusyError("a swap", "one"), 409)]
)
def test_a_swap_is_answered_with_its_state_or_the_reason(
    error: Exception | None, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def replace_drafter(_: Drafters, path: str) -> None:
        asked.append(path)
        if error is not None:
            raise error

    monkeypatch.setattr(Drafters, "replace", replace_drafter)
    reply = client(SPECULATING).post("/v1/auf/drafter", json={"path": "/models/another"})
    assert (reply.status_code, asked) == (status, ["/models/another"])
    assert reply.json() == (STARTED if error is None else {"detail": str(error)})


@pytest.mark.parametrize("body", [{}, {"path": ""}, {"path": 3}, {"path": "/a", "force": True}, []])
def test_a_swap_without_a_path_is_refused(body: Any) -> None:
    assert client(SPECULATING).post("/v1/auf/drafter", json=body).status_code == 422


def test_a_plain_server_has_no_drafter_to_swap() -> None:
    reply = client(PLAIN).post("/v1/auf/drafter", json={"path": "/models/another"})
    assert (reply.status_code, "--plain" in reply.text) == (404, True)


@pytest.mark.parametrize(("key", "status"), [("boss", 404), ("secret", 401), (None, 401)])
def test_a_swap_asks_for_the_admin_key_where_there_is_one(key: str | None, status: int) -> None:
    app = FastAPI()
    app.routes.extend(auf_router(PLAIN, lambda: None).routes)
    add_api_key_middleware(app, api_key="secret", admin_api_key="boss")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    assert TestClient(app).post("/v1/auf/drafter", json={"path": "/a"}, headers=headers).status_code == status


@pytest.fixture
def waiting() -> dict[str, SimpleNamespace]:
    """Requests that are not answered, by id, as SGLang keeps them."""
    return {}


@pytest.fixture
def reading(waiting: dict[str, SimpleNamespace], monkeypatch: pytest.MonkeyPatch) -> TestClient:
    async def get_loads(include: list[str]) -> list[SimpleNamespace]:
        assert include == ["core"]
        return [
            SimpleNamespace(num_running_reqs=3, num_waiting_reqs=1, timestamp=1500.0),
            SimpleNamespace(num_running_reqs=2, num_waiting_reqs=0, timestamp=1700.0),
        ]

    manager = SimpleNamespace(get_loads=get_loads, rid_to_state=waiting)
    monkeypatch.setattr(http_server, "get_global_state", lambda: SimpleNamespace(tokenizer_manager=manager))
    monkeypatch.setattr(metrics, "TOTALS", metrics.AcceptanceTotals())
    monkeypatch.setattr(routes, "time", SimpleNamespace(time=lambda: 2000.0, perf_counter=lambda: 50_000.0))
    app = FastAPI()
    reasons = itertools.cycle([None, "the server is stopping"])
    app.include_router(auf_router(PLAIN, lambda: next(reasons)))
    return TestClient(app)


def test_load_sums_the_schedulers_and_counts_tokens(reading: TestClient) -> None:
    first = reading.get("/v1/auf/load").json()
    assert (first["model"], first["running"], first["queued"], first["generated_tokens"]) == ("small", 5, 1, 0)
    metrics.TOTALS.generated += 7
    assert reading.get("/v1/auf/load").json()["generated_tokens"] == 7


def test_load_says_for_how_long_requests_have_waited_without_a_step(
    reading: TestClient, waiting: dict[str, SimpleNamespace]
) -> None:
    """Nobody waited while the server was idle, and of two schedulers the one that makes steps counts."""

    def silence() -> float:
        return float(reading.get("/v1/auf/load").json()["silence"])

    def received(seconds_ago: int) -> SimpleNamespace:
        return SimpleNamespace(time_stats=SimpleNamespace(created_time=50_000 - seconds_ago))

    assert silence() == 0
    waiting["a"] = received(100)
    assert silence() == 100
    waiting["b"] = received(1000)
    assert silence() == 300


@pytest.mark.anyio
async def test_metrics_say_the_same_silence(
    reading: TestClient, waiting: dict[str, SimpleNamespace], readers: list[Any]
) -> None:
    waiting["a"] = SimpleNamespace(time_stats=SimpleNamespace(created_time=49_900))
    (silence,) = readers
    assert await silence() == [Figure("auf_silence_seconds", 100, {"model_name": "small"})]


@pytest.mark.anyio
async def test_metrics_say_which_drafter_runs(tmp_path: Path, readers: list[Any]) -> None:
    checked = replace(CHECKED, path=write_drafter(tmp_path / "drafter"))
    drafters = Drafters(Speculation("owner/drafter", checked, 4, lambda _: checked, "cpu"))
    routes.add_readers("small", drafters, None)
    _, drafter = readers
    drafters._began += 60  # the files are older than the server
    labels = {"model_name": "small", "generation": "0", "weights": weights_sha256(checked.path)}
    assert await drafters.weights() == labels["weights"]
    assert await drafter() == [Figure("auf_drafter_info", 1, labels)]
    drafters.swap = replace(drafters.swap, generation=3)
    drafters.running = replace(drafters.running, weights="abc")
    assert await drafter() == [Figure("auf_drafter_info", 1, labels | {"generation": "3", "weights": "abc"})]


@pytest.mark.anyio
@pytest.mark.parametrize("digest", ["abc", None])
async def test_a_scrape_does_not_wait_for_the_digest(
    digest: str | None, readers: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are read once for all who ask, and a scrape leaves them out meanwhile."""
    read: list[Path] = []
    on_the_disk = threading.Event()

    def slow(path: Path, _: float) -> str | None:
        read.append(path)
        assert on_the_disk.wait(60)
        return digest

    monkeypatch.setattr("server.drafters._unchanged_sha256", slow)
    assert SPECULATING.speculation is not None
    drafters = Drafters(SPECULATING.speculation)
    routes.add_readers("small", drafters, None)
    _, drafter = readers
    try:
        assert [await drafter(), await drafter()] == [[], []]
        asked = asyncio.create_task(drafters.weights())
        await asyncio.sleep(0)
    finally:
        on_the_disk.set()
    assert await asked == digest
    labels = {"model_name": "small", "generation": "0", "weights": digest or ""}
    assert await drafter() == [Figure("auf_drafter_info", 1, labels)]
    assert read == [CHECKED.path]


@pytest.mark.anyio
async def test_metrics_say_that_a_recording_ended(tmp_path: Path, readers: list[Any]) -> None:
    recorder = Recorder.opened(RecordSettings(directory=str(tmp_path / "rows")), write_target(tmp_path / "target"))
    routes.add_readers("small", None, recorder)
    _, recording = readers

    async def figures() -> dict[tuple[str, str], float]:
        found = await recording()
        assert {figure.name for figure in found} <= READ.keys()
        return {(figure.name, figure.labels.get("reason", "")): figure.value for figure in found}

    before = await figures()
    assert before.keys() == {("auf_recording_error", ""), ("auf_recorded_total", "")} | {
        ("auf_record_dropped_total", reason) for reason in DROPPED
    }
    assert set(before.values()) == {0}
    recorder.drop("queue")
    recorder.fail()
    assert {key for key, value in (await figures()).items() if value == 1} == {
        ("auf_recording_error", ""),
        ("auf_record_dropped_total", "queue"),
    }


def test_load_says_why_there_are_no_answers(reading: TestClient) -> None:
    assert [reading.get("/v1/auf/load").json()["closed_because"] for _ in range(2)] == [None, "the server is stopping"]


def test_the_start_stays_the_same(reading: TestClient) -> None:
    assert len({reading.get("/v1/auf/load").json()["started"] for _ in range(2)}) == 1
