"""Figures of one kind before and after a swap, against the counts of the answers."""

from __future__ import annotations

import pytest

from benchmarks.harness.records import Record
from benchmarks.training.before_after import HEADING, BeforeAfter


def records(accepted: int, latency_s: float, count: int = 6, task: str = "kind") -> list[Record]:
    """Answers of 10 steps and 1 + 10 * (accepted + 1) tokens."""
    return [
        Record(
            task=task,
            prompt_id=f"p{number}",
            turn=0,
            temperature=0.0,
            completion_tokens=11 + 10 * accepted,
            accepted_histogram=[*[0] * accepted, 10, *[0] * (3 - accepted)],
            verify_steps=10,
            started_at=float(100 * number),
            latency_s=latency_s,
        )
        for number in range(count)
    ]


def test_both_drafters_are_compared_on_the_same_prompts() -> None:
    kind = BeforeAfter.of("kind", records(0, 1.0), records(1, 0.5))
    assert kind.after is not None
    assert (kind.prompts, kind.before.tau, kind.after.tau, kind.gain) == (6, 1.0, 2.0, 1.0)
    assert kind.before.tokens_per_s == pytest.approx(11)
    assert kind.after.tokens_per_s == pytest.approx(42)
    assert kind.speedup == pytest.approx(42 / 11)
    assert kind.speedup_interval is not None
    assert (kind.speedup_interval.low, kind.speedup_interval.high) == pytest.approx((42 / 11, 42 / 11))
    assert kind.row() == [
        *("kind", "6", "1.00 (1.00..1.00)", "2.00 (2.00..2.00)", "+1.00 [+1.00, +1.00]"),
        *("11.00 (11.00..11.00)", "42.00 (42.00..42.00)", "3.82 (3.82..3.82)"),
    ]


def test_tasks_of_a_kind_weigh_equally() -> None:
    kind = BeforeAfter.of("kinds", records(0, 1.0, 9, "one") + records(2, 1.0, 3, "another"), [])
    assert kind.before.tau == 2.0


def test_without_a_new_drafter_there_is_nothing_after() -> None:
    kind = BeforeAfter.of("kind", records(0, 1.0), [])
    assert (kind.after, kind.gain, kind.speedup) == (None, None, None)
    assert len(kind.row()) == len(HEADING)
    assert [kind.row()[column] for column in (3, 4, 6, 7)] == ["-"] * 4


def test_answers_that_all_failed_have_no_difference() -> None:
    failed = [record.model_copy(update={"error": "down"}) for record in records(1, 0.5)]
    kind = BeforeAfter.of("kind", records(0, 1.0), failed)
    assert (kind.gain, kind.speedup, kind.speedup_interval) == (None, 0.0, None)
    assert [kind.row()[column] for column in (3, 4, 6)] == ["-", "-", "0.00"]
