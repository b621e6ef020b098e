"""GET /v1/auf/load over a stand-in for SGLang's manager."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sglang.srt.entrypoints import http_server

from server.load import load_router
from sglang_auf.hooks import metrics


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> TestClient:
    async def get_loads(include: list[str]) -> list[SimpleNamespace]:
        assert include == ["core"]
        return [
            SimpleNamespace(num_running_reqs=3, num_waiting_reqs=1),
            SimpleNamespace(num_running_reqs=2, num_waiting_reqs=0),
        ]

    manager = SimpleNamespace(get_loads=get_loads)
    monkeypatch.setattr(http_server, "get_global_state", lambda: SimpleNamespace(tokenizer_manager=manager))
    monkeypatch.setattr(metrics, "TOTALS", metrics.AcceptanceTotals())
    app = FastAPI()
    reasons = iter([None, "the server is stopping"])
    app.include_router(load_router("small", lambda: next(reasons)))
    return TestClient(app)


def test_load_sums_the_schedulers_and_counts_tokens(reading: TestClient) -> None:
    first = reading.get("/v1/auf/load").json()
    assert (first["model"], first["running"], first["queued"], first["generated_tokens"]) == ("small", 5, 1, 0)
    metrics.TOTALS.generated += 7
    assert reading.get("/v1/auf/load").json()["generated_tokens"] == 7


def test_load_says_why_there_are_no_answers(reading: TestClient) -> None:
    assert [reading.get("/v1/auf/load").json()["closed_because"] for _ in range(2)] == [None, "the server is stopping"]


def test_the_start_stays_the_same(reading: TestClient) -> None:
    assert len({reading.get("/v1/auf/load").json()["started"] for _ in range(2)}) == 1
