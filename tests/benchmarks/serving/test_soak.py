"""What a soak calls a fault and a leak, and what each kind of request is checked for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from pydantic import ValidationError

from benchmarks.serving.soak import Sample, SoakConfig, SoakReport, Swapped, Tally, _send, _swap_in_turn
from benchmarks.serving.soak_requests import (
    BAD,
    KINDS,
    Question,
    Sender,
    Wrong,
    bad,
    choices,
    grammar,
    logprobs,
    questions,
    seeded,
    streamed,
    whole,
)
from sglang_auf.errors import ServerError

EARLY = 0.01
"""Seconds that asyncio may wake up too early."""

QUESTION = Question("Why?", 8, 3, greedy="So.", seeded="Thus.", constrained='{"item": "x", "count": 1}')


def sample(seconds: float, memory_mib: float = 1000.0, **changes: int) -> Sample:
    return Sample(
        seconds=seconds, memory_mib=memory_mib, **({"files": 50, "kv_tokens": 1, "running": 0, "waiting": 0} | changes)
    )


def report(memory: list[float], before: Sample, after: Sample, faults: dict[str, int] | None = None) -> SoakReport:
    """Samples are a minute apart."""
    return SoakReport(
        config=SoakConfig(),
        asked={"whole": 3},
        faults=faults or {},
        named=["what it was"] if faults else [],
        acceptance={"total": {"requests": 3, "tau": 1.5}},
        before=before,
        after=after,
        samples=[sample(60.0 * (minute + 1), mib) for minute, mib in enumerate(memory)],
        versions={},
        machine={"cpu": "a", "cores": 2, "memory_gib": 1, "gpus": []},
        command=["soak"],
    )


@pytest.mark.parametrize("recorded", [True, False])
def test_a_soak_is_recorded_only_where_that_is_its_subject(fake: Callable[..., Any], recorded: bool) -> None:
    server = fake()

    async def ask() -> None:
        sender = Sender(server.url, "toy", 60.0, recorded=recorded)
        await sender.chat(QUESTION)
        await sender.client.close()

    asyncio.run(ask())
    assert server.engine.unrecorded == ["on" if recorded else "off"]


def test_growth_leaves_out_the_time_in_which_pools_fill() -> None:
    memory = [500, 800, 1000, 1000, 1000, 1010, 1010, 1020, 1030, 1030.0]
    assert report(memory, sample(0), sample(0)).growth == pytest.approx(0.03)
    assert report(memory, sample(0), sample(0)).passed


@pytest.mark.parametrize(
    ("memory", "after", "said"),
    [
        ([1000.0] * 8 + [1100, 1100], sample(0), "memory grew by 10.0%"),
        ([1000.0] * 10, sample(0, kv_tokens=9), "9 KV slots in use when idle, 1 before"),
        ([1000.0] * 10, sample(0, files=51), "51 files open when idle, 50 before"),
    ],
)
def test_a_leak_is_named_and_fails(memory: list[float], after: Sample, said: str) -> None:
    found = report(memory, sample(0), after)
    assert found.leaks == [said]
    assert not found.passed
    assert said in found.markdown()


def test_a_fault_fails_and_is_shown() -> None:
    found = report([1000.0] * 10, sample(0), sample(0), {"wrong answers": 2})
    assert not found.passed
    assert "2 wrong answers" in found.markdown()
    assert "what it was" in found.markdown()


def test_swaps_and_what_was_recorded_are_shown() -> None:
    swaps = (Swapped(seconds=61.0, took=0.25, generation=1), Swapped(seconds=120.2, took=1.0, generation=2))
    found = report([1000.0] * 10, sample(0), sample(0)).model_copy(
        update={"swapped": swaps, "recording": {"rows": 17, "error": None}}
    )
    text = found.markdown()
    assert "Drafter swapped 2 times: 0.25 s at 61 s, 1.00 s at 120 s." in text
    assert "Recorded: rows 17, error None." in text


def test_a_drafter_that_is_not_there_is_refused_before_the_load(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"no directory: .*gone"):
        SoakConfig(swap=(tmp_path, tmp_path / "gone"))  # type: ignore[call-arg]


def test_swaps_come_at_even_distances_and_a_refused_one_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    drafters = tuple(tmp_path / name for name in "abc")
    for drafter in drafters:
        drafter.mkdir()

    def answers(base_url: str, path: str, body: dict[str, Any], timeout_s: float) -> Any:
        asked.append(body["path"])
        if Path(body["path"]).name == "b":
            raise ServerError("status 409: busy", "another", "wait")
        return {"generation": len(asked)}

    monkeypatch.setattr("benchmarks.serving.soak.call", answers)
    config, tally = SoakConfig(minutes=0.01, sample_s=0.01, swap=drafters), Tally()  # type: ignore[call-arg]
    began = time.monotonic()
    swapped = asyncio.run(_swap_in_turn(SimpleNamespace(base_url=""), tally, began, config))  # type: ignore[arg-type]
    assert asked == [str(drafter.resolve()) for drafter in drafters]
    assert [one.generation for one in swapped] == [1, 3]
    first, last = (one.seconds for one in swapped)
    assert first >= 0.15 - EARLY and last >= 0.45 - EARLY
    assert dict(tally.faults) == {"swaps refused": 1}
    assert "busy" in tally.named[0]


class Answering:
    """A sender whose server gives one text to everything."""

    def __init__(self, text: str, count: int = 1, tokens: int = 4) -> None:
        self.text, self.count, self.tokens = text, count, tokens

    async def chat(self, question: Question, **changes: Any) -> Any:
        if changes.get("stream"):
            return self._stream()
        content = SimpleNamespace(content=[None] * 4)
        choice = SimpleNamespace(
            message=SimpleNamespace(content=self.text), finish_reason="stop", logprobs=content, index=0
        )
        return SimpleNamespace(choices=[choice] * self.count, usage=SimpleNamespace(completion_tokens=self.tokens))

    async def _stream(self) -> Any:
        for letter in self.text:
            yield SimpleNamespace(choices=[SimpleNamespace(delta=SimpleNamespace(content=letter))])
        yield SimpleNamespace(choices=[])


@pytest.mark.parametrize(
    ("kind", "right"),
    [
        (whole, Answering("So.")),
        (streamed, Answering("So.")),
        (choices, Answering("So.", count=3)),
        (logprobs, Answering("So.")),
        (seeded, Answering("Thus.")),
        (grammar, Answering(QUESTION.constrained)),
    ],
)
def test_an_answer_that_is_not_plain_decodings_is_wrong(kind: Any, right: Answering) -> None:
    asyncio.run(kind(right, QUESTION))
    with pytest.raises(Wrong):
        asyncio.run(kind(Answering(right.text + "?", right.count), QUESTION))


def test_missing_choices_and_logprobs_are_wrong() -> None:
    with pytest.raises(Wrong, match="2 choices"):
        asyncio.run(choices(Answering("So.", count=2), QUESTION))
    with pytest.raises(Wrong, match="4 tokens for 5"):
        asyncio.run(logprobs(Answering("So.", tokens=5), QUESTION))


class Refusing:
    def __init__(self, status: int) -> None:
        self.status = status

    async def chat(self, *_: Any, **__: Any) -> Any:
        reply = httpx.Response(self.status, request=httpx.Request("POST", "http://server"))
        raise openai.APIStatusError("no such thing", response=reply, body=None)


def test_a_bad_request_must_be_refused_as_the_clients_fault() -> None:
    asyncio.run(bad(Refusing(400), QUESTION))  # type: ignore[arg-type]
    with pytest.raises(Wrong):
        asyncio.run(bad(Answering("So."), QUESTION))  # type: ignore[arg-type]


@pytest.mark.parametrize(("status", "fault"), [(500, "server errors"), (503, "server errors"), (401, "refusals")])
def test_faults_are_counted_by_kind(status: int, fault: str) -> None:
    tally = Tally()
    asyncio.run(_send(bad, Refusing(status), QUESTION, tally))  # type: ignore[arg-type]
    assert tally.faults == {fault: 1}
    assert tally.asked == {"bad": 1}
    assert "no such thing" in tally.named[0]


def test_too_few_samples_for_a_verdict_are_refused_before_the_load() -> None:
    with pytest.raises(ValidationError, match="a tenth"):
        SoakConfig(minutes=0.1, sample_s=1)
    with pytest.raises(ValidationError, match="a tenth"):
        SoakConfig(minutes=0.1)
    SoakConfig(minutes=0.5, sample_s=3)


def test_every_bad_request_has_its_turn() -> None:
    seeds = {question.seed % len(BAD) for question in questions(SoakConfig().questions)}
    assert seeds == set(range(len(BAD)))
    assert len({question.max_tokens for question in questions(6)}) == 3
    assert len(KINDS) == 10
