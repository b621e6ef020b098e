"""Cutting answers into buckets, against counts made by hand and against the answer's own figures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.harness.records import Record
from benchmarks.stats.positions import by_position, by_prompt_length, parts_of, without_steps
from benchmarks.stats.summary import summarize_task

BLOCK = 8


def answer(
    steps: list[int] | None, prompt: str = "a", task: str = "t", cut: int = 0, prompt_tokens: int = 5, turn: int = 0
) -> Record:
    """cut: tokens of the last step that a stop left out."""
    accepted = steps or []
    return Record(
        task=task,
        prompt_id=prompt,
        turn=turn,
        temperature=0.0,
        prompt_tokens=prompt_tokens,
        completion_tokens=1 + sum(accepted) + len(accepted) - cut,
        verify_steps=len(accepted),
        accepted_histogram=[accepted.count(a) for a in range(BLOCK)],
        accepted_by_step=steps,
        started_at=0.0,
        latency_s=1.0,
    )


def test_a_step_is_counted_where_its_first_token_stands() -> None:
    """Steps of 8 tokens from position 2: the eighth begins at 58 and reaches over 64, the ninth begins at 66."""
    parts = parts_of(answer([7] * 9 + [0]))
    assert {high: (part.verify_steps, part.completion_tokens - 1) for high, part in parts.items()} == {
        64: (8, 64),
        128: (2, 9),
    }
    assert parts[128].accepted_histogram == [1, 0, 0, 0, 0, 0, 0, 1]


def test_the_token_at_64_is_of_the_first_bucket_and_the_one_at_65_is_not() -> None:
    parts = parts_of(answer([0] * 64))
    assert {high: part.verify_steps for high, part in parts.items()} == {64: 63, 128: 1}


def test_tokens_that_a_stop_cut_off_are_not_emitted() -> None:
    (part,) = parts_of(answer([3, 7], cut=5)).values()
    assert part.acceptance.emitted == 4 + 3
    assert part.acceptance.tau == 3.5


@given(
    st.lists(st.lists(st.integers(0, BLOCK - 1), min_size=1, max_size=200), min_size=1, max_size=5), st.integers(0, 7)
)
def test_the_parts_are_the_whole(answers: list[list[int]], cut: int) -> None:
    for steps in answers:
        whole = answer(steps, cut=min(cut, steps[-1]))
        parts = [part.acceptance for part in parts_of(whole).values()]
        assert sum(part.emitted for part in parts) == whole.acceptance.emitted
        assert [sum(counts) for counts in zip(*(part.histogram for part in parts), strict=True)] == list(
            whole.acceptance.histogram
        )


def test_buckets_by_position_know_the_same_answers_start() -> None:
    """Two short answers, better than the start of the long one: what decays is who is still there."""
    short = [answer([7] * 4, f"short{n}") for n in range(2)]
    start, later = by_position([*short, answer([0] * 63 + [1] * 10, "long")])
    assert (start.name, later.name) == ("1-64", "65-128")
    assert start.summary.requests == 3
    assert start.summary.tau == pytest.approx((8 + 8 + 1) / 3)
    assert start.at_start == start.summary.tau
    assert later.summary.requests == 1
    assert later.summary.tau == 2.0
    assert later.at_start == 1.0


def test_a_bucket_is_read_as_a_task_is() -> None:
    """By prompt length, with nothing cut into parts, the figures and intervals are those of the answers."""
    records = [answer([n % BLOCK, 3], f"p{n}", prompt_tokens=70) for n in range(6)]
    (bucket,) = by_prompt_length(records)
    same = [record.model_copy(update={"task": "128", "prompt_id": f"t/{record.prompt_id}"}) for record in records]
    assert (bucket.low, bucket.high, bucket.at_start) == (65, 128, None)
    assert bucket.summary == summarize_task(same)
    assert bucket.summary.tau_interval is not None


def test_prompts_of_two_tasks_with_one_id_are_two() -> None:
    records = [answer([1], "0", task) for task in ("a", "b", "c")]
    (bucket,) = by_prompt_length(records)
    assert bucket.summary.prompts == 3
    assert bucket.summary.tau_interval is not None
    turns = [answer([1], "0", turn=turn) for turn in range(3)]
    assert by_position(turns)[0].summary.prompts == 1
    assert by_position(turns)[0].summary.requests == 3


def test_buckets_of_prompts_double() -> None:
    lengths = (1, 64, 65, 128, 129, 5000)
    buckets = by_prompt_length(answer([1], f"p{n}", prompt_tokens=n) for n in lengths)
    assert {bucket.name: bucket.summary.requests for bucket in buckets} == {
        "1-64": 2, "65-128": 2, "129-256": 1, "4097-8192": 1
    }  # fmt: skip


def test_answers_without_known_steps_are_counted_and_left_out() -> None:
    unknown = answer([1, 2]).model_copy(update={"accepted_by_step": None})
    failed = answer([1]).model_copy(update={"error": "500"})
    without = answer(None)
    assert without_steps([unknown, failed, without, answer([1])]) == 1
    assert by_position([unknown, failed, without]) == []
    assert [bucket.summary.requests for bucket in by_prompt_length([unknown, failed, without])] == [1]
