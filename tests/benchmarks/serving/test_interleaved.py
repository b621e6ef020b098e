"""What a step costs; the turns themselves are tested with the tables that they make."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.harness.records import Record
from benchmarks.serving.interleaved import median_of_all, seconds_per_step


def record(latency_s: float, tokens: int, histogram: list[int], prompt: str = "p") -> Record:
    return Record(
        task="t",
        prompt_id=prompt,
        turn=0,
        temperature=0,
        completion_tokens=tokens,
        verify_steps=sum(histogram),
        accepted_histogram=histogram,
        started_at=0,
        latency_s=latency_s,
    )


def test_a_step_costs_the_time_after_prefill() -> None:
    def keyed(*records: Record) -> dict[Any, Record]:
        return {one.key: one for one in records}

    prefill = keyed(record(0.5, 1, []), record(1.0, 1, [], "q"))
    plain = keyed(record(2.5, 11, []), record(4.0, 11, [], "q"))
    assert seconds_per_step(plain, prefill) == pytest.approx((2.0 + 3.0) / 20)
    speculating = keyed(record(2.5, 11, [1, 1, 2]), record(4.0, 11, [6, 0, 0], "q"))
    assert seconds_per_step(speculating, prefill) == pytest.approx((2.0 + 3.0) / 10)
    assert seconds_per_step(keyed(record(0.5, 1, [])), prefill) is None


def test_a_round_without_a_value_has_no_median() -> None:
    assert median_of_all([3.0, 1.0, 2.0]) == 2.0
    assert median_of_all([3.0, None, 2.0]) is None
    assert median_of_all([]) is None
