"""The client that benchmarks and training share: retries, connections, and SGLang's extension of a reply."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from openai.types.chat import ChatCompletion

from sglang_auf.training.generation import client
from sglang_auf.training.generation.client import (
    EXACT_IDS,
    TOKEN_IDS,
    UNSHAPED,
    AnswerError,
    SglExt,
    TargetClient,
    is_local,
    openai_client,
    template_fields,
)
from sglang_auf.training.generation.settings import RegenerateSettings
from sglang_auf.training.text.chats import Chat
from tests.support.http_servers import serving


@pytest.mark.parametrize("retries", [0, 2])
def test_each_request_and_each_retry_is_counted_and_carries_the_key(
    retries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    app, sent = FastAPI(), []
    app.get("/v1/models")(lambda: JSONResponse({"message": "busy"}, 503, {"retry-after-ms": "1"}))

    async def count(request: httpx.Request) -> None:
        sent.append(request.headers["authorization"])

    async def ask(url: str) -> None:
        async with openai_client(url, connections=1, timeout_s=9, retries=retries, on_request=count) as client:
            with pytest.raises(openai.InternalServerError):
                await client.models.list()

    with serving(app) as url:
        asyncio.run(ask(f"{url}/v1"))
    assert sent == ["Bearer sesame"] * (1 + retries)


def test_no_more_connections_are_open_than_asked_for() -> None:
    app, most, open_now = FastAPI(), 0, 0

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        nonlocal most, open_now
        open_now += 1
        most = max(most, open_now)
        await asyncio.sleep(0.05)
        open_now -= 1
        return {"object": "list", "data": []}

    async def ask(url: str) -> None:
        async with openai_client(url, connections=2, timeout_s=9, retries=0) as client:
            await asyncio.gather(*(client.models.list() for _ in range(6)))

    with serving(app) as url:
        asyncio.run(ask(f"{url}/v1"))
    assert most == 2


@pytest.mark.parametrize(("idle_s", "connections"), [(60.0, 1), (0.2, 2)])
def test_a_connection_that_was_idle_for_long_is_not_used_again(
    idle_s: float, connections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server may be about to close it: SGLang does after 5 s."""
    assert client.IDLE_S < 5
    monkeypatch.setattr(client, "IDLE_S", idle_s)
    app, seen = FastAPI(), set()

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        seen.add(request.client)
        return {"object": "list", "data": []}

    async def ask(url: str) -> None:
        async with openai_client(url, connections=1, timeout_s=9, retries=0) as asking:
            await asking.models.list()
            await asyncio.sleep(0.4)
            await asking.models.list()

    with serving(app) as url:
        asyncio.run(ask(f"{url}/v1"))
    assert len(seen) == connections


@pytest.mark.parametrize(
    ("url", "local"),
    [
        *((f"http://{host}:30000/v1", True) for host in ("localhost", "127.0.0.1", "127.8.9.1", "[::1]", "0.0.0.0")),
        *((f"http://{host}:30000/v1", False) for host in ("gpu-1", "10.0.0.7", "localhost.example.com", "[fe80::1]")),
        ("nonsense", False),
    ],
)
def test_which_servers_are_on_this_machine(url: str, local: bool) -> None:
    assert is_local(url) is local


def test_a_proxy_does_not_carry_what_is_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    app, proxied = FastAPI(), FastAPI()
    app.get("/v1/models")(lambda: {"object": "list", "data": []})

    async def ask(url: str) -> None:
        async with openai_client(url, connections=1, timeout_s=9, retries=0) as client:
            await client.models.list()

    with serving(app) as url, serving(proxied) as proxy:
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        for name in ("http_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy)
        asyncio.run(ask(f"{url}/v1"))
        with pytest.raises(openai.NotFoundError):  # the proxy's answer
            asyncio.run(ask("http://elsewhere.invalid/v1"))


def reply(**extra: Any) -> ChatCompletion:
    return ChatCompletion.model_validate(
        {"id": "", "choices": [], "created": 0, "model": "", "object": "chat.completion"} | extra
    )


def test_extension_of_a_reply() -> None:
    details = {"verify_steps": 1}
    found = SglExt.of(reply(sglext={"output_ids": [[1, 2]], "spec_tokens_details": details, "routed_experts": "x"}))
    assert found == SglExt(output_ids=[[1, 2]], spec_tokens_details=details)
    assert SglExt.of(reply()) == SglExt.of(reply(sglext=None)) == SglExt()


@pytest.mark.parametrize("sglext", [{"output_ids": [1]}, {"input_ids": "ab"}, "ab"])
def test_extension_that_cannot_be_read(sglext: object) -> None:
    with pytest.raises(ValueError, match="sglext of the reply cannot be read"):
        SglExt.of(reply(sglext=sglext))


@pytest.mark.parametrize(
    ("name", "reply", "choice"),
    [("prompt_token_ids", {"prompt_token_ids": "ab"}, {}), ("token_ids", {}, {"token_ids": [1.5]})],
)
def test_token_ids_that_cannot_be_read(name: str, reply: dict[str, Any], choice: dict[str, Any]) -> None:
    answer = {"index": 0, "message": {"role": "assistant", "content": "Hi."}, "finish_reason": "stop", **choice}
    whole = {"id": "", "created": 0, "model": "", "object": "chat.completion", "choices": [answer], **reply}
    app = FastAPI()
    app.post("/v1/chat/completions")(lambda: whole)

    async def ask(url: str) -> None:
        settings = RegenerateSettings(base_url=url, out=Path("unused"), inputs=("unused",))
        async with TargetClient(settings) as client:
            await client.answer("toy", Chat([{"role": "user", "content": "Say hi."}]), seed=0)

    with serving(app) as url, pytest.raises(AnswerError, match=f"{name} of the reply cannot be read"):
        asyncio.run(ask(url))


def test_sglang_takes_every_field_that_it_is_sent() -> None:
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

    sent = {**EXACT_IDS, **TOKEN_IDS, **UNSHAPED}
    asked = ChatCompletionRequest.model_validate({"model": "", "messages": [], **sent})
    assert asked.model_dump(include=set(sent)) == sent


def test_thinking_is_sent_unless_the_server_decides() -> None:
    assert template_fields("on") == {"chat_template_kwargs": {"enable_thinking": True}}
    assert template_fields("off") == {"chat_template_kwargs": {"enable_thinking": False}}
    assert template_fields("server") == {}
