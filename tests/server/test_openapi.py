"""Requests made from our routes' own OpenAPI schema, right and wrong ones: no server error, replies as described."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from sglang.srt.entrypoints import http_server
from sglang.srt.utils.auth import add_api_key_middleware

from server.middleware import add_all
from server.routes import auf_router
from tests.server.test_routes import SPECULATING

KEY = "the key"


async def loads(include: list[str]) -> list[Any]:
    return [SimpleNamespace(num_running_reqs=1, num_waiting_reqs=0, timestamp=0.0)]


def app() -> FastAPI:
    """Our routes behind what stands before them in a server with a key."""
    made = FastAPI()
    made.include_router(auf_router(SPECULATING, lambda: None))
    add_all(made, lambda: None, "token", management=True)  # or a closed route answers 404 to every method
    add_api_key_middleware(made, api_key=KEY, admin_api_key=None)
    return made


schema = schemathesis.openapi.from_dict(app().openapi())
schema.app = app()


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = SimpleNamespace(get_loads=loads, rid_to_state={})
    monkeypatch.setattr(http_server, "get_global_state", lambda: SimpleNamespace(tokenizer_manager=manager))


@schema.parametrize()
@settings(max_examples=100, deadline=None)
def test_any_request_of_the_schema(case: Any) -> None:
    # A schema cannot say in which directories a drafter lies: 400 is the right answer to a well-formed path.
    case.call_and_validate(headers={"Authorization": f"Bearer {KEY}"}, excluded_checks=[positive_data_acceptance])


@schema.parametrize()
@settings(max_examples=50, deadline=None)
def test_nothing_without_the_key(case: Any) -> None:
    case.headers = {name: value for name, value in (case.headers or {}).items() if name.lower() != "authorization"}
    expected = 405 if case.method == "OPTIONS" else 401  # SGLang lets a browser's preflight pass; no route has one
    assert case.call().status_code == expected
