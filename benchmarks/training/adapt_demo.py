"""A drafter learns from its own traffic in one call: recorded, adapted, swapped in without a stop, measured again.

One server runs all the time. It records the traffic of a kind that its drafter was not trained for, and nothing else
(`record.opt_in`): the measured prompts and the answers of the old kinds do not ask for it. Everything runs through a
user's commands and routes: `python -m server`, `sglang-auf regenerate` and `adapt`, `POST /v1/auf/drafter`.
"""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from benchmarks.harness.client import FAILURES, ChatClient, Reply
from benchmarks.harness.commands import sglang_auf
from benchmarks.harness.config import RunConfig, ServedProfile, Workload
from benchmarks.harness.records import Record
from benchmarks.harness.results import Measured, Report
from benchmarks.harness.run import ask, chosen_prompts, describe
from benchmarks.harness.server_info import call, server_facts
from benchmarks.harness.servers import Server, serve
from benchmarks.harness.sources.prompt import messages_of
from benchmarks.harness.tasks import first_turns, in_turn
from benchmarks.harness.template_prompts import demo_prompts
from benchmarks.reports.markdown import markdown_document, markdown_table
from benchmarks.stats.lossless import same_answer
from benchmarks.training.before_after import HEADING, BeforeAfter
from benchmarks.training.given_texts import HELD_OUT, given_text_prompts, openings, whole_sentences
from sglang_auf.errors import ServerError

NOT_BETTER = 3
"""Exit code of `sglang-auf adapt` where it exports nothing."""
SPARE = 1.4
"""Openings for each text that is wanted: the target does not make a text of every one."""
TEXT_TOKENS, TEXT_TEMPERATURE = 110, 0.8
WRITTEN_S = 60.0
NEW, OLD = "given texts", "old kinds"


class AdaptDemoConfig(ServedProfile):
    """A server's traffic is recorded, its drafter learns from it and is swapped in; tau and speed before and after."""

    profile: str = Field("smollm2-135m", description="server profile, of a server on the CPU platform")
    prompts: int = Field(500, ge=40, description="requests of the new kind that are sent and recorded")
    old_prompts: int = Field(
        200, ge=10, description="prompts of the old kinds, made from templates, whose answers are trained on as well"
    )
    max_tokens: int = Field(128, ge=8, description="new tokens of one answer at most")
    concurrency: int = Field(16, ge=1, description="requests of the traffic in flight; measured prompts come singly")
    minutes: float = Field(4.0, gt=0, description="time for training steps")
    limit: int | None = Field(None, ge=3, description="measured prompts of each task at most (default: all 48)")
    out: Path = Field(Path("runs/adapt-demo"), description="result directory; those of an earlier demo are replaced")


class AdaptDemo(Measured, Report):
    """adapt-demo.json. kinds: the new one first. identical: answers with the same tokens before and after, of compared.

    verdict: what `sglang-auf adapt` says. swap: what the server says of the swap at the end; None where adapt has not
    exported. recorded: rows. seconds: by part.
    """

    STEM: ClassVar[str] = "adapt-demo"

    config: AdaptDemoConfig
    target: str
    recorded: int
    traffic_tokens: int
    traffic_tokens_per_s: float
    verdict: list[str]
    swap: dict[str, Any] | None
    kinds: list[BeforeAfter]
    failed: int
    identical: int
    compared: int
    seconds: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether a better drafter was found, is kept, has the old one's answers and a higher tau on the new kind."""
        kept = self.swap is not None and self.swap["state"] != "taken back"
        same = not self.failed and self.compared > 0 and self.identical == self.compared
        return kept and same and (self.kinds[0].gain or 0.0) > 0

    def markdown(self) -> str:
        config = self.config
        asked = (
            f"{self.target}, greedy, measured at concurrency 1, at most {config.max_tokens} tokens an answer. Traffic: "
            f"{config.prompts} requests on other texts, {config.concurrency} in flight, {self.traffic_tokens:,} tokens "
            f"at {self.traffic_tokens_per_s:.0f} tokens/s, {self.recorded} rows recorded. {config.minutes:g} minutes "
            "of steps."
        )
        if self.swap is None:
            ends = "Not exported: the old drafter goes on, and nothing was swapped."
        else:
            ends = (
                f"Exported and swapped in; at the end its state is: {self.swap['state']} ({self.swap['watched']} of "
                f"{self.swap['watches']} requests watched). Identical answers before and after: {self.identical} of "
                f"{self.compared}."
            )
        if self.failed:
            ends += f" {self.failed} requests FAILED."
        return markdown_document(
            self,
            asked,
            markdown_table([HEADING, *(kind.row() for kind in self.kinds)]),
            "`sglang-auf adapt` says:\n\n" + "\n".join(f"- {line}" for line in self.verdict),
            ends,
            "Intervals: 95 %, by bootstrap over prompts. Before and after are minutes apart, and the intervals do not "
            "cover a machine that is slower or quicker by then.",
            "Seconds: " + ", ".join(f"{part} {seconds:.0f}" for part, seconds in self.seconds.items()) + ".",
        )


def adapt_demo(config: AdaptDemoConfig) -> AdaptDemo:
    """Raises ServerError where a request of the traffic fails, TrainingError where adapt does."""
    out = config.out.resolve()
    for part in ("recording", "drafter", "drafter.run", "before", "after"):
        shutil.rmtree(out / part, ignore_errors=True)
    (out / "old-answers.jsonl").unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    settings = [f"record.directory={out / 'recording'}", "record.opt_in=true", "management=true"]
    began = time.monotonic()
    with serve(config.profile, plain=False, settings=settings, log_file=out / "server.log") as server:
        demo = _Demo(config, out, server, {"start": time.monotonic() - began})
        return demo.run()


@dataclass(slots=True)
class _Demo:
    """One demonstration, with its server up."""

    config: AdaptDemoConfig
    out: Path
    server: Server
    seconds: dict[str, float]
    model: str = field(init=False)

    def __post_init__(self) -> None:
        self.model = server_facts(self.server.base_url).model

    def run(self) -> AdaptDemo:
        with self._timed("measure before"):
            before = self._measured("before")
        with self._timed("texts"):
            prompts = self._prompts()
        with self._timed("answers of old kinds"):
            self._answer_old_kinds()
        with self._timed("traffic"):
            replies = self._send([{"asked": messages_of(prompt), "recorded": True} for prompt in prompts])
        recorded = self._recorded()
        with self._timed("adapt"):
            better = self._adapt()
        after: list[Record] = []
        if better:
            with self._timed("swap"):
                call(self.server.base_url, "/v1/auf/drafter", {"path": str(self.out / "drafter")})
            with self._timed("measure after"):
                after = self._measured("after")
        tokens = sum(reply.completion_tokens for reply in replies)
        pairs = _pairs(before, after)
        return AdaptDemo(
            config=self.config,
            target=self.model,
            recorded=recorded,
            traffic_tokens=tokens,
            traffic_tokens_per_s=tokens / self.seconds["traffic"],
            verdict=(self.out / "adapt.txt").read_text(encoding="utf-8").splitlines(),
            swap=self._swap() if better else None,
            kinds=[BeforeAfter.of(name, _of_kind(name, before), _of_kind(name, after)) for name in (NEW, OLD)],
            failed=sum(record.failed for record in before + after),
            identical=sum(same_answer(mine, its) for mine, its in pairs),
            compared=len(pairs),
            seconds=self.seconds,
        )

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[part] = time.monotonic() - began

    def _measured(self, name: str) -> list[Record]:
        """The held-out prompts of the new kind and the sample tasks, in turn, one at a time."""
        config = RunConfig.model_validate(
            {
                "base_url": self.server.base_url,
                "prompts": (HELD_OUT,),
                "tasks": ("sample",),
                "limit": self.config.limit,
                "max_tokens": self.config.max_tokens,
                "stream": False,
                "empty_cache": True,
                "out": self.out / name,
            }
        )
        selections = first_turns(chosen_prompts(config))
        return list(ask(config, selections, name, prompts=in_turn(selections)).records.values())

    def _prompts(self) -> list[str]:
        """The traffic, on texts that the target writes. Raises ServerError where it writes too few."""
        wanted = math.ceil(self.config.prompts / len(given_text_prompts([""])))
        begun = openings(math.ceil(SPARE * wanted))
        sampled = {"max_tokens": TEXT_TOKENS, "temperature": TEXT_TEMPERATURE}
        replies = self._send([{"asked": first, "seed": seed, **sampled} for seed, first in enumerate(begun)])
        written = [whole_sentences(first + reply.text) for first, reply in zip(begun, replies, strict=True)]
        texts = list(dict.fromkeys(filter(None, written)))
        if len(texts) < wanted:
            raise ServerError(
                f"{len(texts)} texts of whole sentences in {len(begun)} that {self.model} wrote",
                f"{wanted}, for {self.config.prompts} requests",
                "give fewer --prompts, or a profile whose target writes",
            )
        prompts = given_text_prompts(texts[:wanted])[: self.config.prompts]
        rows = [json.dumps({"turns": [prompt]}, ensure_ascii=False) + "\n" for prompt in prompts]
        (self.out / "traffic.jsonl").write_text("".join(rows), encoding="utf-8")
        return prompts

    def _answer_old_kinds(self) -> None:
        prompts = self.out / "old-prompts.jsonl"
        rows = [json.dumps(row) + "\n" for row in demo_prompts(self.config.old_prompts)]
        prompts.write_text("".join(rows), encoding="utf-8")
        sglang_auf(
            [
                *("regenerate", str(prompts), "--base-url", f"{self.server.base_url}/v1"),
                *("--out", str(self.out / "old-answers.jsonl"), "--max-tokens", str(self.config.max_tokens)),
                *("--concurrency", str(self.config.concurrency)),
            ]
        )

    def _send(self, requests: Sequence[dict[str, Any]]) -> list[Reply]:
        """Answers in the order of the requests (arguments of ChatClient.ask). Raises ServerError where one fails."""

        async def answers() -> list[Reply]:
            workload = Workload.model_validate(
                {"max_tokens": self.config.max_tokens, "concurrency": self.config.concurrency}
            )
            async with ChatClient(self.server.base_url, self.model, workload, stream=False) as client:
                # The client opens as many connections as requests are to be in flight; the others wait for one.
                return await asyncio.gather(*(client.ask(**request) for request in requests))

        try:
            return asyncio.run(answers())
        except FAILURES as error:
            raise ServerError(f"a request failed: {describe(error)}", "an answer", "read the server's log") from error

    def _recorded(self) -> int:
        """Rows of the recording, once nothing waits to be written. Raises ServerError where that takes too long."""
        deadline = time.monotonic() + WRITTEN_S
        while time.monotonic() < deadline:
            recording = call(self.server.base_url, "/v1/auf/recording")["recording"]
            if recording["waiting_tokens"] == 0:
                return int(recording["rows"])
            time.sleep(0.1)
        raise ServerError(f"a recording that is not written: {recording}", "one on the disk", "read the server's log")

    def _adapt(self) -> bool:
        """Whether a better drafter was exported. The server has nothing to do meanwhile and leaves it both cores."""
        running = self._swap()["path"]
        self.server.pause()
        code = sglang_auf(
            [
                *("adapt", running, "--recorded", str(self.out / "recording")),
                *("--out", str(self.out / "drafter"), "--data", str(self.out / "old-answers.jsonl")),
                *("--minutes", f"{self.config.minutes:g}", "--min-rows", "20"),
            ],
            codes=(0, NOT_BETTER),
            output=self.out / "adapt.txt",
        )
        self.server.resume()
        return code == 0

    def _swap(self) -> dict[str, Any]:
        """How the running drafter came to run."""
        found: dict[str, Any] = call(self.server.base_url, "/v1/auf/card")["swap"]
        return found


def _of_kind(name: str, records: Sequence[Record]) -> list[Record]:
    return [record for record in records if (NEW if record.task == HELD_OUT.name else OLD) == name]


def _pairs(before: Sequence[Record], after: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Both answers to each prompt that was answered with either drafter."""
    theirs = {record.key: record for record in after if not record.failed}
    return [(record, theirs[record.key]) for record in before if not record.failed and record.key in theirs]
