from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.harness.manifest import Session
from benchmarks.harness.records import Record
from benchmarks.stats.summary import (
    SHOWN_GROUPS,
    busy_seconds,
    cached_share,
    latency,
    macro,
    micro,
    open_loop_seconds,
    summarize_groups,
    summarize_task,
    summarize_tasks,
    throughput,
)

NEW_YEAR = datetime(2026, 1, 1, tzinfo=UTC).timestamp()


def record(prompt_id: str = "a", histogram: tuple[int, ...] = (), tokens: int = 0, **fields: Any) -> Record:
    given_fields = {
        "task": "gsm8k",
        "prompt_id": prompt_id,
        "turn": 0,
        "temperature": 0.0,
        "started_at": 0.0,
        "latency_s": 1.0,
        "accepted_histogram": list(histogram),
        "verify_steps": sum(histogram),
        "completion_tokens": tokens,
    }
    return Record.model_validate({**given_fields, **fields})


SLOW = record("slow", (10, 0, 0), 11)  # 10 steps of 1 token: tau 1
FAST = record("fast", (0, 0, 2), 6)  # 2 steps of 3 tokens, one cut by the stop: tau 2.5, tau_verify 3


def test_macro_weighs_prompts_and_micro_weighs_steps() -> None:
    summary = summarize_task([SLOW, FAST])
    assert summary.tau == pytest.approx((1 + 2.5) / 2)
    assert summary.tau_micro == pytest.approx((10 + 5) / 12)
    assert summary.tau_verify == pytest.approx((1 + 3) / 2)
    assert summary.alpha == pytest.approx([(0 + 1) / 2, 1.0])
    assert summary.accepted_histogram == [10, 0, 2]


def test_failures_and_answers_without_a_step_are_counted_not_averaged() -> None:
    failed, single = record("f", error="500", latency_s=9.0), record("s", tokens=1)
    summary = summarize_task([SLOW, FAST, failed, single])
    assert (summary.prompts, summary.requests, summary.failed, summary.without_steps) == (4, 4, 1, 1)
    assert summary.tau == summarize_task([SLOW, FAST]).tau
    assert summary.completion_tokens == 11 + 6 + 1


def test_turns_are_prompts_of_their_own_for_tau() -> None:
    turns = [record("m", (1, 0), 2, turn=0), record("m", (0, 3), 7, turn=1)]
    summary = summarize_task(turns)
    assert (summary.prompts, summary.requests, summary.tau) == (1, 2, pytest.approx((1 + 2) / 2))


def test_tasks_weigh_equally_in_the_macro_mean() -> None:
    records = [SLOW, SLOW.model_copy(update={"prompt_id": "x"}), FAST.model_copy(update={"task": "mbpp"})]
    tasks = summarize_tasks(records)
    assert macro(tasks.values()).tau == pytest.approx((1 + 2.5) / 2)
    assert micro(records).tau == pytest.approx((10 + 10 + 5) / 22)


def test_a_baseline_has_no_tau() -> None:
    records = [record("a", tokens=30)]
    assert macro(summarize_tasks(records).values()).tau is None
    assert micro(records).tau is None


def test_a_group_is_read_as_a_task_is() -> None:
    """Interval from three prompts on; both turns of a conversation are one prompt."""
    english = [record(str(n), (n % 3, 4), 9, group="en") for n in range(3)]
    german = [record(f"d{n // 2}", (1, 1), 4, group="de", turn=n % 2) for n in range(4)]
    found = summarize_groups([*german, *english, record("x", (1,), 2, group=""), record("y", (1,), 2, task="mbpp")])
    assert list(found) == ["gsm8k"], "the prompts of mbpp are in no groups"
    groups = found["gsm8k"].groups
    assert list(groups) == ["en", "de", ""]
    assert groups["en"] == summarize_task(english)
    assert groups["en"].tau_interval is not None
    assert (groups["de"].prompts, groups["de"].requests, groups["de"].completion_tokens) == (2, 4, 16)
    assert groups["de"].tau_interval is None
    assert groups[""].prompts == 1


def test_of_too_many_groups_the_largest_are_kept_and_the_others_counted() -> None:
    many = [record(str(n), (1, 1), 4, group=f"customer {n}") for n in range(SHOWN_GROUPS + 5)]
    large = [record(f"l{n}", (1, 1), 4, group="zzz") for n in range(2)]
    found = summarize_groups([*many, *large])["gsm8k"]
    assert next(iter(found.groups)) == "zzz"
    assert (len(found.groups), found.others, found.others_prompts) == (SHOWN_GROUPS, 6, 6)


def test_without_groups_or_verify_steps_there_is_no_table() -> None:
    assert summarize_groups([SLOW, FAST]) == {}
    assert summarize_groups([record("a", tokens=30, group="en")]) == {}


def test_the_cached_share_is_of_the_prompts_whose_replies_say_it() -> None:
    told = [record("a", prompt_tokens=90, cached_tokens=30), record("b", prompt_tokens=10, cached_tokens=0)]
    others = [record("c", prompt_tokens=50), record("d", prompt_tokens=9, cached_tokens=9, error="500")]
    assert cached_share([*told, *others]) == pytest.approx(0.3)
    assert throughput([*told, *others], 1).cached_share == summarize_task([*told, *others]).cached_share
    assert cached_share(others) is None
    assert cached_share([]) is None


def test_throughput_counts_overlapping_time_once() -> None:
    records = [
        record("a", tokens=30, started_at=100.0, latency_s=2.0),
        record("b", tokens=30, started_at=101.0, latency_s=2.0),
        record("c", tokens=40, started_at=110.0, latency_s=1.0),
        record("d", tokens=0, started_at=111.0, latency_s=1.0, error="500"),
    ]
    speed = throughput(records, concurrency=2)
    assert (speed.seconds, speed.completion_tokens, speed.failed) == (pytest.approx(5.0), 100, 1)
    assert speed.tokens_per_s == pytest.approx(20.0)


def test_open_loops_leave_out_the_pauses_between_sessions_alone() -> None:
    def session(minute: int) -> Session:
        return Session(started_at=f"2026-01-01T00:{minute:02d}:00+00:00")

    def due(seconds: float, latency_s: float) -> Record:
        return record(started_at=NEW_YEAR + seconds, latency_s=latency_s)

    first, second = [due(1, 2), due(11, 4), due(13, 1)], [due(3602, 3), due(3600, 1)]
    assert open_loop_seconds(first, [session(0)]) == pytest.approx(15 - 1)
    assert open_loop_seconds([*second, *first], [session(0), session(59)]) == pytest.approx((15 - 1) + 5)
    assert busy_seconds(first) == pytest.approx(2 + 4)
    assert open_loop_seconds([], [session(0)]) == 0


def test_time_between_tokens_starts_at_the_first_one() -> None:
    """Ten tokens, the first after 0.5 s and the last after 5 s: 0.5 s from one to the next."""
    ten, one = record("a", tokens=10, ttft_s=0.5, latency_s=5.0), record("b", tokens=1, ttft_s=0.3, latency_s=0.3)
    whole, failed = record("c", tokens=10, latency_s=2.0), record("d", error="500", ttft_s=9.0, latency_s=9.0)
    found = latency([ten, one, whole, failed])
    assert found.itl is not None and found.ttft is not None and found.latency is not None
    assert (found.itl.p50, found.itl.p99) == (pytest.approx(0.5), pytest.approx(0.5))
    assert found.ttft.p50 == pytest.approx(0.4)
    assert found.latency.p50 == pytest.approx(2.0)
    assert latency([whole, failed]).ttft is None
    assert latency([]).latency is None


def test_nothing_asked_has_no_speed() -> None:
    assert throughput([], 1).tokens_per_s is None


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=12))
def test_busy_time_is_the_measure_of_a_union(spans: list[tuple[int, int]]) -> None:
    seconds = {second for start, length in spans for second in range(start, start + length)}
    records = [record(str(i), started_at=start, latency_s=length) for i, (start, length) in enumerate(spans)]
    assert busy_seconds(records) == len(seconds)
