"""An open loop: when requests are due, that their times count from then, and what is said of it."""

from __future__ import annotations

import itertools
import json
import math
import operator
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cli import main
from benchmarks.harness.records import Record, read_records
from benchmarks.harness.sources.arrivals import due_times, poisson_arrivals

Start = Callable[..., Any]

DELAY = 0.05
"""Seconds that the fake server sleeps before each answer, at least."""


def gaps(rate: float, seed: int, count: int) -> list[float]:
    times = [0.0, *itertools.islice(poisson_arrivals(rate, seed), count)]
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def test_gaps_are_exponential_with_the_rate() -> None:
    found = gaps(4.0, 42, 20_000)
    assert sum(found) / len(found) == pytest.approx(1 / 4, rel=0.03)
    for times in (0.5, 1.0, 2.0):
        assert sum(gap > times / 4 for gap in found) / len(found) == pytest.approx(math.exp(-times), rel=0.05)


def test_times_follow_the_seed_and_scale_with_the_rate() -> None:
    assert gaps(1.0, 7, 50) == gaps(1.0, 7, 50) != gaps(1.0, 8, 50)
    assert gaps(10.0, 7, 50) == pytest.approx([gap / 10 for gap in gaps(1.0, 7, 50)])


def test_without_a_rate_nothing_is_due() -> None:
    assert list(itertools.islice(due_times(None, 1), 3)) == [None] * 3


class Arrivals(list[Any]):
    """The requests that a fake server got. times: when, in Unix time."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def append(self, request: Any) -> None:
        self.times.append(time.time())
        super().append(request)


def flags(url: str, out: Path, data_dir: Path, *more: str, task: str = "gsm8k") -> list[str]:
    asked = ["--tasks", task, "--limit", "6", "--data-dir", str(data_dir), "--max-tokens", "32"]
    return ["--base-url", url, "--out", str(out), *asked, *more]


def run(url: str, out: Path, data_dir: Path, *more: str, task: str = "gsm8k") -> list[Record]:
    assert main(["run", *flags(url, out, data_dir, "--warmup", "1", *more, task=task)]) == 0
    return read_records(out / "records.jsonl")


def test_times_count_from_when_a_request_was_due(
    fake: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All are due at once, and go one by one: the last one's times hold the answers of the others."""
    server, out = fake(delay_s=DELAY), tmp_path / "run"
    server.engine.requests = arrived = Arrivals()
    records = run(server.url, out, data_dir, "--rate", "1e6", "--concurrency", "1")
    for before, record in enumerate(records):
        assert record.waited_s is not None and record.ttft_s is not None
        assert record.latency_s >= record.ttft_s >= record.waited_s + DELAY
        assert record.waited_s >= before * DELAY
    sent = [record.started_at + (record.waited_s or 0) for record in records]
    _warm_up, *received = arrived.times
    assert all(map(operator.lt, sent, received)), "it started when it was due, not when it was sent"
    assert all(map(operator.gt, sent[1:], received)), "one at a time"
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["rate"], summary["throughput"]["concurrency"]) == (1e6, 1)
    assert summary["latency"]["waited"]["p99"] >= 4 * DELAY
    printed = capsys.readouterr().out
    assert "tokens/s at 1e+06 requests/s, at most 1 in flight" in printed
    assert "Times count from when a request was due" in printed
    assert "waited      p50" in printed


def test_tokens_per_second_count_the_time_without_a_request(fake: Start, data_dir: Path, tmp_path: Path) -> None:
    """Requests that come seldom: most of the time nothing is asked, and a quick server gives no more tokens."""
    records = run(fake().url, tmp_path / "run", data_dir, "--rate", "2", "--concurrency", "6")
    begun, ended = zip(*((record.started_at, record.started_at + record.latency_s) for record in records), strict=True)
    speed = json.loads((tmp_path / "run" / "summary.json").read_text())["throughput"]
    assert speed["seconds"] == pytest.approx(max(ended) - min(begun))
    assert speed["tokens_per_s"] == pytest.approx(speed["completion_tokens"] / speed["seconds"])


def test_requests_do_not_wait_for_each_other_and_keep_to_the_cap(fake: Start, data_dir: Path, tmp_path: Path) -> None:
    server = fake(delay_s=4 * DELAY)
    run(server.url, tmp_path / "run", data_dir, "--rate", "1000", "--concurrency", "3")
    assert 1 < server.engine.most_in_flight <= 3


def test_a_later_turn_is_due_when_the_answer_before_is_there(fake: Start, data_dir: Path, tmp_path: Path) -> None:
    records = run(fake().url, tmp_path / "run", data_dir, "--rate", "500", "--concurrency", "2", task="mt_bench")
    assert {(record.turn, record.waited_s is None) for record in records} == {(0, False), (1, True)}


def test_a_closed_loop_waits_for_nothing(fake: Start, data_dir: Path, tmp_path: Path) -> None:
    records = run(fake().url, tmp_path / "run", data_dir)
    assert all(record.waited_s is None for record in records)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["rate"], summary["latency"]["waited"]) == (None, None)


def test_a_failed_request_was_due_too(fake: Start, data_dir: Path, tmp_path: Path) -> None:
    rows = "".join(f'{{"id": "{i}", "turns": ["{"FAIL" if i == 2 else "sum"} {i}"]}}\n' for i in range(6))
    (data_dir / "gsm8k.jsonl").write_text(rows)
    out = tmp_path / "run"
    assert main(["run", *flags(fake().url, out, data_dir, "--rate", "100", "--concurrency", "2")]) == 1
    (failed,) = [record for record in read_records(out / "records.jsonl") if record.failed]
    assert failed.waited_s is not None and failed.latency_s >= failed.waited_s


@pytest.mark.parametrize("command", ["run", "sweep"])
@pytest.mark.parametrize("rate", [["2"], ["0", "--concurrency", "2"], ["inf", "--concurrency", "2"]])
def test_a_senseless_rate_is_refused(
    command: str, rate: list[str], fake: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = fake()
    assert main([command, *flags(server.url, tmp_path / "out", data_dir, "--rate", *rate)]) == 2
    said = capsys.readouterr().err
    assert "rate" in said and ("concurrency, the most requests" in said) == (rate == ["2"])
    assert not server.engine.requests


def test_a_sweep_over_rates_has_one_cap(
    fake: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    auf, plain, out = fake(), fake(speculative=False), tmp_path / "sweep"
    command = ["sweep", *flags(auf.url, out, data_dir, "--plain-url", plain.url, "--rate", "200,50")]
    assert main([*command, "--concurrency", "1,2"]) == 2
    assert "single --concurrency" in capsys.readouterr().err
    assert main([*command, "--concurrency", "8"]) == 0, "more may be in flight than there are prompts"
    levels = json.loads((out / "sweep.json").read_text())["levels"]
    assert [(level["rate"], level["concurrency"], level["speedup"]) for level in levels] == [
        (50.0, 8, None), (200.0, 8, None)
    ]  # fmt: skip
    table = (out / "sweep.md").read_text()
    assert "| requests/s | requests | tau | AUF tokens/s | plain tokens/s | AUF TTFT p50" in table
    assert "| 50/s | 6 |" in table and "plain waited p50 / p90 / p99 ms" in table and "speed-up |" not in table
    assert "at most 8 in flight. Requests come at random times" in table
    assert "ITL: time between" in table and "raises the speed-up" not in table
    assert main(["report", str(out), "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "report.md").read_text()
    assert "| run | concurrency | requests | failed | tokens/s | TTFT | ITL | requests/s | latency | waited |" in page
    assert "Speed-up by concurrency" not in page
    assert "50 requests/s, at most 8 in flight" in page


def test_a_run_at_another_rate_is_not_resumed(
    fake: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, out = fake(), tmp_path / "run"
    run(server.url, out, data_dir, "--rate", "500", "--concurrency", "2")
    again = ["run", *flags(server.url, out, data_dir, "--warmup", "1", "--concurrency", "2", "--resume")]
    assert main([*again, "--rate", "400"]) == 2
    assert "rate = 400" in capsys.readouterr().err
    assert main(again) == 2
    assert main([*again, "--rate", "500"]) == 0
