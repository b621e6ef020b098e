"""What SGLang's own routes say of a server, asked without a detour."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.harness.server_info import flush_cache, server_facts
from sglang_auf.errors import ServerError


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy for everything, which is down."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


@pytest.mark.usefixtures("proxy")
def test_a_proxy_does_not_carry_what_is_for_this_machine(fake: Callable[..., Any]) -> None:
    url = fake().url
    assert server_facts(url).device == "cpu"
    flush_cache(url)
    with pytest.raises(ServerError, match="ConnectError"):
        server_facts("http://elsewhere.invalid")
