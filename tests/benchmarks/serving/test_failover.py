"""What a reply counts for; servers behind a real router are tested in tests/e2e/test_operation.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.serving.failover import FailoverConfig, Load, _Clients

Start = Callable[..., Any]


def asked_twice(url: str, prompts: list[str]) -> tuple[Load, Load]:
    async def both() -> tuple[Load, Load]:
        clients, references = _Clients(url, "toy", FailoverConfig(retries=0)), dict[str, str]()
        return await clients.ask(prompts, references), await clients.ask(prompts, references)

    return asyncio.run(both())


def test_replies_are_counted_and_compared(fake: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = fake(wobbling="b")
    sglext = server.engine.sglext
    details = {"return_spec_tokens_details": True}  # an AUF server gives them unasked
    monkeypatch.setattr(server.engine, "sglext", lambda body, tokens: sglext(body | details, tokens))
    first, second = asked_twice(server.url, ["a", "b"])
    tokens = [server.engine.tokens([{"role": "user", "content": text}], 64) for text in "ab"]
    assert first.verify_steps == sum(len(server.engine.steps(one)) for one in tokens)
    assert first.emitted == sum(len(one) - 1 for one in tokens)
    assert (first.lost, first.wrong, second.lost, second.wrong) == (0, 0, 0, 1)


def test_a_reply_without_counts_is_a_fault(fake: Start) -> None:
    first, _ = asked_twice(fake().url, ["a", "b"])
    assert (first.lost, first.wrong, first.verify_steps) == (0, 2, 0)
    assert "without counts" in first.named[0]
