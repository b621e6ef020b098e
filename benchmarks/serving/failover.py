"""Put two servers behind SGLang's router and kill one under load. Clients that retry must lose no request.

All questions are asked with both servers up first. The verify steps that the replies report must add up to the totals
of the two servers. Then they are asked again, and meanwhile one server and all its processes are killed with SIGKILL.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import httpx
import openai
from pydantic import Field

from benchmarks.harness.client import ReplyError, histogram_of, record_header
from benchmarks.harness.config import ServedProfile
from benchmarks.harness.results import Measured, Report, StrictModel
from benchmarks.harness.server_info import call, server_facts
from benchmarks.harness.servers import Server, launch, serve
from benchmarks.harness.template_prompts import demo_prompts
from benchmarks.reports.markdown import markdown_document, markdown_table
from sglang_auf.acceptance import Acceptance
from sglang_auf.errors import ConfigError, ServerError
from sglang_auf.training.generation.client import SglExt, openai_client

ROUTER = "sglang_router"
COUNTED = ("verify_steps", "emitted")


class FailoverConfig(ServedProfile):
    """Two servers behind SGLang's router; one is killed under load, and clients that retry must lose nothing."""

    profile: str = Field("smollm2-135m", description="server profile, as for python -m server --profile")
    settings: tuple[str, ...] = Field(
        ("server_args.max_total_tokens=4096", "server_args.context_length=2048"),
        alias="set",
        description="key=value for both servers; may be repeated",
    )
    requests: int = Field(48, ge=6, description="different prompts, asked with both servers up, and during the kill")
    clients: int = Field(6, ge=1, description="requests in flight")
    max_tokens: int = Field(64, ge=2, description="new tokens of one answer")
    retries: int = Field(8, ge=0, description="of one request, by the openai client, with its pauses")
    timeout_s: float = Field(300.0, gt=0, description="seconds one request may take")
    out: Path = Field(Path("runs/failover"), description="directory of failover.json, failover.md and the logs")


class Load(StrictModel):
    """Results of the requests of one part. sent: HTTP requests, retries included.

    wrong: another answer than before, or one without the counts of its verify steps.
    """

    asked: int
    sent: int
    lost: int
    wrong: int
    verify_steps: int
    emitted: int
    named: list[str]

    @property
    def retried(self) -> int:
        return self.sent - self.asked


class FailoverReport(Measured, Report):
    """failover.json. totals: the counts in COUNTED of the two servers after the first part."""

    STEM: ClassVar[str] = "failover"

    config: FailoverConfig
    both: Load
    totals: list[dict[str, int]]
    killed: Load
    answered_before: int

    @property
    def adds_up(self) -> bool:
        return all(sum(server[name] for server in self.totals) == getattr(self.both, name) for name in COUNTED)

    @property
    def passed(self) -> bool:
        faults = [load.lost + load.wrong for load in (self.both, self.killed)]
        return not any(faults) and self.adds_up and all(server["verify_steps"] for server in self.totals)

    def markdown(self) -> str:
        config = self.config
        rows = [["", "requests", "sent", "retried", "lost", "wrong", "verify steps", "emitted tokens"]]
        for name, load in (("both servers up", self.both), ("one killed", self.killed)):
            figures = [load.asked, load.sent, load.retried, load.lost, load.wrong, load.verify_steps, load.emitted]
            rows.append([name, *map(str, figures)])
        asked = (
            f"{config.profile_text}, two servers behind sglang-router, {config.clients} clients, {config.max_tokens} "
            f"tokens an answer, the openai client with {config.retries} retries; one server killed after "
            f"{self.answered_before} of {self.killed.asked} answers"
        )
        shares = " and ".join(f"{server['verify_steps']} verify steps" for server in self.totals)
        notes = [
            f"Failover {'passed' if self.passed else 'FAILED'}. The servers' totals in the first part, {shares}, "
            f"{'add up to' if self.adds_up else 'DO NOT ADD UP TO'} what the replies say.",
            *(f"- {what}" for what in self.both.named + self.killed.named),
        ]
        return markdown_document(self, asked, markdown_table(rows), "\n".join(notes))


def measure_failover(config: FailoverConfig) -> FailoverReport:
    """Raises ConfigError without the router's package, ServerError where a server or the router does not start."""
    if importlib.util.find_spec(ROUTER) is None:
        raise ConfigError("no package sglang-router", "SGLang's router", "pip install -c constraints.txt sglang-router")
    config.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as running:
        servers = [
            running.enter_context(
                serve(config.profile, plain=False, settings=config.settings, log_file=config.out / f"server-{name}.log")
            )
            for name in "ab"
        ]
        urls = [server.base_url for server in servers]
        # Round robin gives both work. The client retries, not the router: an answer that broke off is asked again
        # from its beginning either way, and the client counts how often.
        options = ["--policy", "round_robin", "--disable-retries", "--health-check-interval-secs", "2"]
        program = ["-m", f"{ROUTER}.launch_router", "--worker-urls", *urls, *options]
        router = running.enter_context(launch(program, log_file=config.out / "router.log"))
        return asyncio.run(_measure(config, servers, router))


async def _measure(config: FailoverConfig, servers: Sequence[Server], router: Server) -> FailoverReport:
    prompts = [str(row["turns"][0]) for row in demo_prompts(config.requests)]  # type: ignore[index]
    model = server_facts(servers[0].base_url).model
    references: dict[str, str] = {}
    before = [_totals(server) for server in servers]
    clients = _Clients(router.base_url, model, config)
    both = await clients.ask(prompts, references)
    totals = [
        {name: after[name] - first[name] for name in COUNTED}
        for after, first in zip(map(_totals, servers), before, strict=True)
    ]
    kill_after = config.requests // 3

    async def kill() -> int:
        while clients.answered < kill_after:
            await asyncio.sleep(0.05)
        answered = clients.answered
        servers[0].kill()
        return answered

    killing = asyncio.create_task(kill())
    killed = await clients.ask(prompts, references)
    if not killing.done():  # the load ended before kill_after answers came
        killing.cancel()
        raise ServerError(
            f"{killed.lost} of {killed.asked} requests lost with both servers up: {'; '.join(killed.named[:1])}",
            f"{kill_after} answers before a server is killed",
            f"look at the logs in {config.out}",
        )
    answered = killing.result()
    return FailoverReport(config=config, both=both, totals=totals, killed=killed, answered_before=answered)


def _totals(server: Server) -> dict[str, int]:
    total = call(server.base_url, "/v1/auf/acceptance")["total"]
    return {name: total[name] for name in COUNTED}


class _Clients:
    """Several clients of one URL. They ask again when a server breaks off or is down."""

    def __init__(self, base_url: str, model: str, config: FailoverConfig) -> None:
        self.base_url, self.model, self.config = base_url, model, config
        self.answered = 0
        self._sent = 0

    async def ask(self, prompts: Sequence[str], references: dict[str, str]) -> Load:
        """Ask all prompts once. references: prompt -> greedy answer; the first call fills it, later calls compare."""
        self.answered = self._sent = 0
        free = asyncio.Semaphore(self.config.clients)
        async with openai_client(
            f"{self.base_url}/v1",
            connections=self.config.clients,
            timeout_s=self.config.timeout_s,
            retries=self.config.retries,
            on_request=self._count,
        ) as client:
            replies = await asyncio.gather(*(self._one(client, free, prompt) for prompt in prompts))
        load = Load(asked=len(prompts), sent=self._sent, lost=0, wrong=0, verify_steps=0, emitted=0, named=[])
        for prompt, reply in zip(prompts, replies, strict=True):
            if isinstance(reply, Exception):
                load.lost += 1
                load.named.append(repr(reply)[:300])
                continue
            text = reply.choices[0].message.content
            faults = [] if references.setdefault(prompt, text) == text else [f"{text!r} for {references[prompt]!r}"]
            try:
                of_reply = Acceptance.of_request(
                    histogram_of(SglExt.of(reply).spec_tokens_details or {}), reply.usage.completion_tokens
                )
            except (ReplyError, ValueError) as error:
                faults.append(f"a reply without counts: {error}")
            else:
                load.verify_steps += of_reply.verify_steps
                load.emitted += of_reply.emitted
            load.wrong += bool(faults)
            load.named += faults
        return load

    async def _count(self, request: httpx.Request) -> None:
        self._sent += 1

    async def _one(self, client: openai.AsyncOpenAI, free: asyncio.Semaphore, prompt: str) -> Any:
        async with free:
            try:
                reply = await client.chat.completions.create(
                    model=self.model,
                    messages=[{"role": "user", "content": prompt}],
                    max_tokens=self.config.max_tokens,
                    temperature=0,
                    extra_headers=record_header(False),
                    extra_body={"ignore_eos": True},
                )
            except openai.APIError as error:
                return error
        self.answered += 1
        return reply
