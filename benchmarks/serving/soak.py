"""Put a server under mixed load for minutes. No answer may be wrong, no server error may occur, nothing may leak.

A plain server answers the questions first. Then clients send the AUF server every kind of request (soak_requests.py),
good and bad, finished and abandoned, while memory, open files and KV slots of the server are sampled. With --record and
--swap it keeps its answers meanwhile, and its drafter is changed under load.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import openai
import psutil
from pydantic import Field, ValidationInfo, field_validator

from benchmarks.harness.config import ServedProfile
from benchmarks.harness.results import Measured, Report, StrictModel
from benchmarks.harness.server_info import call, flush_cache, server_facts
from benchmarks.harness.servers import Server, family, serve
from benchmarks.reports.markdown import markdown_document, markdown_table
from benchmarks.reports.numbers import number
from benchmarks.serving.soak_requests import BROKEN, KINDS, Question, Sender, Wrong, questions
from sglang_auf.errors import ServerError

NAMED = 20
IDLE_S = 120.0
GROWTH = 0.05
"""Share by which resident memory may grow, see `SoakReport.growth`."""


class SoakConfig(ServedProfile):
    """Mixed load on a server for minutes, checked against plain decoding; memory, files and KV slots are watched."""

    profile: str = Field("smollm2-135m", description="server profile, as for python -m server --profile")
    settings: tuple[str, ...] = Field(
        ("server_args.max_running_requests=8", "server_args.max_total_tokens=1024", "server_args.context_length=1024"),
        alias="set",
        description="key=value for both servers; may be repeated. A small pool has requests wait and be retracted",
    )
    minutes: float = Field(30.0, gt=0, description="how long the load lasts")
    clients: int = Field(12, ge=1, description="requests in flight")
    questions: int = Field(24, ge=1, description="different prompts; plain decoding answers each three times first")
    seed: int = Field(0, ge=0, description="of what is drawn: kinds of request and prompts")
    sample_s: float = Field(
        5.0, gt=0, validate_default=True, description="seconds between looks at the server, a tenth of the time at most"
    )
    timeout_s: float = Field(600.0, gt=0, description="seconds one request may take")
    record: bool = Field(False, description="the server records its answers, in OUT/recording, which is replaced")
    swaps: tuple[Path, ...] = Field(
        (),
        alias="swap",
        description="drafter to swap in under load, at even distances in time; may be repeated, also with the same one",
    )
    out: Path = Field(Path("runs/soak"), description="directory of soak.json, soak.md and the servers' logs")

    @field_validator("swaps")
    @classmethod
    def _are_there(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        """Said at once, and not by the server after minutes of load."""
        if missing := [str(drafter) for drafter in value if not drafter.is_dir()]:
            raise ValueError(f"no directory: {', '.join(missing)}")
        return value

    @field_validator("sample_s")
    @classmethod
    def _often_enough(cls, value: float, info: ValidationInfo) -> float:
        """Growth needs samples in the parts of the time that it compares."""
        if value > info.data.get("minutes", value) * 6:
            raise ValueError("must be a tenth of the time that the load lasts at most")
        return value


class Sample(StrictModel):
    """The server at one time. seconds: since the load began. memory_mib: resident, of all its processes.

    kv_tokens: KV slots in use. running, waiting: requests.
    """

    seconds: float
    memory_mib: float
    files: int
    kv_tokens: int
    running: int
    waiting: int


class Swapped(StrictModel):
    """A swap under load. seconds: since the load began. took: until the server's reply. generation: of that reply."""

    seconds: float
    took: float
    generation: int


class SoakReport(Measured, Report):
    """soak.json. asked: requests by kind. faults: how many of each kind. named: the first faults, in words.

    swapped: the swaps that were not refused. recording: what the server says of its recording at the end; None where
    nothing was recorded.
    """

    STEM: ClassVar[str] = "soak"

    config: SoakConfig
    asked: dict[str, int]
    faults: dict[str, int]
    named: list[str]
    acceptance: dict[str, Any]
    before: Sample
    after: Sample
    samples: list[Sample]
    swapped: tuple[Swapped, ...] = ()
    recording: dict[str, Any] | None = None

    @property
    def growth(self) -> float:
        """Growth of median memory from 20 to 40 % of the time to the last fifth, as a share. Pools fill before that."""
        end = self.samples[-1].seconds
        early = [sample.memory_mib for sample in self.samples if 0.2 * end <= sample.seconds <= 0.4 * end]
        late = [sample.memory_mib for sample in self.samples if sample.seconds >= 0.8 * end]
        return median(late) / median(early) - 1

    @property
    def leaks(self) -> list[str]:
        found = []
        if self.after.kv_tokens != self.before.kv_tokens:
            found.append(f"{self.after.kv_tokens} KV slots in use when idle, {self.before.kv_tokens} before")
        if self.growth > GROWTH:
            found.append(f"memory grew by {self.growth:.1%}")
        if self.after.files > self.before.files:
            found.append(f"{self.after.files} files open when idle, {self.before.files} before")
        return found

    @property
    def passed(self) -> bool:
        return not self.faults and not self.leaks

    def markdown(self) -> str:
        config, total = self.config, self.acceptance["total"]
        rows = [["", "idle before", "idle after", "under load, at most"]]
        for name, unit, what in (
            ("memory_mib", "MiB", "resident memory"),
            ("files", "", "open files"),
            ("kv_tokens", "", "KV slots in use"),
            ("running", "", "running requests"),
            ("waiting", "", "waiting requests"),
        ):
            most = max(getattr(sample, name) for sample in self.samples)
            figures = [getattr(self.before, name), getattr(self.after, name), most]
            rows.append([what, *(f"{figure:.0f} {unit}".strip() for figure in figures)])
        asked = (
            f"{config.profile_text}, {config.minutes:g} minutes, {config.clients} clients: {sum(self.asked.values())} "
            f"requests ({', '.join(f'{count} {kind}' for kind, count in sorted(self.asked.items()))})"
        )
        faults = ", ".join(f"{count} {what}" for what, count in self.faults.items())
        notes = [
            f"Soak {'passed' if self.passed else 'FAILED'}: {faults or 'no wrong answer, no server error'}; "
            f"{'; '.join(self.leaks) or 'nothing leaked'}.",
            f"Memory in the last fifth of the time against 20 to 40 % of it: {self.growth:+.1%}. Tau of "
            f"{total['requests']} answers with a verify step: {number(total['tau'])}.",
            *(f"- {fault}" for fault in self.named),
        ]
        if self.swapped:
            swaps = (f"{one.took:.2f} s at {one.seconds:.0f} s" for one in self.swapped)
            notes.insert(2, f"Drafter swapped {len(self.swapped)} times: {', '.join(swaps)}.")
        if self.recording is not None:
            notes.insert(2, "Recorded: " + ", ".join(f"{name} {value}" for name, value in self.recording.items()) + ".")
        return markdown_document(self, asked, markdown_table(rows), "\n".join(notes))


@dataclass(slots=True)
class Tally:
    """What happened so far. faults: how many of each kind. named: the first faults, in words."""

    asked: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)

    def fault(self, what: str, kind: str, error: Exception) -> None:
        self.faults[what] += 1
        if len(self.named) < NAMED:
            self.named.append(f"{what}, {kind}: {error!r}"[:600])


def measure_soak(config: SoakConfig) -> SoakReport:
    """Raises ServerError where a server does not start or ends by itself."""
    config.out.mkdir(parents=True, exist_ok=True)
    with serve(config.profile, plain=True, settings=config.settings, log_file=config.out / "plain.log") as plain:
        known = asyncio.run(_references(plain.base_url, config))
    log_file = config.out / "server.log"
    settings = list(config.settings)
    if config.swaps:
        settings.append("management=true")
    if config.record:
        directory = config.out / "recording"
        if directory.exists():
            shutil.rmtree(directory)
        settings.append(f"record.directory={directory.resolve()}")
    with serve(config.profile, plain=False, settings=settings, log_file=log_file) as server:
        return asyncio.run(_soak(server, known, config))


async def _references(base_url: str, config: SoakConfig) -> list[Question]:
    sender = Sender(base_url, server_facts(base_url).model, config.timeout_s)
    found = await asyncio.gather(*map(sender.reference, questions(config.questions)))
    await sender.client.close()
    return found


async def _soak(server: Server, known: list[Question], config: SoakConfig) -> SoakReport:
    sender = Sender(server.base_url, server_facts(server.base_url).model, config.timeout_s, recorded=config.record)
    tally, samples = Tally(), []
    draws = random.Random(config.seed)
    for kind in KINDS:  # warm up, so that what is loaded or opened on first use does not count as a leak
        await _send(kind, sender, draws.choice(known), Tally())
    before = await _idle(server)
    began = time.monotonic()
    clients = [asyncio.create_task(_client(sender, known, draws, tally, began, config)) for _ in range(config.clients)]
    swapping = asyncio.create_task(_swap_in_turn(server, tally, began, config))
    while time.monotonic() - began < config.minutes * 60:
        await asyncio.sleep(config.sample_s)
        samples.append(await asyncio.to_thread(_sample, server, began))
    await asyncio.gather(*clients)
    swapped = await swapping
    await sender.client.close()
    after = await _idle(server)
    return SoakReport(
        config=config,
        asked=dict(tally.asked),
        faults=dict(tally.faults),
        named=tally.named,
        acceptance=await asyncio.to_thread(call, server.base_url, "/v1/auf/acceptance"),
        before=before,
        after=after,
        samples=samples,
        swapped=tuple(swapped),
        recording=(await asyncio.to_thread(call, server.base_url, "/v1/auf/recording"))["recording"],
    )


async def _swap_in_turn(server: Server, tally: Tally, began: float, config: SoakConfig) -> list[Swapped]:
    """A swap that the server refuses is a fault."""
    done: list[Swapped] = []
    for place, drafter in enumerate(config.swaps, start=1):
        at = config.minutes * 60 * place / (len(config.swaps) + 1)
        await asyncio.sleep(max(0.0, began + at - time.monotonic()))
        asked = time.monotonic()
        try:
            reply = await asyncio.to_thread(
                call, server.base_url, "/v1/auf/drafter", {"path": str(drafter.resolve())}, config.timeout_s
            )
        except ServerError as error:
            tally.fault("swaps refused", str(drafter), error)
            continue
        done.append(Swapped(seconds=asked - began, took=time.monotonic() - asked, generation=reply["generation"]))
    return done


async def _client(
    sender: Sender, known: list[Question], draws: random.Random, tally: Tally, began: float, config: SoakConfig
) -> None:
    """One client: sends a request when the one before it has ended."""
    while time.monotonic() - began < config.minutes * 60:
        [kind] = draws.choices(list(KINDS), list(KINDS.values()))
        await _send(kind, sender, draws.choice(known), tally)


async def _send(kind: Any, sender: Sender, question: Question, tally: Tally) -> None:
    tally.asked[kind.__name__] += 1
    try:
        await kind(sender, question)
    except Wrong as error:
        tally.fault("wrong answers", kind.__name__, error)
    except openai.APIStatusError as error:
        tally.fault("server errors" if error.status_code >= 500 else "refusals", kind.__name__, error)
    except BROKEN as error:
        tally.fault("broken connections", kind.__name__, error)


async def _idle(server: Server) -> Sample:
    """A sample of the server without requests and cached prefixes. Raises ServerError where requests never end."""
    deadline = time.monotonic() + IDLE_S
    while True:
        sample = await asyncio.to_thread(_sample, server, time.monotonic())
        if sample.running == sample.waiting == 0:
            await asyncio.to_thread(flush_cache, server.base_url)
            return await asyncio.to_thread(_sample, server, time.monotonic())
        if time.monotonic() > deadline:
            raise ServerError(
                f"{sample.running} requests running and {sample.waiting} waiting {IDLE_S:.0f} s after the last client",
                "none: every client has its answer or has left",
                "look into the server's log",
            )
        await asyncio.sleep(1)


def _sample(server: Server, began: float) -> Sample:
    [load] = call(server.base_url, "/v1/loads")["loads"]
    memory, files = 0, 0
    for process in family(server.process):
        try:
            memory += process.memory_info().rss
            files += process.num_fds()
        except psutil.NoSuchProcess:
            continue
    return Sample(
        seconds=time.monotonic() - began,
        memory_mib=memory / 2**20,
        files=files,
        kv_tokens=load["num_used_tokens"],
        running=load["num_running_reqs"],
        waiting=load["num_waiting_reqs"],
    )
